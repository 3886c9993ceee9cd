"""Goal: topic and archive are read as one log, whatever lies in which; what lies in neither is refused by offset.

Method: the archive's writer takes a log in memory, the topic forgets, and what is joined from either is compared by
digest with what was joined from the whole topic.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import ledger_world
import msgspec
import pytest
from archive_joined import PARTITIONS, digest
from archive_world import EVENTS, HOUR_MS, TOPICS, new_archive, new_log
from join_world import records, traffic

from headrace.backends.archive.delta import DeltaArchive
from headrace.backends.archive.upkeep import ArchiveUpkeep
from headrace.backends.clock import VirtualClock
from headrace.backends.lake.upkeep import Done
from headrace.backends.log.archived import ArchivedReader
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import ArchiveConfig, LakeConfig
from headrace.contract.errors import InvariantBroken
from headrace.contract.interfaces.log import Reader, read_range
from headrace.replay.ledger.ledger import Ledger
from headrace.replay.ledger.take_stock import take_stock
from headrace.stream.sink.archive import EventArchive

START_MS = 1_795_564_800_000


class World:
    """A log with traffic of three hours, archived."""

    def __init__(self, folder: Path, seed: int = 1, steps: int = 120) -> None:
        self.folder, self.random, self.clock = folder, Random(seed), VirtualClock(START_MS)
        self.log: MemoryLog = new_log(self.clock, PARTITIONS)
        waiting = {p: records(traffic(seed * 10 + p, steps), Random(seed)) for p in range(PARTITIONS)}
        while any(waiting.values()):
            for partition, coming in waiting.items():
                for record in coming[: self.random.randrange(20)]:
                    self.log.append(EVENTS, partition, record.value, record.key, record.headers)
                    coming.remove(record)
            self.clock.advance(self.random.choice((1, 30, 900)))
            if self.random.random() < 0.5:
                self.archive_some()
        self.archive_some()

    def archive(self) -> DeltaArchive:
        return new_archive(self.folder, self.clock, PARTITIONS, events_id=self.log.admin().topic_id(EVENTS))

    def archive_some(self) -> None:
        stage = EventArchive(
            *(ArchiveConfig(), EVENTS, self.archive(), MemoryMetrics(), self.clock),
            open_reader=lambda: self.log.reader(verbatim=True),
            partitions=lambda: range(PARTITIONS),
            kept_ms=-1,
        )
        stage._one_round(frozenset(range(PARTITIONS)))

    def reader(self, cuts: dict[int, int] | None = None, holder: str = "reader") -> ArchivedReader:
        return ArchivedReader(self.log.reader(), self.archive(), EVENTS, holder=holder, cuts=cuts)

    def ends(self) -> dict[int, int]:
        return self.log.reader().end_offsets(EVENTS)


def joined(reader: Reader, topic: str = EVENTS) -> str:
    try:
        return digest(read_range(reader, topic, silent_s=1.0))
    finally:
        reader.close()


def test_what_is_joined_of_topic_and_archive_is_equal_at_any_cut(tmp_path: Path):
    world = World(tmp_path)
    whole = joined(world.log.reader())
    assert whole != digest([])
    assert joined(world.reader()) == whole
    ends = world.ends()
    for _ in range(4):
        assert joined(world.reader({p: world.random.randrange(end + 1) for p, end in ends.items()})) == whole
    assert joined(world.reader(ends)) == whole
    for share in (0.3, 0.7, 1.0):
        for partition, end in ends.items():
            world.log.trim(EVENTS, partition, int(end * share))
        assert joined(world.reader()) == whole


def test_the_topic_may_forget_while_it_is_read(tmp_path: Path):
    world = World(tmp_path)
    whole = joined(world.log.reader())
    ends = world.ends()
    world.log.trim(EVENTS, 0, 20)
    reader = world.reader()
    found = []
    for number, record in enumerate(read_range(reader, EVENTS)):
        found.append(record)
        if number == 10:
            for partition, end in ends.items():
                world.log.trim(EVENTS, partition, end // 2)
    assert digest(found) == whole


def test_compaction_changes_nothing_and_a_leased_version_stays(tmp_path: Path):
    world = World(tmp_path)
    whole = joined(world.log.reader())
    for partition, end in world.ends().items():
        world.log.trim(EVENTS, partition, end)
    reader = world.reader()
    coming = read_range(reader, EVENTS)
    found = [next(coming) for _ in range(5)]
    archive, now_ms = world.archive(), world.clock.now_ms() + 2 * HOUR_MS
    archive.config = LakeConfig(compact_files=2, retention_ms=1, vacuum_ms=1)
    done = Done()
    ArchiveUpkeep(archive, now_ms).compact(done)
    assert joined(world.reader(holder="another")) == whole
    ArchiveUpkeep(archive, now_ms).retain(done, now_ms)
    ArchiveUpkeep(archive, now_ms).vacuum(done, ())
    assert done.files_compacted > 4 and done.rows_dropped == sum(world.ends().values())
    assert digest([*found, *coming]) == whole
    reader.close()
    with pytest.raises(InvariantBroken, match=r"whole from \d+ on: archive.retention_ms dropped"):
        world.reader().assign({(EVENTS, 0): 0})


def test_a_time_is_sought_in_the_archive(tmp_path: Path):
    world = World(tmp_path)
    truth = world.log.partitions(EVENTS)[0]
    reader = world.reader()
    for record in world.random.sample(truth, 12):
        for time_ms in (record.timestamp_ms, record.timestamp_ms + 1):
            wanted = next((r.offset for r in truth if r.timestamp_ms >= time_ms), None)
            assert reader.offset_at(EVENTS, 0, time_ms) == wanted


def test_offsets_that_lie_nowhere_are_refused_with_both_ends(tmp_path: Path):
    world = World(tmp_path)
    end = world.ends()[0]
    for _ in range(30):
        world.log.append(EVENTS, 0, b"", None, {})
    world.log.trim(EVENTS, 0, end + 10)
    reader = world.reader()
    assert reader.begin_offsets(EVENTS)[0] == end + 10
    with pytest.raises(InvariantBroken, match=f"offsets {end} to before {end + 10} were forgotten"):
        reader.assign({(EVENTS, 0): 5})
    world.archive_some()
    reader = world.reader()
    world.log.trim(EVENTS, 0, end + 20)
    assert reader.begin_offsets(EVENTS)[0] == end + 10
    with pytest.raises(InvariantBroken, match=f"whole from {end + 10} on: offsets {end} to before {end + 10} were for"):
        reader.assign({(EVENTS, 0): 5})
    assert [r.offset for r in read_range(reader, EVENTS, ends={0: end + 30})] == [*range(end + 10, end + 30)]


@pytest.mark.parametrize("written", [0, 3, 9])
def test_a_topic_that_lost_its_end_is_not_read_behind_the_archive(tmp_path: Path, written: int):
    world = World(tmp_path)
    end = world.ends()[0]
    world.log.cut(EVENTS, 0, end - 3)
    world.clock.advance(1)
    for _ in range(written):
        world.log.append(EVENTS, 0, b"", None, {})
    reader = world.reader()
    with pytest.raises(InvariantBroken, match="has lost the topic's end"):
        reader.begin_offsets(EVENTS)
    with pytest.raises(InvariantBroken, match="has lost the topic's end"):
        joined(world.reader({0: 5}))


def test_other_topics_and_a_store_without_an_archive_are_read_as_ever(tmp_path: Path):
    world = World(tmp_path / "a", steps=20)
    for number in range(5):
        world.log.append(TOPICS.samples, 0, b"%d" % number, None, {})
    assert [r.value for r in read_range(world.reader(), TOPICS.samples)] == [b"0", b"1", b"2", b"3", b"4"]
    bare = ArchivedReader(world.log.reader(), new_archive(tmp_path / "b", world.clock, PARTITIONS), EVENTS, holder="x")
    assert joined(bare) == joined(world.log.reader())
    world.log.trim(EVENTS, 0, 5)
    with pytest.raises(InvariantBroken, match="begins at 5, and nothing of it is archived"):
        bare.assign({(EVENTS, 0): 0})


def test_a_ledger_past_the_topics_retention_is_drawn_whole(tmp_path: Path):
    world = ledger_world.World(tmp_path)
    for partition in range(PARTITIONS):
        world.append(partition, 1_000)
    clock = VirtualClock(START_MS)
    archive = new_archive(tmp_path, clock, PARTITIONS)
    stage = EventArchive(
        *(ArchiveConfig(), EVENTS, archive, MemoryMetrics(), clock),
        open_reader=lambda: world.log.reader(verbatim=True),
        partitions=lambda: range(PARTITIONS),
        kept_ms=-1,
    )
    stage._one_round(frozenset(range(PARTITIONS)))

    def ledger() -> Ledger:
        reader = ArchivedReader(world.log.reader(), archive, EVENTS, holder="ledger")
        config, topics = ledger_world.CONFIG, ledger_world.TOPICS
        return take_stock(ledger_world.PROJECT, config, topics, reader, world.lake, blobs=world.blobs, mode="full")

    whole = ledger()
    assert whole.appended > 100
    for partition, end in world.log.reader().end_offsets(EVENTS).items():
        world.log.trim(EVENTS, partition, end * 2 // 3)
    assert msgspec.to_builtins(ledger()) == msgspec.to_builtins(whole)
    assert ledger().events_begin == {}
