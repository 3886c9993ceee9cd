"""Goal: an impression that brings a token is learnt from the very columns that the open form gives, and one whose token
is none of ours becomes a dead letter that says what to do. Method: both decoders, a gateway over the log in memory."""

from __future__ import annotations

import json
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest

from headrace.contract.crawl import Crawl, Extract
from headrace.contract.formats.served_token import TOO_NEW, UNREADABLE, WRONG_KEY, TokenKey, token_head, token_key
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Counter, FeatureSpec
from headrace.ingest.decode.fluent_chunk import decode, layout
from headrace.ingest.decode.message import entry_starts
from headrace.ingest.decode.msgpack_scan import as_bytes
from headrace.ingest.decode.served import served_tokens
from headrace.ingest.decode.validate import check, declared_types
from headrace.kernels.served_tokens import seal_tokens

PROJECT = Project(
    name="p",
    impression=ImpressionType(tag="shown", key="user", fields={"user": "int64", "item": "int64"}),
    feedback=(FeedbackType(name="click", tag="click", fields={}),),
    tasks=(Task(name="click", feedback="click", window_ms=10),),
    crawls=(
        Crawl(
            name="shop",
            kind="json",
            start=("http://127.0.0.1:1/",),
            joins="item",
            key=Extract(at="id"),
            fields={
                "title": Extract(at="t"),
                "price": Extract(at="p", type="float64"),
                "tags": Extract(at="g", type="list[string]"),
                "new": Extract(at="n", type="bool"),
            },
        ),
    ),
    features=FeatureSpec(counters=(Counter(name="user", key="user"), Counter(name="item", key="item"))),
)
KEY = token_key("a secret of 16 bytes")
NAMES = PROJECT.features.counter_columns()
ROWS = [dict(zip(NAMES, values, strict=True)) for values in ((3.0, 1.0, 0.1, 0.0), (3.0, 1.0, 9e9, 2.0))]
ENTITIES: list[dict[str, Any]] = [
    {"title": "a", "price": 1.5, "tags": ["x", "y"], "new": True, "crawl_time_ms": 7},
    {"title": None, "price": None, "tags": None, "new": None, "crawl_time_ms": 0},
]
TAKEN_MS = range(10**15)


def tokens(key: TokenKey = KEY, version: str = "r-1") -> list[str]:
    packed = [msgspec.msgpack.encode(list(entity.values())) for entity in ENTITIES]
    values_NC = np.array([list(row.values()) for row in ROWS], np.float32)
    head = token_head(key, version)
    made: list[str] = json.loads(
        seal_tokens(served_tokens(PROJECT).layout, key, head, np.full((2, 1), 0.5, np.float32), values_NC, [packed])
    )
    return made


def records(served: list[Any], **more: Any) -> list[dict[str, Any]]:
    lead = [{"event_id": f"e{n}", "request_id": "r", "place": n, "user": 1, "item": n} for n in range(len(served))]
    return [row | more | ({} if token is None else {"served": token}) for row, token in zip(lead, served, strict=True)]


def both(rows: list[dict[str, Any]], project: Project = PROJECT) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Return the rows that are taken and why the others are not, the same by the compiled decoder and the plain one."""
    declared = declared_types(project, KEY)["shown"]
    checked = check(declared, rows, [10**15] * len(rows), [""] * len(rows), taken_ms=TAKEN_MS)
    taken = dict(zip(checked.rows, checked.batch.to_pylist(), strict=True))
    body = b"".join(msgpack.packb([10**6, row]) for row in rows)
    starts, zeros = entry_starts(as_bytes(body)), np.zeros(len(rows), np.int64)
    found = decode(layout(declared), as_bytes(body), starts, ["p"], zeros, zeros, TAKEN_MS)
    found.batch.validate(full=True)
    for row in set(range(len(rows))) - set(found.left.tolist()):
        assert repr(found.batch.slice(row, 1).to_pylist()[0]) == repr(taken[row])
    assert set(checked.rejected) <= set(found.left.tolist())
    return list(taken.values()), {row: reason for row, (reason, _) in checked.rejected.items()}


def flat() -> list[dict[str, Any]]:
    """What clients of before logged: the open columns beside their own fields."""
    named = [{f"external.shop.{name}": value for name, value in entity.items()} for entity in ENTITIES]
    return [
        row | counters | entity | {"version": "r-1"}
        for row, counters, entity in zip(records([None, None]), ROWS, named, strict=True)
    ]


def test_a_token_an_open_object_and_open_columns_give_the_same_columns():
    by_columns, refused = both(flat())
    assert not refused and by_columns[0]["external.shop.tags"] == ["x", "y"]
    objects = [
        {name: value for name, value in row.items() if name.startswith(("counter.", "external."))} for row in flat()
    ]
    by_object, _ = both(records(objects, version="r-1"))
    by_token, refused = both(records(tokens()))
    assert repr(by_token) == repr(by_object) == repr(by_columns) and not refused
    assert by_token[1]["counter.item.impression"] == float(np.float32(9e9))


def test_an_ordinary_token_is_opened_by_the_compiled_decoder():
    declared = declared_types(PROJECT, KEY)["shown"]
    body = b"".join(msgpack.packb([10**6, row]) for row in records(tokens()))
    starts, zeros = entry_starts(as_bytes(body)), np.zeros(2, np.int64)
    found = decode(layout(declared), as_bytes(body), starts, ["p"], zeros, zeros, TAKEN_MS)
    assert len(found.left) == 0 and found.batch["counter.user.click"].to_pylist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("nonsense", UNREADABLE), ("", UNREADABLE), (tokens()[0][:-2], UNREADABLE), (tokens()[0] + "é", UNREADABLE),
        (7, UNREADABLE), ([1], UNREADABLE), (True, UNREADABLE), (b"\xff", UNREADABLE),
        (tokens(token_key(""))[0], WRONG_KEY), ("Ag" + tokens()[0][2:], TOO_NEW),
    ],
)  # fmt: skip
@pytest.mark.parametrize("unknown", ["drop", "keep", "refuse"])
def test_what_is_no_token_of_ours_is_refused_with_its_reason_beside_a_good_one(bad: Any, reason: str, unknown: Any):
    project = msgspec.structs.replace(PROJECT, impression=msgspec.structs.replace(PROJECT.impression, unknown=unknown))
    taken, refused = both(records([tokens()[0], bad, None]), project)
    assert refused == {1: reason}
    assert [row["event_id"] for row in taken] == ["e0", "e2"]
    assert taken[0]["counter.user.impression"] == 3.0 and taken[1]["counter.user.impression"] is None
    assert taken[0]["version"] == "r-1" and taken[1]["version"] is None
    assert taken[0].get("extra") is None, "it is no unknown field"


def test_values_that_no_column_takes_are_refused_though_the_seal_is_good():
    packed = [msgspec.msgpack.encode(["a", "no number", None, None, 7])]
    made = served_tokens(PROJECT, KEY)
    head, zeros = token_head(KEY, "r-1"), np.zeros((1, 1), np.float32)
    bad = [
        *json.loads(seal_tokens(made.layout, KEY, head, zeros, np.zeros((1, 4), np.float32), [packed])),
        *json.loads(seal_tokens(made.layout, KEY, head, zeros, np.full((1, 4), np.inf, np.float32), [packed])),
    ]
    taken, refused = both(records([*bad, *tokens()]))
    assert refused == {0: UNREADABLE, 1: UNREADABLE} and len(taken) == 2


def test_each_row_without_a_token_stays_as_it_came():
    rows = [*records(tokens()), *flat()]
    for n, row in enumerate(rows):
        row["event_id"] = f"e{n}"
    taken, refused = both(rows)
    assert not refused and len(taken) == 4
    names = [name for name in taken[0] if name.startswith(("counter", "external", "version"))]
    assert [[row[n] for n in names] for row in taken[:2]] == [[row[n] for n in names] for row in taken[2:]]
