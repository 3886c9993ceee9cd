"""What tests of the archive share: records of every kind, and an archive in a folder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from headrace.backends.archive.delta import DeltaArchive
from headrace.backends.blobs_file import FileBlobs
from headrace.backends.delta.leases import Leases
from headrace.backends.log.memory import MemoryLog
from headrace.contract.config import LakeConfig
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import VerbatimRecord, read_range
from headrace.stream.sink.archive import EventArchive

TOPICS = Topics()
EVENTS = TOPICS.events
HOUR_MS = 3_600_000
CONFIG = LakeConfig(compact_files=2, vacuum_ms=1_000)
KINDS = ("impression", "feedback", "punctuation")


def verbatim(partition: int, offset: int, time_ms: int, random: Random) -> VerbatimRecord:
    """Return a record as anyone may write it: nulls, empty bytes, headers that come again, bytes that are no text."""
    raw: list[tuple[str, bytes | None]] = [("kind", random.choice(KINDS).encode())]
    raw += random.choice(([], [("seq", b"%d" % offset), ("seq", None)], [("x", b"\xff\x00"), ("", b"")]))
    value = random.choice((None, b"", random.randbytes(random.randrange(1, 60)), b"a" * random.randrange(200)))
    key = random.choice((None, b"", b"k%d" % random.randrange(9)))
    headers = {name: (text or b"").decode("utf-8", "replace") for name, text in raw}
    return VerbatimRecord(EVENTS, partition, offset, key, value, headers, time_ms, random.randrange(3), tuple(raw))


def append(log: MemoryLog, partition: int, random: Random) -> VerbatimRecord:
    """Append a record with all that belongs to it; the log gives offset and time."""
    offset = log.append(EVENTS, partition, None, None, {})
    records = log.partitions(EVENTS)[partition]
    records[-1] = verbatim(partition, offset, log.now_ms(), random)
    return records[-1]


def new_log(clock: Clock, partitions: int) -> MemoryLog:
    """Return a log with the topics of a stage."""
    log = MemoryLog(clock.now_ms)
    log.admin().ensure_topics(TOPICS.specs(partitions))
    return log


def new_archive(
    folder: Path, clock: Clock, partitions: int, *, events_id: str = "", generation: int = 1
) -> DeltaArchive:
    """Return another process's view of the one archive in a folder."""
    leases = Leases(FileBlobs(folder / "blobs"), clock, lease_ms=60_000, table="events")
    return DeltaArchive(
        str(folder / "events"),
        EVENTS,
        generation=generation,
        partitions=partitions,
        config=CONFIG,
        leases=leases,
        events_id=events_id,
    )


def in_topic(log: MemoryLog) -> dict[int, list[VerbatimRecord]]:
    """Return all that the topic holds now, by partition, verbatim."""
    found: dict[int, list[VerbatimRecord]] = {p: [] for p in range(len(log.partitions(EVENTS)))}
    for record in read_range(log.reader(verbatim=True), EVENTS):
        assert isinstance(record, VerbatimRecord)
        found[record.partition].append(record)
    return found


def in_archive(archive: DeltaArchive) -> dict[int, list[VerbatimRecord]]:
    """Return all that the archive's newest version holds of the offsets that it says are whole."""
    state = archive.state()
    if state is None:
        return {}
    return {p: list(archive.read(state.version, p, span)) for p, span in state.whole.items()}


async def in_turn(_what: str, work: Callable[[], Any]) -> Any:
    """Do the work a turn of the loop later, in place of a thread."""
    await asyncio.sleep(0)
    return work()


async def round_of(stage: EventArchive) -> None:
    """Let a process do one round, if one is due."""
    await stage.tick()
    for _ in range(4):
        await asyncio.sleep(0)
