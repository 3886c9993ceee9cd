"""Goal: whatever lies in a topic, no reader of it stops: it takes the good record behind.

Method: each reader gets the same garbage, under no headers, under those that it looks at, and under nonsense; then one
record of ours. What is told of it is looked at by the readers' own tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import product
from pathlib import Path
from random import Random

import msgspec
import pyarrow as pa
import pytest
import serving_world
import trainer_world
from join_world import PROJECT, records

from headrace.backends.clock import VirtualClock
from headrace.backends.log.fenced_memory import FencedMemory, WriterEpochs
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import Config, JoinConfig
from headrace.contract.formats.dead_letters import DeadLetter, RetryMark, encode_dead_letter, encode_retry_mark
from headrace.contract.formats.events import Punctuation, encode_batch, encode_punctuation
from headrace.contract.formats.snapshot import Manifest, encode_manifest
from headrace.contract.formats.steps import Step, encode_step
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Record
from headrace.contract.rules import change_of, encode_change
from headrace.examples.shop.freshness import Freshness
from headrace.ingest.dead_letters.late_backlog import LateBacklog
from headrace.ingest.dead_letters.letters import read_letters, read_marks
from headrace.ingest.gateway.log_start import read_start
from headrace.replay.ledger.keys import sample_keys
from headrace.replay.recorded import recorded_steps
from headrace.serving.features import FeatureMemory
from headrace.stream.aggregate.core import AggregatorState
from headrace.stream.join.join import JoinState
from headrace.stream.rule_changes import first_rules, read_history
from headrace.stream.sink.stage import SinkStage
from headrace.trainer.commit.publish import read_manifests
from headrace.trainer.commit.steps import StepsLog
from headrace.trainer.source.live import LivePartition, LiveRows

TOPICS = Topics()
IMPRESSION = {"event_id": "i", "request_id": "r", "place": 0, "key": "1", "event_time_ms": 10_000, "user": 1, "item": 1}
(WHOLE,) = records([("impression", IMPRESSION)], None)
WHOLE_VALUE = WHOLE.value or b""
ANOTHER = encode_batch(pa.RecordBatch.from_pylist([{"colour": "red", "offset": "7"}, {"colour": None, "offset": "8"}]))
VALUES: dict[str, bytes | None] = {
    "a tombstone": None,
    "empty": b"",
    "a console's": b"hello",
    "random": Random(1).randbytes(300),
    "torn Arrow": WHOLE_VALUE[:-30],
    "torn at its head": WHOLE_VALUE[:20],
    "another's Arrow": ANOTHER,
    "msgpack": b"\x82\xa1a\x01\xa1b\x93\x01\x02\xc0",
    "JSON null": b"null",
    "a JSON list": b"[1]",
    "a JSON number": b"7",
    "another's JSON": b'{"id": 7, "name": "x"}',
    "no UTF-8": b'{"gateway": "\xff", "epoch": 1, "time_ms": 1, "model": "\xff", "type": "\xff", "number": 1}',
    "nested": b'{"x": ' + b'{"x": ' * 50_000,
    "absurd numbers": b'{"gateway": "g", "epoch": 1e300, "time_ms": 99999999999999999999999999, "number": 1e9}',
}
KINDS = ("impression", "feedback", "aggregate", "external", "spec", "punctuation", "\ufffd", "")
EVENT_HEADERS: list[dict[str, str]] = [{}, *({"kind": kind, "type": "click", "epoch": "x"} for kind in KINDS)]
BY_GATEWAY = [each | {"gateway": "g", "epoch": epoch} for each in EVENT_HEADERS for epoch in ("", "x", "٣", "-1", "5")]
SAMPLE_HEADERS: list[dict[str, str]] = [
    {}, {"after": "", "last": ""}, {"after": "-1:-1"}, {"after": "x:y", "last": "1:2:3"},
    {"after": "-1:-1", "last": "999999:0", "spec": "x"}, {"after": "-1:-1", "last": f"{10**40}:0"},
]  # fmt: skip


def garbage(topic: str, headers: list[dict[str, str]], *keys: bytes | None) -> list[Record]:
    """Return every value under all of these headers and keys."""
    several = product(VALUES.values(), headers, keys or (None,))
    return [Record(topic, 0, n, key, value, each, 0) for n, (value, each, key) in enumerate(several)]


def log_of(bad: list[Record], good: bytes, key: bytes | None = None, **headers: str) -> MemoryLog:
    """Return a log with the garbage, and one record of ours behind it."""
    log = MemoryLog(lambda: 0)
    log.admin().ensure_topics(TOPICS.specs(1))
    topic = bad[0].topic
    for record in bad:
        log.append(topic, 0, record.value, record.key, record.headers)
    log.append(topic, 0, good, key, headers)
    return log


def tick(offset: int) -> Record:
    value = encode_punctuation(Punctuation("g", 6, 50_000))
    return Record(TOPICS.events, 0, offset, None, value, {"kind": "punctuation", "gateway": "g", "epoch": "6"}, 0)


def join(_: Path) -> bool:
    state = JoinState(PROJECT, JoinConfig(), silent_ms=300, partition=0)
    bad = garbage(TOPICS.events, EVENT_HEADERS)
    state.take_all([*bad, tick(len(bad))])
    return state.watermark.time_ms == 50_000 and state.totals.impressions == 0


def aggregator(_: Path) -> bool:
    state = AggregatorState(PROJECT, 1, grid_ms=100, silent_ms=300, horizon_ms=3_600_000)
    bad = garbage(TOPICS.events, EVENT_HEADERS)
    for record in [*bad, tick(len(bad))]:
        state.take(record)
    return state.watermarks[0].time_ms == 50_000 and state.bad_records > 50


def gateway(_: Path) -> bool:
    log = log_of(garbage(TOPICS.events, BY_GATEWAY), tick(0).value or b"", **tick(0).headers)
    start = read_start(log.reader(), TOPICS.events, "g")
    return start.epoch == 7 and start.promised == {0: 50_000}


def ours(offset: int) -> Record:
    rows = trainer_world.samples(1, 0, 3)
    headers = {"after": "-1:-1", "last": "0:2", "spec": "x"}
    return Record(TOPICS.samples, 0, offset, None, encode_batch(rows), headers, 0)


SAMPLES = garbage(TOPICS.samples, SAMPLE_HEADERS)
SAMPLES.append(ours(len(SAMPLES)))


class NoLake:
    """A lake that holds nothing yet."""

    def state(self, version: int | None = None) -> None:
        return None


def sink(_: Path) -> bool:
    stage = SinkStage(Config(), NoLake(), MemoryMetrics(), VirtualClock())  # type: ignore[arg-type]

    async def run() -> int:
        await stage.begin(0)
        await stage.take_all(SAMPLES)
        return stage.rows

    return asyncio.run(run()) == 3


def trainer(_: Path) -> bool:
    live = LiveRows(trainer_world.samples(1, 0, 1).schema, ("click",))
    live.partitions[0] = LivePartition()
    for record in SAMPLES:
        live.intake(record)
    live.refuse_holes(TOPICS.samples, {0: len(SAMPLES)})
    return live.rows == 3


def ledger(_: Path) -> bool:
    return sample_keys(SAMPLES)[0].num_rows == 3


def shop_samples(_: Path) -> bool:
    freshness = Freshness(TOPICS, MemoryMetrics(), VirtualClock())
    rows = trainer_world.samples(1, 0, 3)
    ids = pa.array(["a", "b", "c"])
    whole = rows.set_column(rows.schema.get_field_index("feedback_id"), rows.schema.field("feedback_id"), ids)
    freshness.clicked("b")
    freshness.take([*SAMPLES[:-1], msgspec.structs.replace(SAMPLES[-1], value=encode_batch(whole))])
    return len(freshness._resolved) == 1


STEP = encode_step(Step(model="m", run="r", step=1, ranges=(), positions={"0": [5, 0]}))


def shop_steps(_: Path) -> bool:
    freshness, bad = Freshness(TOPICS, MemoryMetrics(), VirtualClock()), garbage(TOPICS.steps, [{}])
    freshness.take([*bad, Record(TOPICS.steps, 0, len(bad), None, STEP, {}, 0)])
    return list(freshness._steps) == ["r-1"]


def steps(_: Path) -> bool:
    log, metrics = log_of(garbage(TOPICS.steps, [{}]), STEP), MemoryMetrics()
    writer = FencedMemory(log, TOPICS.steps, "m", WriterEpochs())
    found = StepsLog(writer, "m", metrics, pause=lambda _: None).recover(0)
    counted = metrics.counters["records_unreadable_total", "steps foreign"]
    return [step.step for _, step in found] == [1] and counted == len(VALUES) - 1


def replayed_steps(_: Path) -> bool:
    return len(recorded_steps(log_of(garbage(TOPICS.steps, [{}]), STEP).reader(), TOPICS)) == 1


def counters(_: Path) -> bool:
    memory, metrics = FeatureMemory(), MemoryMetrics()
    bad = garbage(TOPICS.features, [{}, {"epoch": "x"}], None, b"item/1", b"external/shop/1", b"external/", b"\xff")
    good = b'{"as_of_ms": 7, "epoch": 1, "buckets": {"0": [3]}}'
    memory._take_all([*bad, Record(TOPICS.features, 0, len(bad), b"item/1", good, {}, 0)], metrics)
    return memory.watermark_ms == 7 and metrics.counters["records_unreadable_total", "features foreign"] > 20


MANIFEST = Manifest(kind="snapshot", model="m", run="r", step=1, version="r-1", digest="d")


def manifests(_: Path) -> bool:
    log = log_of(garbage(TOPICS.model, [{}], None, b"m/snapshot"), encode_manifest(MANIFEST), b"m/snapshot")
    metrics = MemoryMetrics()
    found = read_manifests(log.reader(), TOPICS, "m", metrics)
    return found == [MANIFEST] and metrics.counters["records_unreadable_total", "model foreign"] == len(VALUES) - 1


def serving(folder: Path) -> bool:
    world, rng = serving_world.World(folder), Random(1)
    published = serving_world.Trainer(world)
    name = serving_world.PROJECT.name.encode()
    for topic in (TOPICS.model, TOPICS.deltas):
        for record in garbage(topic, [{}, {"kind": "x"}, {"base": "x", "version": "y-z"}], None, name):
            world.log.append(topic, 0, record.value, record.key, record.headers)
    published.learn(rng)
    published.snapshot()
    world.follow()
    for record in garbage(TOPICS.deltas, [{}], None, name):
        world.log.append(TOPICS.deltas, 0, record.value, record.key, record.headers)
    published.learn(rng)
    published.snapshot()
    world.follow()
    return bool(world.version == published.version)


CHANGE = encode_change(change_of(PROJECT, 1, now_ms=0))


def rules(_: Path) -> bool:
    log = log_of(garbage(TOPICS.rules, [{}]), CHANGE)
    history = read_history(FencedMemory(log, TOPICS.rules, "r", WriterEpochs()))
    first_rules(PROJECT, list(log.partitions(TOPICS.rules)[0]))
    return [change.number for change in history.changes] == [1]


def letters(_: Path) -> bool:
    good = encode_dead_letter(DeadLetter(reason="r", detail="d", origin="o", tag="t"))
    log = log_of(garbage(TOPICS.dead_letters, [{}]), good)
    end = log.reader().end_offsets(TOPICS.dead_letters)[0]
    return [letter.content.reason for letter in read_letters(log.reader(), TOPICS.dead_letters, end)] == ["r"]


def marks(_: Path) -> bool:
    good = encode_retry_mark(RetryMark(step="retrying", run="r", at_ms=1))
    log = log_of(garbage(TOPICS.retries, [{}]), good)
    return [mark.run for mark in read_marks(FencedMemory(log, TOPICS.retries, "r", WriterEpochs()))] == ["r"]


def settler(_: Path) -> bool:
    good = encode_retry_mark(RetryMark(step="retrying", run="r", at_ms=1))
    log, metrics = log_of(garbage(TOPICS.retries, [{}]), good), MemoryMetrics()
    backlog = LateBacklog(TOPICS.dead_letters, metrics)
    for _again in range(2):
        backlog.read(log.reader(), FencedMemory(log, TOPICS.retries, "r", WriterEpochs()))
    counted = metrics.counters["records_unreadable_total", "retries foreign"]
    return backlog.newest is not None and backlog.newest[1].run == "r" and counted == len(VALUES) - 1


READERS: tuple[Callable[[Path], bool], ...] = (
    *(join, aggregator, gateway, sink, trainer, ledger, shop_samples, shop_steps, steps, replayed_steps),
    *(counters, manifests, serving, rules, letters, marks, settler),
)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_reader_goes_on_with_the_good_record_behind(reader: Callable[[Path], bool], tmp_path: Path):
    assert reader(tmp_path)
