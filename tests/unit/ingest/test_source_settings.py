"""What a source of headrace.toml may say, and how positions move behind receipts that come in any order."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import confluent_kafka as ck
import pytest

from headrace.backends.clock import VirtualClock
from headrace.backends.log.group_kafka import KafkaGroup
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.cli.stages.ingest import _client
from headrace.contract.config import SourceConfig, decode_config
from headrace.contract.errors import ConfigRejected
from headrace.contract.interfaces.group import Claim, Fetched
from headrace.ingest.sources.kafka_source import KafkaSource, Positions, Run, messages_of

CLAIM = Claim("t", 0, 1)


def source(text: str) -> SourceConfig:
    """Decode one source."""
    return decode_config(f'[[ingest.sources]]\ntopic = "t"\n{text}'.encode()).ingest.sources[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needs tag or tag_field"),
        ('tag = "a"\nformat = "csv"', "Invalid enum value 'csv'"),
        ('tag = "a"\nstart = "now"', "Invalid enum value 'now'"),
        ('tag = "a"\ntime_unit = "h"', "Invalid enum value 'h'"),
        ('tag = "a"\ncolour = "blue"', "has no setting 'colour'"),
        ('tag = "a"\nin_flight_max = 0', ">= 1"),
        ('tag = "a"\nclient = {"enable.auto.commit" = "true"}', "client may set"),
        ('tag = "a"\nclient = {"isolation.level" = "read_uncommitted"}', "client may set"),
    ],
)
def test_a_source_that_cannot_work_is_refused_at_the_start(text: str, says: str) -> None:
    with pytest.raises(ConfigRejected, match=says):
        source(text)


def test_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    made = source('tag = "a"\nclient = {"sasl.password" = "$SHIPPER_SECRET", "security.protocol" = "sasl_ssl"}')
    with pytest.raises(ConfigRejected, match="SHIPPER_SECRET, which is not set"):
        _client(made)
    monkeypatch.setenv("SHIPPER_SECRET", "s3cret")
    assert _client(made) == {"sasl.password": "s3cret", "security.protocol": "sasl_ssl"}


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_a_position_moves_only_past_runs_that_are_settled(order: tuple[int, ...]) -> None:
    positions, runs = Positions(), [Run((n + 1) * 10, 10, 1) for n in range(4)]
    for run in runs:
        positions.offered(CLAIM, run)
    done: set[int] = set()
    at = 0
    for nth in order:
        runs[nth].open = 0
        done.add(nth)
        moved = positions.settled(CLAIM)
        whole = next((n for n in range(4) if n not in done), 4)
        assert (moved or at) == whole * 10 or (moved is None and whole * 10 == at)
        at = moved if moved is not None else at
        assert positions.in_flight == 40 - at
    assert at == 40


def test_ids_name_the_record_and_an_own_id_stays() -> None:
    made = SourceConfig(topic="t", tag="a", tag_field="tag")
    values = [
        b'{"x": 1}',
        b'{"x": 2, "event_id": "own"}',
        b'{"event_id": null, "tag": "b"}',
        b'{"event_id": 0}',
    ]
    found = messages_of(made, [Fetched(CLAIM, 5 + n, text, 9) for n, text in enumerate(values)])
    ids = {message.tag: [entry.record["event_id"] for entry in message.entries] for message in found}
    assert ids == {"a": ["t/0/5/9", "own", 0], "b": ["t/0/7/9"]}


def test_records_of_one_otlp_message_have_ids_of_their_own() -> None:
    body = (
        '{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"stringValue":"a"}},{"body":{"stringValue":"b"}}]}]}]}'
    )
    (message,) = messages_of(
        SourceConfig(topic="t", tag="a", format="otlp_json"), [Fetched(CLAIM, 5, body.encode(), 9)]
    )
    assert [entry.record["event_id"] for entry in message.entries] == ["t/0/5/9/0", "t/0/5/9/1"]
    assert [entry.time_ns for entry in message.entries] == [9_000_000, 9_000_000]


def test_a_log_record_that_cannot_be_packed_is_a_dead_letter_of_its_own_bytes() -> None:
    good, bad = '{"body":{"stringValue":"a"}}', '{"body":{"stringValue":"\\ud800"}}'
    body = f'{{"resourceLogs":[{{"scopeLogs":[{{"logRecords":[{good},{bad},{good}]}}]}}]}}'
    source = SourceConfig(topic="t", tag="a", format="otlp_json")
    whole, letter = messages_of(source, [Fetched(CLAIM, 5, body.encode(), 9)])
    assert [entry.record["event_id"] for entry in whole.entries] == ["t/0/5/9/0", "t/0/5/9/2"]
    assert letter.problem and letter.chunk == "t/0/5/9/1" and letter.raw == bad.encode()


def test_the_demo_has_no_source(shop_dir: Path) -> None:
    assert decode_config((shop_dir / "headrace.toml").read_bytes()).ingest.sources == ()


class Client:
    """A client that knows the ends of some partitions; of the others it raises, knows nothing yet, or says nothing."""

    def __init__(self, told: dict[int, Any]) -> None:
        self.told = told

    def get_watermark_offsets(self, part: Any, cached: bool) -> Any:
        found = self.told[part.partition]
        if isinstance(found, Exception):
            raise found
        return found

    def position(self, parts: list[Any]) -> list[Any]:
        return [SimpleNamespace(offset=4) for _ in parts]


@pytest.mark.parametrize(
    ("other", "lag"),
    [
        ((0, 9), 6 + 5),
        (ck.KafkaException(ck.KafkaError(ck.KafkaError._TRANSPORT)), None),
        ((ck.OFFSET_INVALID, ck.OFFSET_INVALID), None),
        (None, None),
    ],
    ids=["told", "raises", "not heard yet", "no answer"],
)
def test_a_lag_of_which_a_part_is_not_known_is_not_known(other: Any, lag: int | None) -> None:
    """Without that part it would look better than it is."""
    group = KafkaGroup("127.0.0.1:1", "t", "g")
    group.close(5.0)
    assert group.status().lag_records is None, "nobody has looked yet"
    group._away_since = None
    group._measure()
    assert group.status().lag_records is None, "nobody has said yet which partitions it has"
    group._is_assigned = True
    group._claims = {p: Claim("t", p, p) for p in (0, 1)}
    group._consumer = Client({0: (0, 10), 1: other})  # type: ignore[assignment]
    group._measure()
    assert group.status().lag_records == lag
    metrics = MemoryMetrics()
    source = KafkaSource(SourceConfig(topic="t", tag="a"), lambda: group, metrics, VirtualClock())
    source._report(group)
    shown = metrics.gauges["lag_records", "t"]
    assert math.isnan(shown) if lag is None else shown == lag
