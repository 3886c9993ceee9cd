"""Goal: the compiled decoder says what the plain one says, row by row, or leaves the row to it. Method: hypothesis
writes records that are nearly as declared, and the two are held against each other; XXH64 against its library."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingest_world import PROJECT, START_MS

from headrace.contract.project import FeedbackType, ImpressionType, Project
from headrace.contract.spec import FeatureSpec
from headrace.ingest.decode.fluent_chunk import decode, layout
from headrace.ingest.decode.message import read_entries
from headrace.ingest.decode.msgpack_scan import as_bytes, entry_starts
from headrace.ingest.decode.validate import check, declared_types

WIDE = Project(
    impression=ImpressionType(
        tag="wide.impression",
        key="user_id",
        fields={"user_id": "string", "item_id": "list[int64]", "title": "list[string]", "extra": "string"},
        unknown="keep",
        private={"user_id": "hash", "price": "drop"},
    ),
    feedback=(FeedbackType(name="click", tag="wide.click", fields={"title": "string"}, private={"title": "hash"}),),
    tasks=(),
    features=FeatureSpec(),
)
TYPES = declared_types(PROJECT) | declared_types(WIDE)
SKEW_MS = 60_000
PAST_MS = 946_684_800_000
TAKEN_MS = range(PAST_MS, START_MS + SKEW_MS + 1)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("item_id", [1], "'item_id' is declared int64"),
        ("price", "x", "'price' is declared float64"),
        ("title", 5, "'title' is declared string"),
    ],
)
def test_a_detail_names_types_as_projects_declare_them(field: str, value: Any, told: str) -> None:
    """Arrow calls them otherwise: double."""
    record = {"request_id": "r", "user_id": 1, field: value}
    checked = check(TYPES["shop.impression"], [record], [START_MS * 10**6], ["id"], taken_ms=TAKEN_MS)
    ((reason, detail),) = checked.rejected.values()
    assert reason == "bad_type" and told in detail


def test_lists_are_named_as_projects_declare_them() -> None:
    record = {"request_id": "r", "user_id": "1", "title": "x"}
    checked = check(TYPES["wide.impression"], [record], [START_MS * 10**6], ["id"], taken_ms=TAKEN_MS)
    assert "'title' is declared list[string]" in checked.rejected[0][1]


texts = st.text(max_size=6) | st.sampled_from(["", "é" * 3, "a" * 513, "日本", "\udcff"])
numbers = st.integers(-(2**63), 2**64 - 1) | st.integers(-200, 200) | st.sampled_from([2**31 - 1, 2**31, 2**53 + 1])
reals = st.floats(width=64) | st.floats(width=32) | st.sampled_from([3.0, -0.0, 1e300, float(2**53), 3.5e38])
anything = st.none() | st.booleans() | numbers | reals | texts | st.binary(max_size=4) | st.lists(numbers, max_size=2)
good: dict[str, st.SearchStrategy[Any]] = {
    "event_id": st.text(min_size=1, max_size=5),
    "request_id": st.text(min_size=1, max_size=5) | st.integers(0, 9),
    "user_id": st.integers(-(2**63), 2**63 - 1),
    "item_id": st.integers(-5, 5),
    "place": st.integers(0, 100),
    "event_time_ms": st.integers(START_MS - 10**9, START_MS + SKEW_MS),
    "price": st.floats(allow_nan=False, allow_infinity=False),
    "title": st.text(max_size=4),
    "new": st.booleans(),
    "counter.user.click": st.floats(0, 100, width=32),
    "version": st.text(max_size=3),
    "other": numbers,
}
records = st.dictionaries(st.sampled_from(sorted(good)), st.none()).flatmap(
    lambda names: st.fixed_dictionaries({n: st.one_of(good[n], good[n], good[n], anything) for n in names})
)
required = st.fixed_dictionaries({"request_id": good["request_id"], "user_id": good["user_id"]})
pairs = st.tuples(required, records).map(lambda both: both[0] | both[1])
event_times = (
    st.integers(0, START_MS // 1000)
    | st.integers(PAST_MS // 1000, START_MS // 1000)
    | st.just(msgpack.ExtType(0, bytes([0, 0, 9, 9, 0, 0, 0, 7])))
)
times = event_times | event_times.map(lambda t: [t, {"meta": [1]}]) | st.sampled_from([1.5, None, 10**12, -3])


def _packed(entries: list[Any]) -> bytes:
    return b"".join(msgpack.packb(entry, unicode_errors="surrogateescape") for entry in entries)


@given(st.lists(st.tuples(times, pairs).map(list), max_size=6), st.sampled_from(sorted(TYPES)))
def test_a_compiled_row_equals_the_plain_one(entries: list[Any], tag: str) -> None:
    body = _packed(entries)
    starts = entry_starts(as_bytes(body))
    rows = np.arange(len(starts))
    made = layout(TYPES[tag])
    found = decode(made, as_bytes(body), starts, ["p"], np.zeros(len(starts), np.int64), rows, TAKEN_MS)
    plain = list(read_entries(body))
    checked = check(
        TYPES[tag],
        [entry.record for entry in plain],
        [entry.time_ns for entry in plain],
        [f"p/{i}" for i in rows],
        taken_ms=TAKEN_MS,
    )
    found.batch.validate(full=True)
    taken = sorted(set(range(len(entries))) - set(found.left.tolist()))
    assert set(taken) <= set(checked.rows), "the compiled decoder took a row that is refused"
    by_row = dict(zip(checked.rows, checked.batch.to_pylist(), strict=True))
    # repr, so that -0.0 and 0.0 differ.
    assert [repr(found.batch.slice(row, 1).to_pylist()[0]) for row in taken] == [repr(by_row[row]) for row in taken]


@given(st.lists(st.fixed_dictionaries({n: good[n] for n in good if n != "other"}), min_size=1, max_size=5))
def test_an_ordinary_row_is_not_left(rows: list[dict[str, Any]]) -> None:
    body = _packed([[1, row] for row in rows])
    starts = entry_starts(as_bytes(body))
    made = layout(TYPES["shop.impression"])
    zeros = np.zeros(len(rows), np.int64)
    assert len(decode(made, as_bytes(body), starts, ["p"], zeros, zeros, range(START_MS + SKEW_MS + 1)).left) == 0
