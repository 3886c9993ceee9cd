"""Goal: whatever a commit raises, the sink stops, and no later commit moves the positions past what is not stored.

Method: the real Delta table on a folder; its second commit fails, hangs, or is one that delta-rs itself refuses.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from trainer_world import cut

from headrace.backends.clock import VirtualClock
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import Config
from headrace.contract.errors import Unavailable
from headrace.contract.formats.events import encode_batch
from headrace.contract.interfaces.log import Record
from headrace.process.waits import CALL_MAX_S
from headrace.stream.sink.stage import SinkStage

ROWS = 60


class FailingLake(DeltaLake):
    """The real lake, whose second commit raises, before it or after it."""

    fault: Exception | None = None
    takes_effect = False
    commits = 0

    def append(self, *args):
        self.commits += 1
        if self.commits != 2 or self.fault is None:
            return super().append(*args)
        if self.takes_effect:
            super().append(*args)
        raise self.fault


def records(capital: bool = False) -> list[Record]:
    """Return records of 60 positions; `capital` adds a column whose name differs from another's by case."""
    made = []
    for offset, (rows, after) in enumerate(cut(3, 0, ROWS)):
        whole = rows.append_column("Price", rows["price"]) if capital else rows
        last = (rows["offset"][-1].as_py(), rows["rank"][-1].as_py())
        headers = {"after": f"{after[0]}:{after[1]}", "last": f"{last[0]}:{last[1]}"}
        made.append(Record("samples", 0, offset, None, encode_batch(whole), headers, 0))
    return made


async def work(lake: DeltaLake, some: list[Record]) -> SinkStage:
    """Take the records and commit after each until the stage raises."""
    stage = SinkStage(Config(), lake, MemoryMetrics(), VirtualClock())
    begin = await stage.begin(0) or 0
    for record in some[begin:]:
        await stage.take(record)
        stage._due_s = 0.0
        await stage.tick()
        if stage._committing is not None:
            await asyncio.wait([stage._committing])
    await stage.tick()
    return stage


def places(rows: pa.Table) -> list[tuple[int, int]]:
    return sorted(zip(rows["offset"].to_pylist(), rows["rank"].to_pylist(), strict=True))


@pytest.mark.parametrize("takes_effect", [False, True])
@pytest.mark.parametrize("fault", [Unavailable("away"), RuntimeError("odd"), MemoryError("malloc"), Exception("delta")])
def test_any_failure_of_a_commit_stops_the_sink_and_a_restart_mends_it(
    tmp_path: Path, fault: Exception, takes_effect: bool
):
    lake = FailingLake(str(tmp_path / "lake"), partitions=1)
    lake.fault, lake.takes_effect = fault, takes_effect
    with pytest.raises(type(fault), match=str(fault)):
        asyncio.run(work(lake, records()))
    assert lake.commits == 2, "nothing is committed after a failure"
    asyncio.run(work(DeltaLake(lake.uri, partitions=1), records()))
    assert places(lake.read(columns=["offset", "rank"])) == places(pa.Table.from_batches(b for b, _ in cut(3, 0, ROWS)))


def test_finish_after_a_failure_commits_nothing_and_says_so(tmp_path: Path):
    lake = FailingLake(str(tmp_path / "lake"), partitions=1)
    lake.fault, lake.commits = MemoryError("malloc"), 1

    async def run() -> None:
        stage = SinkStage(Config(), lake, MemoryMetrics(), VirtualClock())
        await stage.begin(0)
        first, second, *_ = records()
        await stage.take(first)
        await stage.tick()
        await asyncio.wait([stage._committing])
        await stage.take(second)
        with pytest.raises(MemoryError):
            await stage.finish()

    asyncio.run(run())
    assert (lake.commits, lake.state()) == (2, None)


def test_names_that_differ_by_case_stop_the_sink_at_once(tmp_path: Path):
    lake = DeltaLake(str(tmp_path / "lake"), partitions=1)
    with pytest.raises(Exception, match=r"(?i)price"):
        asyncio.run(work(lake, records(capital=True)))
    assert lake.state() is None


def test_a_commit_that_never_returns_stops_the_sink_by_its_name(tmp_path: Path):
    go_on, clock = threading.Event(), VirtualClock()

    class Hanging(DeltaLake):
        def append(self, *args):
            go_on.wait(10.0)
            return super().append(*args)

    async def run() -> None:
        stage = SinkStage(Config(), Hanging(str(tmp_path / "lake"), partitions=1), MemoryMetrics(), clock)
        await stage.begin(0)
        await stage.take(records()[0])
        await stage.tick()
        await asyncio.sleep(0.01)
        for _ in range(int(CALL_MAX_S)):
            clock.advance(1.0)
            await stage.tick()
        clock.advance(0.1)
        with pytest.raises(Unavailable, match=r"commit of \d+ samples to the lake: no answer in 180 s"):
            await stage.tick()
        go_on.set()
        await asyncio.wait([stage._committing])

    asyncio.run(run())


def test_a_lake_that_raises_when_it_is_looked_at_is_no_empty_lake():
    class Broken:
        def state(self, version: int | None = None) -> None:
            raise pa.ArrowInvalid("damaged log")

    with pytest.raises(pa.ArrowInvalid):
        asyncio.run(SinkStage(Config(), Broken(), MemoryMetrics(), VirtualClock()).begin(0))
