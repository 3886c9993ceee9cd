"""Goal: a record of `samples` that is not ours costs the sink nothing; one that means a hole stops it, and names it.

Method: the sink's stage by hand, over a real Delta table and records of which one is damaged.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from trainer_world import cut

from headrace.backends.clock import VirtualClock
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import Config
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.events import encode_batch
from headrace.contract.interfaces.log import Record
from headrace.stream.sink.stage import SinkStage


class Group:
    """What the engine knows of the topic's end."""

    def __init__(self, end: int | None) -> None:
        self.known = end

    def end(self, partition: int) -> int | None:
        return self.known

    def acknowledge(self, partition: int, upto: int) -> None:
        """Nothing hangs on it here."""

    def lag(self) -> int:
        return 0

    def oldest_unread_ms(self) -> int | None:
        return None


def ours() -> list[Record]:
    """Return records of 200 samples, one after the other."""
    made = []
    for offset, (rows, after) in enumerate(cut(3, 0, 200)):
        last = (rows["offset"][-1].as_py(), rows["rank"][-1].as_py())
        headers = {"after": f"{after[0]}:{after[1]}", "last": f"{last[0]}:{last[1]}"}
        made.append(Record("samples", 0, offset, None, encode_batch(rows), headers, 0))
    return made


def in_log(records: list[Record]) -> list[Record]:
    return [msgspec.structs.replace(record, offset=offset) for offset, record in enumerate(records)]


async def stored(lake: DeltaLake, log: list[Record], *, end: int | None, metrics: MemoryMetrics | None = None) -> None:
    """Take the log from where the lake says on, and store all of it."""
    stage = SinkStage(Config(), lake, metrics or MemoryMetrics(), VirtualClock())
    stage.engine = Group(end)
    begin = await stage.begin(0) or 0
    for record in log[begin:]:
        await stage.take_all([record])
    await stage.tick()
    await stage.finish()


def rows(lake: DeltaLake) -> int:
    return 0 if lake.state() is None else lake.read().num_rows


def open_lake(folder: Path) -> DeltaLake:
    return DeltaLake(str(folder / "lake"), partitions=1)


GOOD = ours()
DAMAGED = msgspec.structs.replace(GOOD[2], value=(GOOD[2].value or b"")[:-100])
FORGED = {"after": "-1:-1", "last": "999999:0", "spec": "x"}


@pytest.mark.parametrize(
    ("value", "headers", "kind"),
    [
        (b"hello", {}, "foreign"),
        (None, {}, "foreign"),
        (b"", {"after": "x", "last": "5:0"}, "foreign"),
        (b"hello", FORGED, "damaged"),
        (None, FORGED, "damaged"),
        (encode_batch(cut(3, 1, 4)[0][0]), FORGED, "damaged"),
    ],
)
def test_what_nobody_misses_is_counted_and_skipped(tmp_path, value, headers, kind):
    lake, metrics = open_lake(tmp_path), MemoryMetrics()
    log = in_log([*GOOD[:3], Record("samples", 0, 0, None, value, headers, 0), *GOOD[3:]])
    asyncio.run(stored(lake, log, end=len(log), metrics=metrics))
    assert rows(lake) == 200 and metrics.counters["records_unreadable_total", f"samples {kind}"] == 1


def test_samples_lost_in_a_damaged_record_stop_the_sink_and_every_later_one(tmp_path):
    lake = open_lake(tmp_path)
    log = in_log([*GOOD[:2], DAMAGED, *GOOD[3:]])
    for _ in range(2):
        with pytest.raises(InvariantBroken, match=r"samples/0 offset 2 is damaged .* nowhere else"):
            asyncio.run(stored(lake, log, end=len(log)))


def test_a_commit_before_the_next_record_hides_nothing(tmp_path):
    lake = open_lake(tmp_path)
    log = in_log([*GOOD[:2], DAMAGED, *GOOD[3:]])
    asyncio.run(stored(lake, log[:3], end=3))
    state = lake.state()
    assert state is not None and state.next_offsets[0] == 2, "it is read again"
    with pytest.raises(InvariantBroken, match="offset 2 is damaged"):
        asyncio.run(stored(lake, log, end=len(log)))


def test_it_goes_on_where_the_samples_came_again(tmp_path):
    """The restarted join writes them again, behind what was written meanwhile."""
    lake, metrics = open_lake(tmp_path), MemoryMetrics()
    log = in_log([*GOOD[:2], DAMAGED, *GOOD[3:5], *GOOD[2:]])
    asyncio.run(stored(lake, log, end=len(log), metrics=metrics))
    assert rows(lake) == 200 and metrics.counters["gap_total", "samples"] == 2


def test_before_the_end_is_known_nothing_is_refused(tmp_path):
    lake = open_lake(tmp_path)
    log = in_log([*GOOD[:2], DAMAGED, *GOOD[3:]])
    asyncio.run(stored(lake, log, end=None))
    state = lake.state()
    assert state is not None and state.next_offsets[0] == 2 and rows(lake) == sum(len(r) for r, _ in cut(3, 0, 200)[:2])
