"""Goal: a token says exactly what was put into it, and one that is damaged, forged or of another release says nothing.
Method: random layouts and values by hypothesis, against a plain reader of the format; published vectors of SipHash."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.contract.crawl import Crawl, Extract
from headrace.contract.formats.served_token import (
    COUNTER,
    REFUSALS,
    SEAL_BYTES,
    TOO_NEW,
    UNREADABLE,
    WRONG_KEY,
    TokenKey,
    token_head,
    token_key,
    token_layout,
)
from headrace.contract.spec import Counter
from headrace.kernels.served_tokens import open_tokens, seal_tokens
from headrace.kernels.siphash import siphash

COUNTERS = (
    Counter(name="user", key="user"),
    Counter(name="item", key="item", counts=("impression", "click", "sum:order.value", "last:order")),
)
CRAWLS = tuple(
    Crawl(name=name, kind="json", joins="item", key=Extract(at="id"), fields={"a": Extract(at="a")})
    for name in ("shop", "news")
)
LAYOUT, KEY = token_layout(("click", "order"), COUNTERS, CRAWLS), token_key("a secret of 16 bytes")
values = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.integers(0, 2**32).map(lambda n: float(np.float32(n))),
    st.sampled_from([0.0, -0.0, 1.0, 63.0, 64.0, 2.0**30, 2.0**31, 0.5]),
)
entities = st.lists(st.one_of(st.none(), st.text(max_size=200), st.integers(-(2**63), 2**63 - 1)), max_size=3)


def sealed(rows: list[tuple[list[float], list[float], list[Any]]], key: TokenKey = KEY, **head: Any) -> list[str]:
    packed = [[msgspec.msgpack.encode(row[2][x]) for row in rows] for x in range(len(CRAWLS))]
    scores_NT, values_NC = (np.array([row[i] for row in rows], np.float32) for i in (0, 1))
    told: list[str] = json.loads(
        seal_tokens(LAYOUT, key, token_head(key, "run-12", **head), scores_NT, values_NC, packed)
    )
    return told


def one(**head: Any) -> str:
    return sealed([([0.25, 0.5], [1.0, 2.5, 3.0, 4.0, 5.0, 1e9], [["x", 7], [None, 0]])], **head)[0]


def raw_of(token: str) -> bytes:
    return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))


def token_of(raw: bytes, key: TokenKey = KEY) -> str:
    """Seal bytes, whatever they are."""
    data = np.frombuffer(raw, np.uint8)
    seal = siphash(data, 0, len(data), np.uint64(key.low), np.uint64(key.high))
    return base64.urlsafe_b64encode(raw + int(seal).to_bytes(8, "little")).decode().rstrip("=")


def sections(raw: bytes) -> list[tuple[int, bytes]]:
    """Read the sections plainly, as the format's table says."""
    at, found = 5, []
    while at < len(raw) - SEAL_BYTES:
        kind, size, shift = raw[at], 0, 0
        at += 1
        while True:
            size |= (raw[at] & 127) << shift
            shift += 7
            at += 1
            if raw[at - 1] < 128:
                break
        found.append((kind, raw[at : at + size]))
        at += size
    return found


@pytest.mark.parametrize(
    ("size", "wanted"), [(0, 0x726FDB47DD0E0E31), (8, 0x93F5F5799A932462), (15, 0xA129CA6149BE45E5)]
)
def test_siphash_is_the_published_one(size: int, wanted: int) -> None:
    """The paper's appendix, and its authors' vectors."""
    data, key = np.arange(32, dtype=np.uint8), np.frombuffer(bytes(range(16)), np.uint64)
    assert int(siphash(data[1:], 0, 0, key[0], key[1])) == 0x726FDB47DD0E0E31
    assert int(siphash(data, 0, size, key[0], key[1])) == wanted


rows_of = st.lists(
    st.tuples(
        st.lists(values, min_size=2, max_size=2),
        st.lists(values, min_size=6, max_size=6),
        st.lists(entities, min_size=2, max_size=2).map(lambda both: [[b[0] if b else None, len(b)] for b in both]),
    ),
    min_size=1,
    max_size=5,
)


@given(rows_of)
def test_tokens_say_what_was_put_into_them(rows: list[Any]) -> None:
    tokens = sealed(rows)
    found = open_tokens(LAYOUT, KEY, pa.array([*tokens, None]))
    assert found.reasons == {} and found.is_open_N.tolist() == [True] * len(rows) + [False]
    wanted = np.array([row[1] for row in rows], np.float32)
    assert found.values_NC[:-1].tobytes() == wanted.tobytes(), "bit for bit, -0.0 too"
    assert found.scores_NT[:-1].tobytes() == np.array([row[0] for row in rows], np.float32).tobytes()
    assert found.version == ["run-12"] * len(rows) + [None] and found.has_NK[:-1].all()
    assert [list(each[:-1]) for each in found.entities] == [[row[2][x] for row in rows] for x in range(2)]
    assert np.isnan(found.propensity_N).all() and not any(found.arm)
    kinds = [kind for kind, _ in sections(raw_of(tokens[0]))]
    assert kinds == [1, 2, 2, 5, 5, 6, 6]


def test_propensity_and_arm_have_their_place() -> None:
    found = open_tokens(LAYOUT, KEY, pa.array([one(propensity=0.125, arm="B")]))
    assert found.arm == ["B"] and found.propensity_N.tolist() == [0.125] and found.reasons == {}


@given(st.data())
def test_what_is_damaged_anywhere_is_refused(data: st.DataObject) -> None:
    raw = bytearray(raw_of(one()))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    cut = one()[: data.draw(st.integers(0, len(one()) - 1))]
    tokens = [base64.urlsafe_b64encode(bytes(raw)).decode().rstrip("="), cut, one() + "A", "!" + one()[1:]]
    found = open_tokens(LAYOUT, KEY, pa.array(tokens))
    assert set(found.reasons) == {0, 1, 2, 3} and not found.is_open_N.any() and not found.has_NK.any()
    assert set(found.reasons.values()) <= set(REFUSALS)


@given(st.binary(max_size=60))
def test_sealed_nonsense_breaks_nothing(body: bytes) -> None:
    """Who has the key, or where there is none, anybody may seal whatever bytes."""
    found = open_tokens(LAYOUT, KEY, pa.array([token_of(bytes([1]) + KEY.number.to_bytes(4, "little") + body), one()]))
    assert set(found.reasons) <= {0} and found.is_open_N[1]


@given(st.text(max_size=80))
def test_any_text_is_opened_or_refused(text: str) -> None:
    found = open_tokens(LAYOUT, KEY, pa.array([text]))
    assert list(found.reasons) == [0]


def test_the_reason_tells_damage_from_another_key_and_from_a_later_release() -> None:
    later = bytes([2]) + raw_of(one())[1:]
    tokens = [one(), one(key=token_key("")), base64.urlsafe_b64encode(later).decode(), ""]
    found = open_tokens(LAYOUT, KEY, pa.array(tokens))
    assert found.reasons == {1: WRONG_KEY, 2: TOO_NEW, 3: UNREADABLE}


def test_a_reader_skips_what_it_does_not_know() -> None:
    """A section of a later release, and a counter that this project has not, or has with other entries."""
    raw = raw_of(one())[:-SEAL_BYTES]
    grown = raw + bytes([99, 3]) + b"new" + bytes([COUNTER, 6]) + b"\x01\x02\x03\x04\x02\x02"
    layout = token_layout(
        ("order",), (msgspec.structs.replace(COUNTERS[0], counts=("click",)), COUNTERS[1]), CRAWLS[1:]
    )
    found = open_tokens(layout, KEY, pa.array([token_of(grown)]))
    assert found.reasons == {} and found.has_NK.tolist() == [[False, True]]
    assert found.values_NC[0, 1:].tolist() == [3.0, 4.0, 5.0, 1e9] and found.scores_NT.tolist() == [[0.5]]
    assert found.entities == [[[None, 0]]]


def test_the_bytes_of_the_first_format_stay() -> None:
    """Golden: logs hold tokens for years."""
    assert one(key=token_key("")) == GOLDEN
    found = open_tokens(LAYOUT, token_key(""), pa.array([GOLDEN]))
    assert found.reasons == {} and found.values_NC.tolist() == [[1.0, 2.5, 3.0, 4.0, 5.0, 1e9]]


GOLDEN = (
    "AUXJSigBBnJ1bi0xMgIIIsUFdQAAgD4CCDlReX4AAAA_BQo0XhX8BAEAACBABQwfbN9_CAoMgqjWuQcGCHIQlLiSoXgHBgeIZ5IqksAAk7m9vZ09"
    "iXU"
)
