"""Goal: bytes mean the same however they are cut, and no bytes do harm. Method: hypothesis writes messages in every
mode, cuts them anywhere, mutates them."""

from __future__ import annotations

import gzip
import struct
import zlib
from random import Random
from typing import Any

import msgpack
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingest_world import PROJECT, Counts, HandClock, dependencies

from headrace.backends.log.memory import MemoryLog
from headrace.contract.formats.topics import Topics
from headrace.ingest.decode.compression import BodyTooLarge, decompress
from headrace.ingest.decode.message import Message, chunk_text
from headrace.ingest.forward.protocol import Decoder, Ping, Refused, encode_ack
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.gateway import Gateway

BOUND = 100_000

keys = st.text(max_size=6)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=12)
    | st.binary(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
records = st.dictionaries(keys, values, max_size=5)
event_times = st.tuples(st.integers(0, 2**32 - 3), st.integers(0, 10**9 - 1))
times = st.one_of(
    event_times.map(lambda t: (msgpack.ExtType(0, struct.pack(">II", *t)), t[0] * 10**9 + t[1])),
    st.integers(0, 2**31).map(lambda t: (t, t * 10**9)),
    st.integers(0, 2**31).map(lambda t: (float(t) + 0.5, t * 10**9 + 500_000_000)),
)
entries = st.lists(st.tuples(times, records, st.booleans()), max_size=4)


def _member(data: bytes, how: str) -> bytes:
    return gzip.compress(data) if how == "gzip" else bytes(pa.compress(data, codec="zstd", asbytes=True))


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, tuple[str, Any, list[tuple[int, Any]]]]:
    """Return a message's bytes and what they mean: tag, chunk, (time, record) pairs."""
    tag, chunk = draw(st.text(max_size=8)), draw(st.none() | st.text(max_size=8) | st.binary(max_size=8))
    option: dict[str, Any] = {} if chunk is None else {"chunk": chunk, "unknown": 1}
    mode = draw(st.sampled_from(["message", "forward", "packed", "gzip", "zstd"]))
    items = draw(entries)
    if mode == "message":
        (wire, time_ns), record, _ = items[0] if items else ((1, 10**9), {}, False)
        meaning = [(time_ns, record)]
        value: list[Any] = [tag, wire, record]
    else:
        meaning = [(time_ns, record) for (_, time_ns), record, _ in items]
        listed = [[[wire, {"m": 1}] if meta else wire, record] for (wire, _), record, meta in items]
        parts = [msgpack.packb(item) for item in listed]
        if mode in ("gzip", "zstd"):
            option["compressed"] = mode
            cut = draw(st.integers(0, len(parts)))
            value = [tag, b"".join(_member(b"".join(p), mode) for p in (parts[:cut], parts[cut:]) if p)]
        else:
            value = [tag, listed if mode == "forward" else b"".join(parts)]
    return msgpack.packb(value + ([option] if option or draw(st.booleans()) else [])), (tag, chunk, meaning)


def _meaning(message: Message | Ping) -> tuple[str, Any, list[tuple[int | None, Any]]]:
    assert isinstance(message, Message)
    assert message.problem == ""
    return message.tag, message.chunk, [(e.time_ns, e.record) for e in message.entries]


@given(st.lists(messages(), max_size=4), st.data())
def test_any_cut_means_the_same(sent: list[tuple[bytes, Any]], data: st.DataObject) -> None:
    stream = b"".join(wire for wire, _ in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    decoder, got = Decoder(BOUND), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got.extend(_meaning(message) for message, _ in decoder.feed(stream[start:end]))
    assert got == [meaning for _, meaning in sent]
    assert decoder.pending_bytes == 0


@given(messages(), st.integers(0, 400), st.binary(max_size=6))
def test_mutated_bytes_never_crash_and_never_hold_more_than_the_bound(
    sent: tuple[bytes, Any], at: int, junk: bytes
) -> None:
    wire = sent[0]
    at = min(at, len(wire))
    decoder, log = Decoder(BOUND), MemoryLog()
    log.admin().ensure_topics(Topics().specs(4))
    clock = HandClock()
    gateway = Gateway(dependencies(log.producer(), Counts(), clock), "g")
    offered, acked = 0, []
    try:
        for message, size in decoder.feed(wire[:at] + junk + wire[at + len(junk) :] + wire):
            assert isinstance(message, Message)
            offered += 1
            gateway.offer(message, size, Peer("a"), lambda _outcome: acked.append(1))
    except Refused as refused:
        assert refused.reason in ("bad_frame", "too_large")
    for _ in range(8):
        clock.ms += 10
        gateway.tick()
    assert len(acked) == offered, "whatever was understood has an outcome"
    assert gateway.buffer_bytes == 0
    assert decoder.pending_bytes <= BOUND


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(
                [
                    *PROJECT.impression.fields,
                    "request_id",
                    "event_id",
                    "place",
                    "event_time_ms",
                    "version",
                    "counter.user.click",
                ]
            ),
            values,
            max_size=9,
        ),
        max_size=6,
    )
)
def test_any_record_is_appended_or_a_dead_letter(sent: list[dict[str, Any]]) -> None:
    log, clock = MemoryLog(), HandClock()
    log.admin().ensure_topics(Topics().specs(4))
    gateway = Gateway(dependencies(log.producer(), Counts(), clock), "g")
    wire = msgpack.packb(["shop.impression", [[1, record] for record in sent], {"chunk": "c"}])
    acked: list[int] = []
    for message, size in Decoder(BOUND).feed(wire):
        assert isinstance(message, Message)
        gateway.offer(message, size, Peer("a"), lambda _outcome: acked.append(1))
    for _ in range(8):
        clock.ms += 10
        gateway.tick()
    assert acked == [1]
    counts = gateway.counts
    assert counts["read"] == len(sent) == counts["appended"] + counts["dead_lettered"] + counts["repeated"]


@given(st.text(max_size=20) | st.binary(max_size=20))
def test_acks_echo_type_and_bytes(chunk: str | bytes) -> None:
    assert msgpack.unpackb(encode_ack(Message("t", b"", chunk))) == {"ack": chunk}
    assert chunk_text(chunk).encode().decode() == chunk_text(chunk)


def test_text_that_is_not_utf8_is_echoed_to_the_byte() -> None:
    ((message, _),) = Decoder(BOUND).feed(b"\x93\xa1t\x90\x81\xa5chunk\xa3\xff\xfe\n")
    assert isinstance(message, Message)
    assert message.chunk is not None
    assert encode_ack(message) == b"\x81\xa3ack\xa3\xff\xfe\n"


@pytest.mark.parametrize("how", ["gzip", "zstd"])
def test_a_bomb_is_refused_at_the_bound(how: str) -> None:
    bomb = _member(bytes(50_000_000), how)
    with pytest.raises(BodyTooLarge, match="decompresses to more"):
        decompress(bomb, how, 1_000_000)
    with pytest.raises((ValueError, OSError)):
        decompress(bomb[: len(bomb) // 2], how, 100_000_000)
    assert decompress(_member(b"a", how) + _member(b"b", how), how, 10) == b"ab"


@pytest.mark.parametrize("size", [0, 1, 1_023, 1_024, 1_025, 262_144, 3_000_000])
def test_gzip_members_of_every_size_are_read_with_padding_between(size: int) -> None:
    plain = Random(size).randbytes(size)
    packed = _member(plain, "gzip") + bytes(2_000) + _member(b"b" * size, "gzip") + b"\0"
    assert decompress(packed, "gzip", 10_000_000) == plain + b"b" * size
    with pytest.raises((ValueError, OSError, zlib.error)):
        decompress(packed[:-9], "gzip", 10_000_000)


def test_many_small_gzip_members_are_read_in_one_go() -> None:
    """Each costs what it holds: copying all that is behind it would take minutes here."""
    assert decompress(_member(b"a", "gzip") * 100_000, "gzip", 200_000) == b"a" * 100_000
