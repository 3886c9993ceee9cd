"""No value of a stranger raises, whichever door it comes through.

Goal: what is nested too deeply, too long or no UTF-8 costs its own event, or is refused with words; it never ends the
connection, whose shipper would send it again for ever. Method: one list of hostile values, each put into every place
of an event, through every decoder of outside bytes.
"""

from __future__ import annotations

import msgpack
import pytest

from headrace.contract.config import SourceConfig
from headrace.contract.interfaces.group import Claim, Fetched
from headrace.ingest.decode.message import encode_record, read_entries
from headrace.ingest.forward.protocol import Decoder, Refused, encode_ack, read_json
from headrace.ingest.http.body import BadRequest, messages_of, read_events
from headrace.ingest.sources import kafka_source

NAMES = ("a", "tag", "time", "event_id", "event_time_ms", "sent_at", "log", "@timestamp")
DEPTHS = (30, 490, 520, 940, 990, 1_010, 1_100, 100_000)


def _values() -> dict[str, bytes]:
    found = {
        "digits": b"9" * 5_000,
        "beyond_int": b"9" * 30,
        "beyond_float": b"1e999",
        "fraction": b"0." + b"1" * 100_000,
        "nan": b"NaN",
        "half_pair": b'"\\ud800"',
        "no_utf8": b'"\xff\xfe"',
        "long": b'"' + b"x" * 1_000_000 + b'"',
        "half_pair_name": b'{"\\ud800": 1}',
    }
    for depth in DEPTHS:
        found[f"lists_{depth}"] = b"[" * depth + b"1" + b"]" * depth
        found[f"maps_{depth}"] = b'{"a":' * depth + b"9" * 30 + b"}" * depth
    return found


VALUES = _values()


def _events(value: bytes) -> list[bytes]:
    return [b'{"tag": "t", "%s": %s}' % (name.encode(), value) for name in NAMES if name != "tag"] + [
        b'{"tag": %s}' % value
    ]


@pytest.mark.parametrize("name", VALUES)
def test_over_http(name: str) -> None:
    for event in _events(VALUES[name]):
        for content_type in ("application/json", "application/x-ndjson", "text/plain"):
            try:
                for message in messages_of(read_events(event, content_type, "", 1 << 24), "", 1_700_000_000_000):
                    assert len(message.entries) == 1
            except BadRequest as refused:
                assert refused.status == 400


@pytest.mark.parametrize("name", VALUES)
def test_from_kafka(name: str) -> None:
    for event in _events(VALUES[name]):
        for format_ in ("json", "gelf", "raw"):
            value = event.replace(b"{", b'{"version": "1.1", ', 1) if format_ == "gelf" else event
            source = SourceConfig(topic="t", tag="a", tag_field="tag", format=format_)  # type: ignore[arg-type]
            found = kafka_source.messages_of(source, [Fetched(Claim("t", 0, 1), 7, value, 5)])
            assert sum(1 if message.problem else len(message.entries) for message in found) == 1


@pytest.mark.parametrize("name", VALUES)
def test_as_a_forward_message_in_json_it_is_acked(name: str) -> None:
    for event in _events(VALUES[name]):
        for frame in (b'["t", [[1, %s]], {"chunk": "c"}]', b'["t", 1, %s, {"size": 1, "chunk": "c"}]'):
            message = read_json(frame % event)
            assert (message.tag, message.chunk) == ("t", "c")
            assert encode_ack(message) == b'{"ack":"c"}'
            if message.problem:
                assert message.raw == frame % event and not message.body
            else:
                (entry,) = message.entries
                assert encode_record(entry.record)


@pytest.mark.parametrize("depth", DEPTHS)
def test_as_an_entry_of_messagepack(depth: int) -> None:
    deep = b"\x92\x01\x81\xa1a" + b"\x91" * depth + b"\x01"
    good = msgpack.packb([1, {"a": 1}])
    found = list(read_entries(good + deep + good))
    assert [entry.record for entry in (found[0], found[2])] == [{"a": 1}] * 2
    assert (found[1].time_ns is None) == isinstance(found[1].record, bytes)
    assert all(encode_record(entry.record) for entry in found)


def test_what_is_behind_a_message_that_cannot_be_read_is_taken() -> None:
    # Python reads no number of more than 4,300 digits.
    digits = b"9" * 5_000
    good = b'["t", 1, {"a": 1}, {"chunk": "d"}]'
    found = [message for message, _ in Decoder(1 << 20).feed(b'["t", 1, {"a": %s}, {"chunk": "c"}]' % digits + good)]
    assert [(message.chunk, bool(message.problem)) for message in found] == [("c", True), ("d", False)]


@pytest.mark.parametrize("frame", [b"[1, 2]", b'["t"]', b'["t", "x"]', b"[[[", b'["\\ud800", ' + b"[" * 2_000])
def test_what_is_no_forward_message_is_refused(frame: bytes) -> None:
    with pytest.raises(Refused):
        read_json(frame)
