"""Goal: the shippers' configuration in deploy/ is whole, means what it says and fits the gateway.

Method: neither shipper is here, so each file is read by a port of its program's own rules (`fluentd_rules`,
`fluent_bit_rules`), and what is checked is the meaning: seconds, bytes, truth. The gateway's side, which stands in
their comments, is decoded by the gateway's own reader. The bounds along the way come from code and files, and the
table in docs/ingest.md must say the same.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import fluent_bit_rules
import fluentd_rules
import pytest

from headrace.backends.log.kafka import RECORD_BYTES_MAX
from headrace.contract.config import IngestConfig, decode_config
from headrace.sender import Sender

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
DOCS = DEPLOY.parent / "docs"
FLUENTD = sorted((DEPLOY / "fluentd").glob("*.conf"))
FLUENT_BIT = sorted((DEPLOY / "fluent-bit").glob("*.conf"))
ENVELOPE = 1_024
"""Of a message, without its body: tag, chunk id, heads."""


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _fluentd(name: str, section: str, kind: str = "") -> dict[str, fluentd_rules.Value]:
    """Return the values of the one section of this name and type in a file of deploy/fluentd."""
    found = fluentd_rules.parse((DEPLOY / "fluentd" / name).read_text()).all(section)
    (one,) = [each for each in found if not kind or each.values.get("@type") == kind]
    return fluentd_rules.read(one)


def _fluent_bit(name: str, section: str, plugin: str = "") -> list[dict[str, fluent_bit_rules.Value]]:
    """Return the values of the sections of this kind in a file of deploy/fluent-bit."""
    found = fluent_bit_rules.parse((DEPLOY / "fluent-bit" / name).read_text())
    return [fluent_bit_rules.read(each) for each in found if each.name == section and plugin in ("", each.plugin)]


def test_both_have_all_four() -> None:
    assert {p.name for p in FLUENTD} == {"fluent.conf", "tls.conf", "access-log.conf", "kafka.conf"}
    assert {p.name for p in FLUENT_BIT} == {"fluent-bit.conf", "tls.conf", "access-log.conf", "kafka.conf"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("100ms", 6_000), ("0.1s", 1), ("0.1", 0.1), ("60s", 60), ("5m", 300), ("1h30m", 1_800), ("1d", 86_400)],
)
def test_fluentd_reads_a_time_by_the_first_unit_that_it_finds(text: str, value: float) -> None:
    assert fluentd_rules.seconds(text) == value


@pytest.mark.parametrize(("text", "value"), [("1m", 1 << 20), ("16M", 1 << 24), ("2g", 2 << 30), ("1000000", 10**6)])
def test_fluentd_reads_sizes_as_powers_of_two(text: str, value: int) -> None:
    assert fluentd_rules.size(text) == value


@pytest.mark.parametrize("wrong", ["flush_interval 100ms", "retry_wait 0.1s", "retry_forever on", "flush_intervall 1"])
def test_what_fluentd_reads_in_another_way_than_people_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="fluentd"):
        fluentd_rules.read_all(
            fluentd_rules.parse(f"<match **>\n@type forward\n<buffer>\n@type file\n{wrong}\n</buffer>\n</match>")
        )


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (fluent_bit_rules.size, "16M", 16_000_000),
        (fluent_bit_rules.size, "64k", 64_000),
        (fluent_bit_rules.size, "16MiB", -1),
        (fluent_bit_rules.seconds, "0.1", 0),
        (fluent_bit_rules.seconds, "100ms", 100),
        (fluent_bit_rules.seconds, "60s", 60),
        (fluent_bit_rules.seconds, "2m", 120),
        (fluent_bit_rules.boolean, "On", True),
        (fluent_bit_rules.boolean, "1", None),
    ],
)
def test_fluent_bit_reads_values_in_its_own_way(read: object, text: str, value: object) -> None:
    assert read(text) == value  # type: ignore[operator]


@pytest.mark.parametrize("wrong", ["net.io_timeout 100ms", "storage.total_limit_size 2GiB", "tls 1", "require_ack on"])
def test_what_fluent_bit_reads_in_another_way_than_people_is_refused(wrong: str) -> None:
    (section,) = fluent_bit_rules.parse(f"[OUTPUT]\n    name forward\n    {wrong}")
    with pytest.raises(ValueError, match="fluent-bit"):
        fluent_bit_rules.read(section)


@pytest.mark.parametrize("path", FLUENTD, ids=_name)
def test_fluentd_takes_every_key_and_value_as_it_is_written(path: Path) -> None:
    # in_tail stalls at rotations before 1.16.3 (fluent/fluentd#4327).
    first = "1.16.3" if path.name == "access-log.conf" else "1.16"
    assert f"For fluentd {first} to 1.19" in path.read_text()
    fluentd_rules.read_all(fluentd_rules.parse(path.read_text()))


@pytest.mark.parametrize("path", FLUENT_BIT, ids=_name)
def test_fluent_bit_takes_every_key_and_value_as_it_is_written(path: Path) -> None:
    assert "For fluent-bit 5.1" in path.read_text()
    for section in fluent_bit_rules.parse(path.read_text()):
        fluent_bit_rules.read(section)


def test_a_shipper_in_the_docs_is_read_by_the_same_rules() -> None:
    for page in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S):
            if re.search(r"^\s*<(match|source|buffer)\b", block, re.M):
                fluentd_rules.read_all(fluentd_rules.parse(block))
            if re.search(r"^\[(SERVICE|INPUT|OUTPUT)\]", block, re.M):
                for section in fluent_bit_rules.parse(block):
                    fluent_bit_rules.read(section)


@pytest.mark.parametrize("path", FLUENTD, ids=_name)
def test_fluentd_sends_soon_and_keeps_what_is_not_acked(path: Path) -> None:
    buffer = _fluentd(path.name, "buffer")
    assert buffer["@type"] == "file" and buffer["overflow_action"] == "block" and buffer["retry_forever"] is True
    assert buffer["flush_mode"] == "interval" and buffer["flush_at_shutdown"] is False
    for key in ("flush_interval", "flush_thread_interval", "flush_thread_burst_interval", "retry_wait"):
        assert 0 < float(buffer[key]) <= 0.2, key
    assert 1 <= float(buffer["retry_max_interval"]) <= 10
    assert int(buffer["total_limit_size"]) >= 1 << 30
    if path.name == "kafka.conf":
        assert _fluentd(path.name, "match", "kafka2")["required_acks"] == -1
        return
    match = _fluentd(path.name, "match", "forward")
    assert match["require_ack_response"] is True and match["time_as_integer"] is False and match["keepalive"] is True
    # A gateway keeps a message for the time of a broker's restart.
    assert float(match["ack_response_timeout"]) >= 30
    assert match["heartbeat_type"] == "none"


@pytest.mark.parametrize("path", [p for p in FLUENTD if p.name != "access-log.conf"], ids=_name)
def test_fluentd_drops_nothing_of_a_chunk_that_it_acks(path: Path) -> None:
    # Off by default up to 1.18, on from 1.19 on.
    assert _fluentd(path.name, "source", "forward")["skip_invalid_event"] is False


@pytest.mark.parametrize("path", FLUENT_BIT, ids=_name)
def test_fluent_bit_sends_soon_and_keeps_what_is_not_acked(path: Path) -> None:
    (service,) = _fluent_bit(path.name, "SERVICE")
    assert 0 < float(service["flush"]) <= 0.2
    assert service["storage.checksum"] is False, "with it a kill -9 loses the chunk that is being written"
    assert 1 <= int(service["scheduler.base"]) <= int(service["scheduler.cap"]) <= 10
    for given in _fluent_bit(path.name, "INPUT"):
        assert given["storage.type"] == "filesystem"
    for output in _fluent_bit(path.name, "OUTPUT"):
        assert output["retry_limit"] == -1, "for ever"
        assert "storage.total_limit_size" not in output, "beyond it the oldest chunk goes, acked to its sender or not"
        if path.name == "kafka.conf":
            assert output["rdkafka.request.required.acks"] == -1 and output["rdkafka.message.timeout.ms"] == 0
            continue
        assert output["require_ack_response"] is True and output["time_as_integer"] is False
        assert float(output["net.io_timeout"]) >= 30


@pytest.mark.parametrize("path", [p for p in (*FLUENTD, *FLUENT_BIT) if p.name == "access-log.conf"], ids=_name)
def test_a_log_that_was_rotated_is_found_within_a_second(path: Path) -> None:
    if path.parent.name == "fluentd":
        tails = [fluentd_rules.read(s) for s in fluentd_rules.parse(path.read_text()).all("source")]
        assert len({tail["pos_file"] for tail in tails}) == len(tails)
        for tail in tails:
            assert tail["max_line_size"] == 1 << 20 < int(_fluentd(path.name, "buffer")["chunk_limit_size"]) - ENVELOPE
    else:
        tails = _fluent_bit(path.name, "INPUT")
        assert len({tail["db"] for tail in tails}) == len(tails)
        assert all(tail["skip_long_lines"] is True for tail in tails)
    for tail in tails:
        assert float(tail["refresh_interval"]) == 1 and tail["read_from_head"] is True
        assert float(tail["rotate_wait"]) >= 10 and "*" not in str(tail["path"])


def test_no_message_key_is_a_field_that_may_be_a_number() -> None:
    # kafka2 stops at an integer for ever, out_kafka sends it with a null key; a user's id is one in most projects.
    keys = [_fluentd("kafka.conf", "match", "kafka2").get("message_key_key")]
    keys += [output.get("message_key_field") for output in _fluent_bit("kafka.conf", "OUTPUT")]
    assert set(keys) <= {None, "request_id"}


def test_secure_files_check_whom_they_speak_to() -> None:
    match = _fluentd("tls.conf", "match", "forward")
    assert match["transport"] == "tls" and match["tls_verify_hostname"] is True and not match.get("tls_insecure_mode")
    (output,) = _fluent_bit("tls.conf", "OUTPUT")
    assert output["tls"] is True and output["tls.verify"] is True and output["tls.verify_hostname"] is True


@pytest.mark.parametrize("path", [p for p in FLUENTD if p.name != "kafka.conf"], ids=_name)
def test_a_gateway_that_moves_is_found_again_and_one_that_is_gone_is_left(path: Path) -> None:
    # fluentd keeps the first address of a name until a heartbeat fails, and there are no heartbeats.
    match, server = _fluentd(path.name, "match", "forward"), _fluentd(path.name, "server")
    assert match["heartbeat_type"] == "none"
    if str(server["host"]) != "127.0.0.1":
        assert 0 < float(match["expire_dns_cache"]) <= 60 and 0 < float(match["connect_timeout"]) <= 30


@pytest.mark.parametrize("path", FLUENTD, ids=_name)
def test_a_chunk_that_fluentd_gives_up_is_kept_where_a_reboot_leaves_it(path: Path) -> None:
    # An UnrecoverableError moves the chunk under root_dir, /tmp/fluent by default.
    root = str(_fluentd(path.name, "system")["root_dir"])
    assert (
        root
        and not root.startswith("/tmp")
        and root
        == _fluentd(path.name, "buffer")["path"].removesuffix(  # type: ignore[union-attr]
            "/access-log"
        )
    )


# -- the bounds along the way


def _sender(name: str) -> int:
    return int(inspect.signature(Sender).parameters[name].default)


def _bounds() -> dict[str, list[tuple[str, int]]]:
    """Return each way's bounds, from the first hop to the last: where each is told, and its bytes."""
    gateway, ways = IngestConfig(), {}
    event, message = _sender("event_bytes_max"), _sender("chunk_bytes") + _sender("event_bytes_max")
    last = ("gateway: `ingest.chunk_bytes_max`", gateway.chunk_bytes_max - ENVELOPE)
    first = ("sender: `chunk_bytes` + `event_bytes_max`", message)
    ways["a message from the sender"] = [first, last]
    for name in ("fluent.conf", "tls.conf"):
        ways[f"a message through fluentd/{name}"] = [
            first,
            ("fluentd: `chunk_size_limit`", int(_fluentd(name, "source", "forward")["chunk_size_limit"])),
            ("fluentd: `chunk_limit_size`", int(_fluentd(name, "buffer")["chunk_limit_size"])),
            last,
        ]
    for name in ("fluent-bit.conf", "tls.conf"):
        (given,) = _fluent_bit(name, "INPUT")
        taken = int(given["buffer_max_size"])
        ways[f"a message through fluent-bit/{name}"] = [
            first,
            ("fluent-bit: `buffer_max_size`", taken),
            ("fluent-bit: `buffer_max_size` twice + a chunk of 2,048,000", 2 * taken + fluent_bit_rules.CHUNK_BYTES),
            last,
        ]
    ways["an event"] = [
        ("sender: `event_bytes_max`", event),
        ("gateway: `ingest.batch_bytes`", gateway.batch_bytes),
        ("broker: `max.message.bytes`", RECORD_BYTES_MAX),
    ]
    return ways


def test_each_bound_is_at_most_the_next() -> None:
    wrong = [way for way, bounds in _bounds().items() if [s for _, s in bounds] != sorted(s for _, s in bounds)]
    assert not wrong, {way: _bounds()[way] for way in wrong}


def test_the_table_of_the_docs_says_what_code_and_files_say() -> None:
    page = (DOCS / "ingest.md").read_text()
    rows = dict(re.findall(r"^\| (\w[\w-]*: `.*?) \| ([\d,]+) \|", page, re.M))
    told = {where: int(size.replace(",", "")) for where, size in rows.items()}
    wanted = {where: size for way in _bounds().values() for where, size in way}
    gateway = "gateway: `ingest.chunk_bytes_max`"
    wanted[gateway] += ENVELOPE
    assert told == wanted


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
