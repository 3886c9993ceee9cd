"""Goal: the shippers' configuration in deploy/ is whole and fits the gateway. Method: what can be read of it without
shippers, which are not here: sections close, keys are told apart from values, and the gateway's side, which stands in
their comments, is decoded by the gateway's own reader."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from headrace.contract.config import decode_config

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
FLUENTD = sorted((DEPLOY / "fluentd").glob("*.conf"))
FLUENT_BIT = sorted((DEPLOY / "fluent-bit").glob("*.conf"))


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def test_both_have_all_four() -> None:
    assert {p.name for p in FLUENTD} == {"fluent.conf", "tls.conf", "access-log.conf", "kafka.conf"}
    assert {p.name for p in FLUENT_BIT} == {"fluent-bit.conf", "tls.conf", "access-log.conf", "kafka.conf"}


@pytest.mark.parametrize("path", FLUENTD, ids=_name)
def test_fluentd_sections_close_and_keep_what_is_not_acked(path: Path) -> None:
    open_sections: list[str] = []
    for line in path.read_text().splitlines():
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        if closed := re.fullmatch(r"</(\w+)>", words):
            assert open_sections.pop() == closed[1], line
        elif opened := re.fullmatch(r"<(\w+)( [^<>]+)?>", words):
            open_sections.append(opened[1])
        else:
            assert re.fullmatch(r"@?\w+ \S.*", words), line
            assert len(line) - len(line.lstrip()) == 2 * len(open_sections), line
    assert open_sections == []
    text = path.read_text()
    kept = ("@type file", "retry_forever true", "overflow_action block", "flush_mode interval", "flush_interval 100ms")
    for line in (*kept, "required_acks -1" if path.name == "kafka.conf" else "require_ack_response true"):
        assert re.search(rf"^\s*{re.escape(line)}$", text, re.M), line


@pytest.mark.parametrize("path", FLUENT_BIT, ids=_name)
def test_fluent_bit_keys_have_values_and_keep_what_is_not_acked(path: Path) -> None:
    for line in path.read_text().splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            assert re.fullmatch(r"\[(SERVICE|INPUT|OUTPUT)\]|    [a-z_.]+ +\S.*", line), line
    settings = re.findall(r"^    ([a-z_.]+) +(\S+)", path.read_text(), re.M)
    told = {("storage.type", "filesystem"), ("retry_limit", "no_limits"), ("flush", "0.1")}
    told |= {("rdkafka.request.required.acks", "-1") if path.name == "kafka.conf" else ("require_ack_response", "true")}
    assert told <= set(settings)


@pytest.mark.parametrize("path", [*FLUENTD, *FLUENT_BIT], ids=_name)
def test_every_variable_is_told_at_the_top_and_no_secret_is_written(path: Path) -> None:
    text = path.read_text()
    head = text[: re.search(r"^[^#\n]", text, re.M).start()]  # type: ignore[union-attr]
    used = set(re.findall(r"ENV\['(\w+)'\]|\$\{(\w+)\}", text))
    for name in {a or b for a, b in used} - {"HEADRACE_SHIPPER_BUFFER", "HEADRACE_FORWARD_PORT", "HEADRACE_BROKERS"}:
        assert name in head, name
    for key in ("shared_key", "password"):
        for value in re.findall(rf"^\s*{key} +(\S.*)$", text, re.M):
            assert "HEADRACE_" in value, value


@pytest.mark.parametrize("path", [DEPLOY / "fluentd/kafka.conf", DEPLOY / "fluent-bit/kafka.conf"], ids=_name)
def test_the_gateways_side_of_a_kafka_topic_is_as_the_gateway_reads_it(path: Path) -> None:
    text = path.read_text()
    lines = re.findall(r"^#   (\[\[.*|\w+ = .*)$", text, re.M)
    (source,) = decode_config("\n".join(lines).encode()).ingest.sources
    assert re.search(rf"^\s*topics? +{source.topic}$", text, re.M)
    if source.tag_field:
        assert f"tag_key {source.tag_field}\n" in text
        assert f"time_key {source.time_field}\n" in text
    else:
        assert re.search(rf"^\s*match +{re.escape(source.tag)}$", text, re.M)
        assert re.search(rf"^\s*timestamp_key +{source.time_field}$", text, re.M)
