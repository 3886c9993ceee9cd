"""Messages that real fluent-bit and fluentd wrote to Kafka come back as the records that they were.

Goal: no value and no digit of a time is lost that the format holds. Method: the captures of `shared/wire`, held
against the corpus that went into the shippers; what a format cannot hold is written down beside its name.
"""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest

from headrace.contract.config import SourceConfig
from headrace.ingest.decode.message import message_of
from headrace.ingest.sources.foreign_formats import Foreign, read_foreign

FLB = {"topic": "t", "tag": "app.web.access"}
FD = {"topic": "t", "tag": "app.web.access", "time_field": "time"}

# Capture, source, longest distance of its time from the true one in ns, or None where Kafka's own time has to do.
CASES: list[tuple[str, dict[str, str], int | None]] = [
    ("flb-json-default", FLB, 500),
    ("flb-json-key", FLB, 500),
    ("flb-json-iso8601", {**FLB, "time_field": "time"}, 999),
    ("flb-msgpack", {**FLB, "format": "msgpack"}, 200),
    ("fd-json-default", FLB, None),
    ("fd-json-topicfield", FLB, None),
    ("fd-gzip", FLB, None),
    ("fd-msgpack", {**FLB, "format": "msgpack"}, None),
    ("fd-json-time", {"topic": "t", "tag_field": "tag", "time_field": "time"}, 0),
]


def captured(shared: Path, name: str) -> list[dict[str, Any]]:
    """Return the messages of a capture, values as bytes."""
    found = json.loads((shared / "wire" / f"kafka-{name}.json").read_text())["messages"]
    for message in found:
        value = message["value"]
        message["value"] = base64.b64decode(value["$b64"]) if isinstance(value, dict) else value.encode()
    return found


def corpus(shared: Path) -> list[tuple[int, Any]]:
    """Return (time in ns, record) of each record that the shippers were given."""
    found = json.loads((shared / "wire" / "corpus.expected.json").read_text())
    return [(item["sec"] * 1_000_000_000 + item["nsec"], item["record"]) for item in found]


def read_all(shared: Path, name: str, source: SourceConfig) -> list[tuple[Foreign, int]]:
    """Return every record of a capture with Kafka's time of its message."""
    return [
        (record, message["timestamp"][1])
        for message in captured(shared, name)
        for record in read_foreign(source, message["value"], message["timestamp"][1])
    ]


@pytest.mark.parametrize(("name", "settings", "off_ns"), CASES, ids=[case[0] for case in CASES])
def test_a_capture_comes_back_as_it_went_in(
    shared: Path, name: str, settings: dict[str, str], off_ns: int | None
) -> None:
    true = {json.dumps(record, sort_keys=True): time_ns for time_ns, record in corpus(shared)}
    found = read_all(shared, name, SourceConfig(**settings))  # type: ignore[arg-type]
    assert found
    if name not in ("fd-gzip", "fd-json-topicfield"):
        assert len(found) == len(true)
    for record, timestamp_ms in found:
        assert not record.problem and record.tag == "app.web.access"
        time_ns = true[json.dumps(record.record, sort_keys=True)]
        assert record.time_ns is not None
        if off_ns is None:
            assert record.time_ns == timestamp_ms * 1_000_000
        else:
            assert abs(record.time_ns - time_ns) <= off_ns


def test_microseconds_are_those_that_fluent_bit_wrote(shared: Path) -> None:
    found = read_all(shared, "flb-json-default", SourceConfig(**FLB))  # type: ignore[arg-type]
    assert found[0][0].time_ns == 1_772_368_496_123_457_000
    assert found[-1][0].time_ns == 1_000_000_002


def test_a_float64_of_msgpack_is_its_shortest_decimal(shared: Path) -> None:
    found = read_all(shared, "flb-msgpack", SourceConfig(topic="t", tag="a", format="msgpack"))
    assert [record.time_ns for record, _ in found[:2]] == [1_772_368_496_123_456_700, 1_772_368_496_000_000_000]


def test_gelf_loses_milliseconds_and_nothing_that_it_has(shared: Path) -> None:
    found = [r for r, _ in read_all(shared, "flb-gelf", SourceConfig(topic="t", tag="a", format="gelf"))]
    true = corpus(shared)[:5]
    assert [r.record["message"] for r in found] == [record["message"] for _, record in true]
    assert [r.time_ns for r in found] == [time_ns // 1_000_000 * 1_000_000 for time_ns, _ in true]
    assert found[0].record == {"message": "plain ascii line", "level": 6}
    assert found[4].record["k"] == true[4][1]["k"]


def test_raw_text_has_the_time_of_kafka(shared: Path) -> None:
    found = read_all(shared, "flb-raw", SourceConfig(topic="t", tag="a", format="raw", text_field="log"))
    assert [r.record for r, _ in found] == [{"log": record["message"]} for _, record in corpus(shared)[:5]]
    assert all(r.time_ns == at * 1_000_000 for r, at in found)


def test_otlp_json_holds_every_nanosecond(shared: Path) -> None:
    found = [r for r, _ in read_all(shared, "flb-otlpjson", SourceConfig(topic="t", tag="a", format="otlp_json"))]
    true = corpus(shared)
    assert [r.time_ns for r in found] == [time_ns for time_ns, _ in true]
    for record, (_, was) in zip(found, true, strict=True):
        # The shipper makes a record with `message` the body's text, and cuts that at a NUL.
        want = {"message": was["message"].split("\0")[0]} if "message" in was else was
        assert record.record == want


@pytest.mark.parametrize("name", ["fd-json-invalid-utf8", "flb-json-invalid-utf8"])
def test_bytes_that_are_no_utf8_travel_whole(shared: Path, name: str) -> None:
    source = SourceConfig(topic="t", tag="bad.utf8")
    written = {message["value"]: message for message in captured(shared, name)}
    for value, message in written.items():
        (record,) = read_foreign(source, value, message["timestamp"][1])
        assert not record.problem
        body = message_of(record.tag, [(record.time_ns, record.record)]).body
        text = record.record.get("message", record.record.get("log")).encode("utf-8", "surrogateescape")
        assert text in body and text in value


def test_metadata_of_fluent_bit_is_not_in_its_json(shared: Path) -> None:
    found = [r for r, _ in read_all(shared, "flb-json-metadata", SourceConfig(topic="t", tag="m.eta"))]
    assert [r.record for r in found] == [{"message": "m"}] * 2


@pytest.mark.parametrize(
    ("format_", "value"),
    [
        ("json", b""),
        ("json", b"{"),
        ("json", b"[1]"),
        ("json", b'{"a": 1} trailing'),
        ("json", b'{"a": NaN}'),
        ("json", b'{"@timestamp": "yesterday"}'),
        ("json", b'{"@timestamp": true}'),
        ("json", b'{"@timestamp": 1e300}'),
        ("json", b"[" * 100_000),
        ("msgpack", b""),
        ("msgpack", b"\xc1"),
        ("msgpack", b"\x01"),
        ("msgpack", b"\x81\xa1a"),
        ("msgpack", b"\x80\x80"),
        ("gelf", b"{}"),
        ("otlp_json", b"[]"),
        ("otlp_json", b'{"resourceLogs": 5}'),
        ("json", None),
    ],
)
def test_what_cannot_be_read_says_so_and_keeps_its_bytes(format_: str, value: bytes | None) -> None:
    (found,) = read_foreign(SourceConfig(topic="t", tag="a", format=format_), value, 5)  # type: ignore[arg-type]
    assert found.problem and found.record is None and found.raw == (value or b"")


@pytest.mark.parametrize(
    "value",
    [{"intValue": text} for text in ("nine", "12_5", "12.7", 12.7, "", " 1", "\u0663", True)]
    + [{"doubleValue": text} for text in ("1_0.5", "inf", "nan", "0x1p3", " 1", False)],
    ids=str,
)
def test_a_bad_log_record_does_not_stop_its_neighbours(value: dict[str, Any]) -> None:
    good = {"timeUnixNano": "7", "body": {"stringValue": "x"}}
    bad = {"timeUnixNano": "9", "body": value}
    value = json.dumps({"resourceLogs": [{"scopeLogs": [{"logRecords": [good, bad, good]}]}]}).encode()
    found = read_foreign(SourceConfig(topic="t", tag="a", format="otlp_json"), value, 5)
    assert [(r.time_ns, bool(r.problem)) for r in found] == [(7, False), (None, True), (7, False)]
    assert json.loads(found[1].raw) == bad


@pytest.mark.parametrize(
    ("unit", "text", "time_ns"),
    [
        ("s", "1772368496.123456789", 1_772_368_496_123_456_789),
        ("s", '"1772368496.123456789"', 1_772_368_496_123_456_789),
        ("s", "1772368496", 1_772_368_496_000_000_000),
        ("ms", "1772368496123", 1_772_368_496_123_000_000),
        ("us", "1772368496123456.5", 1_772_368_496_123_456_500),
        ("ns", "1772368496123456789", 1_772_368_496_123_456_789),
        ("s", '"2026-03-01T12:34:56.123456789Z"', 1_772_368_496_123_456_789),
        ("s", '"2026-03-01T12:34:56,5+0530"', 1_772_348_696_500_000_000),
        ("s", '"2026-03-01 12:34:56"', 1_772_368_496_000_000_000),
        ("s", "0.0", 0),
    ],
)
def test_times_in_every_unit_to_the_last_digit(unit: str, text: str, time_ns: int) -> None:
    source = SourceConfig(topic="t", tag="a", time_unit=unit)  # type: ignore[arg-type]
    value = f'{{"@timestamp": {text}, "a": 0.1}}'.encode()
    assert read_foreign(source, value, 5) == [Foreign("a", time_ns, {"a": 0.1})]


def test_the_tag_comes_from_its_field_else_from_the_source() -> None:
    both = SourceConfig(topic="t", tag="else", tag_field="tag")
    assert read_foreign(both, b'{"tag": "shop.click", "a": 1}', 1)[0] == Foreign("shop.click", 1_000_000, {"a": 1})
    assert read_foreign(both, b'{"tag": 5}', 1)[0] == Foreign("else", 1_000_000, {"tag": 5})
    only = SourceConfig(topic="t", tag_field="tag", format="msgpack")
    (found,) = read_foreign(only, msgpack.packb({"a": 1}), 1)
    assert "holds no tag" in found.problem and found.raw == msgpack.packb({"a": 1})


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('{"kvlistValue":{"values":[{"key":"a","value":' * 5_000 + "{}" + "}]}}" * 5_000, "more than 100 levels"),
        ('{"arrayValue":{"values":[' * 101 + "{}" + "]}}" * 101, "more than 100 levels"),
        ('{"stringValue":5,"intValue":6}', "a value is a map of one kind"),
    ],
    ids=["beyond the reader of JSON", "one level", "of two kinds"],
)
def test_a_log_record_that_is_too_deep_is_one_dead_letter_with_its_own_bytes(body: str, problem: str) -> None:
    good, bad = '{"timeUnixNano":"7","body":{"stringValue":"],[{"}}', f'{{ "body":{body} }}'
    text = f'{{"resourceLogs": [{{"scopeLogs": [{{"logRecords": [{good}, {bad} , {good}]}}]}}]}}'
    found = read_foreign(SourceConfig(topic="t", tag="a", format="otlp_json"), text.encode(), 5)
    assert [(r.time_ns, r.record) for r in found] == [(7, {"message": "],[{"}), (None, None), (7, {"message": "],[{"})]
    assert problem in found[1].problem and found[1].raw == bad.encode()


def test_a_value_of_a_log_record_may_be_100_deep() -> None:
    """However deep the calls are that lead here, and with each version of Python."""
    body = '{"arrayValue":{"values":[' * 99 + '{"intValue":"7"}' + "]}}" * 99
    text = f'{{"resourceLogs": [{{"scopeLogs": [{{"logRecords": [{{"body":{body}}}]}}]}}]}}'
    (found,) = read_foreign(SourceConfig(topic="t", tag="a", format="otlp_json"), text.encode(), 5)
    assert found.record == {"message": json.loads("[" * 99 + "7" + "]" * 99)}


def test_many_bad_log_records_cost_what_they_hold() -> None:
    """Their bytes are found once a message, not once a record: this would take a minute."""
    bad = ",".join(['{"body":{"intValue":"x"}}'] * 20_000)
    text = f'{{"resourceLogs":[{{"scopeLogs":[{{"logRecords":[{bad}]}}]}}]}}'
    began = time.process_time()
    found = read_foreign(SourceConfig(topic="t", tag="a", format="otlp_json"), text.encode(), 5)
    assert {one.raw for one in found} == {b'{"body":{"intValue":"x"}}'} and len(found) == 20_000
    assert time.process_time() - began < 5


def test_numbers_of_otlp_may_be_written_as_floats_that_are_whole() -> None:
    text = '{"timeUnixNano":1.772368496e18,"body":{"intValue":5.0}}'
    text = f'{{"resourceLogs":[{{"scopeLogs":[{{"logRecords":[{text}]}}]}}]}}'
    (found,) = read_foreign(SourceConfig(topic="t", tag="a", format="otlp_json"), text.encode(), 5)
    assert (found.time_ns, found.record) == (1_772_368_496_000_000_000, {"message": 5})


@pytest.mark.parametrize("body", ["", ',"body":null', ',"body":{}'], ids=["none", "null", "unset"])
def test_a_log_record_without_a_body_has_its_attributes_alone(body: str) -> None:
    """An empty text field would be an unknown one, and cost the event where the type refuses those."""
    attributes = '[{"key":"a","value":{"intValue":"1"}},{"key":"b","value":{}}]'
    text = f'{{"timeUnixNano":"7","attributes":{attributes}{body}}}'
    text = f'{{"resourceLogs":[{{"scopeLogs":[{{"logRecords":[{text}]}}]}}]}}'
    (found,) = read_foreign(SourceConfig(topic="t", tag="a", format="otlp_json"), text.encode(), 5)
    assert (found.problem, found.record) == ("", {"a": 1, "b": None})


def test_a_string_that_never_ends_behind_a_deep_value_takes_no_time() -> None:
    source = SourceConfig(**{**FLB, "format": "otlp_json"})
    value = b'{"resourceLogs":' + b"[" * 2_000 + b'"' + b'\\"' * 300_000
    began_s = time.process_time()
    read_foreign(source, value, 0)
    assert time.process_time() - began_s < 5


def test_attributes_of_resource_and_scope_are_no_fields() -> None:
    source = SourceConfig(**{**FLB, "format": "otlp_json"})
    attributes = [{"key": "service.name", "value": {"stringValue": "web"}}]
    record = {"attributes": [{"key": "user_id", "value": {"intValue": "7"}}]}
    scope = {"scope": {"name": "s", "attributes": attributes}, "logRecords": [record]}
    message = {"resourceLogs": [{"resource": {"attributes": attributes}, "scopeLogs": [scope]}]}
    (found,) = read_foreign(source, json.dumps(message).encode(), 1)
    assert found.record == {"user_id": 7}
