"""Whatever lies in a foreign topic or an access log: it is read, refused with a reason or skipped, and never raises.

Goal: no bytes of a stranger end a gateway, and none vanish. Method: hypothesis over bytes, records and lines.
"""

from __future__ import annotations

import json
from typing import Any

import msgpack
import pytest
from access_log_world import ITEM, LOG, project
from hypothesis import given
from hypothesis import strategies as st
from ingest_world import PROJECT

from headrace.contract.config import SourceConfig
from headrace.contract.interfaces.group import Claim, Fetched
from headrace.contract.mapping import AccessLog
from headrace.ingest.decode.message import message_of
from headrace.ingest.sources.access_log import compile_format, plain_text
from headrace.ingest.sources.access_log_events import Mapper
from headrace.ingest.sources.foreign_formats import read_foreign
from headrace.ingest.sources.kafka_source import messages_of

FORMATS = ("json", "msgpack", "gelf", "raw", "otlp_json")
KEYS = st.sampled_from(
    ["@timestamp", "tag", "event_id", "log", "message", "request", "method", "path", "status", "msec"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
RECORDS = st.dictionaries(KEYS | st.text(max_size=5), VALUES, max_size=5)
ANY: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from(
        [{}, [], None, "x", 5, {"key": "a"}, {"value": {"intValue": "1"}}, {"key": "k", "value": {"intValue": []}}]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "resourceLogs",
                    "scopeLogs",
                    "logRecords",
                    "body",
                    "attributes",
                    "kvlistValue",
                    "arrayValue",
                    "values",
                    "key",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
)


def events(source: SourceConfig, value: bytes | None) -> int:
    """Return how many entries and refusals a message becomes."""
    found = messages_of(source, [Fetched(Claim("t", 0, 1), 7, value, 5)])
    return sum(1 if message.problem else len(message.entries) for message in found)


@pytest.mark.parametrize("format_", FORMATS)
@given(value=st.binary(max_size=200))
def test_any_bytes_become_one_event_or_one_refusal(format_: str, value: bytes) -> None:
    source = SourceConfig(topic="t", tag="a", tag_field="tag", format=format_)  # type: ignore[arg-type]
    assert events(source, value) == 1


@given(record=RECORDS | VALUES, format_=st.sampled_from(["json", "msgpack", "gelf", "otlp_json"]))
def test_any_value_becomes_one_event_or_one_refusal(record: Any, format_: str) -> None:
    source = SourceConfig(topic="t", tag="a", tag_field="tag", format=format_)  # type: ignore[arg-type]
    try:
        value = msgpack.packb(record) if format_ == "msgpack" else json.dumps(record).encode()
    except OverflowError:
        return
    assert events(source, value) == 1


@given(value=ANY)
def test_any_shape_of_otlp_is_read_or_refused(value: Any) -> None:
    for found in read_foreign(SourceConfig(topic="t", tag="a", format="otlp_json"), json.dumps(value).encode(), 5):
        assert bool(found.problem) != (found.record is not None)


def test_half_a_surrogate_pair_is_refused_with_its_bytes() -> None:
    value = b'{"a": "\\ud800"}'
    (message,) = messages_of(SourceConfig(topic="t", tag="a"), [Fetched(Claim("t", 0, 1), 7, value, 5)])
    assert message.problem and message.raw == value


MAPPERS = [Mapper(LOG, project()), Mapper(AccessLog(tag="n", format="json", routes=(ITEM,)), PROJECT)]


@given(record=RECORDS, at=st.integers(0, 1))
def test_any_record_is_mapped_refused_or_skipped(record: dict[str, Any], at: int) -> None:
    try:
        message = message_of("nginx.access", [(1, record)])
    except ValueError:
        return
    mapped = MAPPERS[at].map_message(message)
    assert sum(len(part.entries) for part in mapped.messages) + mapped.skipped == 1


@given(line=st.text(max_size=200) | st.binary(max_size=200).map(lambda b: b.decode("utf-8", "surrogateescape")))
def test_any_line_is_mapped_refused_or_skipped(line: str) -> None:
    combined = f'::1 - - [25/Nov/2026:00:31:35 +0000] "{line}" 200 5 "-" "-"'
    for text in (line, combined):
        for mapper in MAPPERS:
            try:
                message = message_of("nginx.access", [(1, {"log": text})])
            except ValueError:
                continue
            mapped = mapper.map_message(message)
            assert sum(len(part.entries) for part in mapped.messages) + mapped.skipped == 1


@given(value=st.binary(max_size=60))
def test_what_nginx_and_apache_escape_comes_back(value: bytes) -> None:
    nginx = "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02X}" for b in value)
    letters = {8: "b", 9: "t", 10: "n", 11: "v", 12: "f", 13: "r", 34: '"', 92: "\\"}
    apache = "".join(f"\\{letters[b]}" if b in letters else chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in value)
    try:
        true = value.decode("utf-8")
    except UnicodeDecodeError:
        true = value.decode("latin-1")
    assert plain_text(nginx) == plain_text(apache) == true
    line = f'::1 - - [25/Nov/2026:00:31:35 +0000] "GET / HTTP/1.1" 200 5 "{nginx}" "{apache}"'
    found = compile_format("combined").read(line)
    assert found is not None
    assert (found["http_referer"], found["http_user_agent"]) == ((true, true) if true != "-" else (None, None))
