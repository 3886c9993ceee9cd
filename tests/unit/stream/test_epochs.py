"""Goal: of several aggregators one is at work, and the one that began last. Method: claims by hand in a log in memory,
Faust's assignor without a broker."""

from __future__ import annotations

import asyncio
from typing import Any

import pyarrow as pa
import pytest
from join_world import PROJECT, records, traffic
from stream_world import Blobs

from headrace.backends.clock import VirtualClock
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import Config, LogConfig
from headrace.contract.errors import Unavailable
from headrace.contract.formats.events import AGGREGATE_SCHEMA, encode_batch
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Record
from headrace.process.waits import Waits
from headrace.stream.aggregate.epochs import Epochs, epoch_of
from headrace.stream.aggregate.stage import AggregateStage
from headrace.stream.shell.dependencies import StageDependencies

EVENTS = Topics().events


class Log(MemoryLog):
    """A log in memory that is its own producer; `between` happens before the next append."""

    def __init__(self) -> None:
        super().__init__(lambda: 0)
        self.admin().ensure_topics(Topics().specs(2))
        self.between: Any = None

    def send(self, topic, partition, value, *, key=None, headers=None, delivered=None) -> None:
        between, self.between = self.between, None
        if between is not None:
            between()
        offset = self.append(topic, partition, value, key, headers or {})
        if delivered is not None:
            delivered(None, offset)

    def poll(self, timeout_s: float) -> None:
        """Everything has its receipt."""


def said(epoch: int, *, header: bool = True) -> tuple[bytes, dict[str, str]]:
    row = {"counter": "c", "key": "k", "as_of_ms": 1, "epoch": epoch, "counts": [1.0]}
    value = encode_batch(pa.RecordBatch.from_pylist([row], schema=AGGREGATE_SCHEMA))
    return value, {"kind": "aggregate"} | ({"epoch": str(epoch)} if header else {})


def claimed(log: Log, seen: int = 0, offsets: tuple[int, ...] = (-1, -1)) -> Epochs:
    epochs = Epochs(log, log.reader, EVENTS, Waits(VirtualClock()))
    asyncio.run(epochs.claim(seen, offsets))
    return epochs


@pytest.mark.parametrize("header", [True, False], ids=["now", "as release 0.1 wrote it"])
def test_an_epoch_is_above_all_that_the_log_has_in_any_partition(header: bool):
    log = Log()
    value, headers = said(1_700_000_000_000, header=header)
    log.append(EVENTS, 1, value, None, headers)
    for _ in range(3_000):
        log.append(EVENTS, 1, b"{}", None, {"kind": "punctuation"})
    assert claimed(log).epoch == 1_700_000_000_001
    assert claimed(log).epoch == 1_700_000_000_002, "a claim alone counts"
    assert claimed(log, seen=1_800_000_000_000).epoch == 1_800_000_000_001


def test_of_two_who_claim_at_once_the_later_one_is_above():
    log, others = Log(), []

    def other() -> None:
        log.append(EVENTS, 0, *said(1)[:1], None, said(1)[1])
        others.append(1)

    log.between = other
    assert claimed(log).epoch == 2 and others


def test_who_was_replaced_is_told():
    log = Log()
    first = claimed(log)
    asyncio.run(first.confirm())
    second = claimed(log)
    with pytest.raises(Unavailable, match="another aggregator took over: it writes under epoch 2, this one under 1"):
        asyncio.run(first.confirm())
    asyncio.run(second.confirm())
    for record in log.partitions(EVENTS)[0]:
        second.check(epoch_of(record))


@pytest.mark.parametrize(
    ("value", "headers"),
    [
        (b"", {"kind": "aggregate"}),
        (b"hello", {"kind": "aggregate", "epoch": "x"}),
        (b"hello", {"kind": "aggregate", "epoch": "9" * 30}),
        (None, {"kind": "aggregate", "epoch": "7"}),
        (said(1 << 62, header=False)[0], {"kind": "aggregate"}),
        (encode_batch(pa.RecordBatch.from_pylist([{"epoch": None}])), {"kind": "aggregate"}),
        (said(5)[0], {}),
    ],
)
def test_what_is_no_aggregate_of_ours_has_no_epoch(value: bytes | None, headers: dict[str, str]):
    assert epoch_of(Record(EVENTS, 0, 0, None, value, headers, 0)) == 0


def test_who_was_replaced_stores_no_state():
    """What it told since is ignored: a state that holds it would make the next one leave it out."""
    log, blobs = Log(), Blobs()

    def stage() -> AggregateStage:
        config = Config(log=LogConfig(partitions=2))
        deps = StageDependencies(
            project=PROJECT, config=config, topics=Topics(), producer=log, blobs=blobs, metrics=MemoryMetrics(),
            clock=VirtualClock(), open_reader=log.reader,
        )  # fmt: skip
        return AggregateStage(deps)

    async def run() -> None:
        old, new = stage(), stage()
        for partition in range(2):
            await old.begin(partition)
        await old.take_all([r for r in records(traffic(1, 20), None) if r.headers["kind"] != "aggregate"])
        await new.begin(0)
        with pytest.raises(Unavailable, match="another aggregator took over"):
            await old.finish()

    asyncio.run(run())
    assert not blobs.items
