"""Goal: samples that begin after what the lake holds are not stored, and named. Method: the sink's stage, by hand."""

from __future__ import annotations

import asyncio
import logging

import pyarrow as pa
from join_world import PROJECT, records, traffic

from headrace.backends.clock import VirtualClock
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import Config, JoinConfig
from headrace.contract.formats.events import encode_batch
from headrace.contract.formats.sample import format_position
from headrace.contract.interfaces.log import Record
from headrace.stream.join.join import JoinState
from headrace.stream.sink.stage import SinkStage


class NoLake:
    """A lake that holds nothing yet."""

    def state(self, version: int | None = None) -> None:
        return None


def samples() -> list[Record]:
    """Return the first four records of samples that a join sends."""
    join = JoinState(PROJECT, JoinConfig(), silent_ms=300, partition=0)
    emitted = [e for record in records(traffic(1), None) if (e := join.take(record)) is not None][:4]
    return [
        Record("samples", 0, offset, None, encode_batch(e.batch),
               {"after": format_position(e.after), "last": format_position(e.last)}, 0)
        for offset, e in enumerate(emitted)
    ]  # fmt: skip


def test_a_record_beyond_a_gap_is_left_out_and_named(caplog):
    first, second, third, fourth = samples()
    metrics = MemoryMetrics()
    sink = SinkStage(Config(), NoLake(), metrics, VirtualClock())

    async def take(*some: Record) -> None:
        for record in some:
            await sink.take(record)

    async def run() -> None:
        assert await sink.begin(0) is None
        await take(first)
        with caplog.at_level(logging.ERROR, "headrace.sink"):
            await take(third)
        assert metrics.total("gap_total") == 1
        (said,) = caplog.messages
        assert f"samples/0 offset {third.offset} begins after" in said
        assert str(sink.orders[0].position) in said
        await take(second, third, fourth)

    asyncio.run(run())
    assert metrics.total("gap_total") == 1
    kept = pa.Table.from_batches([batch for _, batch in sink.batches])
    expected = sum(pa.ipc.open_stream(r.value).read_all().num_rows for r in (first, second, third, fourth))
    assert kept.num_rows == expected
