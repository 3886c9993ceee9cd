"""Goal: no body, of whatever bytes or values, makes anything but messages or a refusal with the next step, and what is
read is what was sent. Method: hypothesis on the pure reader; bytes, JSON and MessagePack values, every content type."""

from __future__ import annotations

import gzip
import json
from typing import Any

import msgpack
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.ingest.http.body import BadRequest, messages_of, read_events

TYPES = ("application/json", "application/x-ndjson", "application/msgpack", "text/plain", "")
NOW_MS, BYTES_MAX = 1_700_000_000_000, 1 << 16

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
records = st.dictionaries(st.text().filter(lambda name: name not in ("tag", "time")), values, max_size=5)
tags = st.text(min_size=1, max_size=20)


def read(body: bytes, kind: str, encoding: str = "") -> list[tuple[str, Any, int | None]]:
    """Return (tag, record, time in ns) of every event."""
    messages = messages_of(read_events(body, kind, encoding, BYTES_MAX), "", NOW_MS)
    return [(message.tag, entry.record, entry.time_ns) for message in messages for entry in message.entries]


@given(st.binary(max_size=300), st.sampled_from(TYPES), st.sampled_from(("", "gzip")))
@example(b"[[[[", "", "")
@example(b'{"tag": "\\ud800"}', "application/json", "")
@example(b'{"tag": "a", "time": 1e999}', "application/json", "")
@example(b'{"tag": "a", "event_time_ms": 9007199254740993}', "application/json", "")
@example(msgpack.packb({"tag": "a", "time": msgpack.Timestamp(-5, 0)}), "application/msgpack", "")
@example(msgpack.packb({b"\xff": 1, "tag": "a", 5: msgpack.ExtType(3, b"x")}), "application/msgpack", "")
def test_no_bytes_do_anything_but_be_read_or_refused(body: bytes, kind: str, encoding: str) -> None:
    try:
        read(body, kind, encoding)
    except BadRequest as refusal:
        assert refusal.status in (400, 413, 415)
        assert refusal.error
        assert refusal.step


@given(st.lists(st.tuples(tags, records), max_size=6), st.sampled_from(TYPES), st.booleans())
def test_what_is_read_is_what_was_sent(sent: list[tuple[str, dict[str, Any]]], kind: str, packed: bool) -> None:
    events = [{**record, "tag": tag, "time": 5} for tag, record in sent if set(record) != {"record"}]
    if kind == "application/msgpack":
        body = msgpack.packb(events)
    elif kind == "application/x-ndjson":
        body = b"\n".join(json.dumps(one).encode() for one in events)
    else:
        body = json.dumps(events, ensure_ascii=False).encode()
    found = read(gzip.compress(body), kind, "gzip") if packed else read(body, kind)
    order = list(dict.fromkeys(event["tag"] for event in events))
    expected = sorted(events, key=lambda event: order.index(event["tag"]))
    plain = [{name: value for name, value in event.items() if name not in ("tag", "time")} for event in expected]
    assert [(tag, record) for tag, record, _ in found] == [(e["tag"], r) for e, r in zip(expected, plain, strict=True)]
    assert {time_ns for _, _, time_ns in found} <= {5_000_000_000}


@given(
    st.recursive(st.just([]), lambda inner: st.lists(inner, min_size=1, max_size=1), max_leaves=2),
    st.integers(1, 3_000),
)
@settings(max_examples=30)
def test_nesting_of_any_depth_is_read_or_refused(core: list[Any], depth: int) -> None:
    body = b'{"tag": "a", "b": ' + b"[" * depth + json.dumps(core).encode() + b"]" * depth + b"}"
    for kind in ("application/json", "text/plain"):
        try:
            assert len(read(body, kind)) == 1
        except BadRequest as refusal:
            assert refusal.status == 400
