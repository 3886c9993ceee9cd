"""The archive's writer, beside the sink: records of `events` as they lay there, to the store, each once.

It takes the partitions that the sink's group gave this process, reads with a reader of its own, and holds nothing
between two rounds. A round, every `archive.commit_ms`, and at once again where more waits:

1. Of a partition that is new here, ask the archive where it ends.
2. Ask for the topic's begins and ends. Where it begins behind the archive's end, retention overtook the archive: the
   offsets are told (`gap_total`), go into the commit as lost, and readers refuse them.
3. Read from the newest record that is archived. Another one there, or none, is a topic that has lost its end: what is
   archived is what was there, what comes has offsets of its own, and nobody can put them together. The archive of that
   partition stands still then, and says so every minute; the sink goes on.
4. Commit records and offsets, `archive.commit_bytes` at most. Where nothing came, nothing is written.

Whatever fails as `Unavailable`, the archive is asked again where it ends, for the commit may have happened. A commit
holds from where to where it goes, and the archive takes it at its end alone: two processes that hold one partition for
a moment store nothing twice. What nobody expected ends the process.
"""

from __future__ import annotations

import asyncio
import logging
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import NamedTuple, cast

from headrace.contract.config import ArchiveConfig
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.interfaces.archive import ArchiveWriter, Offsets
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Reader, Record, VerbatimRecord, read_range
from headrace.contract.metrics import Metrics
from headrace.process.waits import Waits

log = logging.getLogger("headrace.archive")

ALARM_EVERY_S = 60.0
AGAIN_S = 5.0
"""After a round that failed."""
STOP_S = 1.0
"""How long a round may go on while the process ends."""
COMMIT_RECORDS = 200_000


class Mark(NamedTuple):
    """By what a record is known again. Two records of one offset have different times, or values."""

    offset: int
    time_ms: int
    crc: int


def mark_of(record: Record) -> Mark:
    """Return a record's mark."""
    return Mark(record.offset, record.timestamp_ms, zlib.crc32(record.value or b""))


class _Place(NamedTuple):
    """Where the archive ends in a partition."""

    following: int | None
    """The next offset; None where nothing is archived."""
    last: Mark | None
    """The newest record that it has, None where none is left."""


class _Round(NamedTuple):
    """What one round takes."""

    records: list[VerbatimRecord]
    taken: dict[int, Offsets]
    lost: dict[int, Offsets]
    last: dict[int, Mark]
    is_whole: bool
    """Whether nothing waits behind it."""


class EventArchive:
    """The shell around the archive; see the module for the protocol."""

    def __init__(
        self,
        config: ArchiveConfig,
        topic: str,
        archive: ArchiveWriter,
        metrics: Metrics,
        clock: Clock,
        *,
        open_reader: Callable[[], Reader],
        partitions: Callable[[], Collection[int]],
        kept_ms: int,
    ) -> None:
        """`open_reader` makes a reader of `VerbatimRecord`s. `partitions` says which are this process's now. `kept_ms`:
        how long the broker keeps events, -1 for ever."""
        self.config, self.topic, self.archive, self.metrics, self.clock = config, topic, archive, metrics, clock
        self._open_reader, self._partitions, self.kept_ms = open_reader, partitions, kept_ms
        self._reader: Reader | None = None
        self._places: dict[int, _Place] = {}
        self._still: dict[int, str] = {}
        """Why the archive of a partition stands still."""
        self._told: dict[int, int] = {}
        """Of each partition where the newest gap begins that was told."""
        self._refused = ""
        """Why the whole archive does."""
        self._archived_to_ms = math.nan
        """The oldest record that is not archived is of this time, or of a later one."""
        self._lag = math.nan
        self._due_s = self._alarm_due_s = self._metrics_due_s = 0.0
        self._round: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._is_ending = False
        self._waits = Waits(clock)

    @property
    def is_busy(self) -> bool:
        """Whether a round is under way, or more waits for one."""
        return self._round is not None or self._lag != 0

    async def tick(self) -> None:
        """Begin a round that is due. Raises what nobody expected, and `Unavailable` for a call without an answer."""
        if self._failure is not None:
            raise self._failure
        self._waits.check()
        now_s, ours = self.clock.monotonic(), frozenset(self._partitions())
        if self._round is None and ours and now_s >= self._due_s and not self._refused:
            self._due_s = now_s + self.config.commit_ms / 1_000
            self._round = asyncio.ensure_future(self._work(ours))
        if now_s >= self._metrics_due_s:
            self._metrics_due_s = now_s + 1.0
            self.look_behind()

    async def finish(self) -> None:
        """Let a round that is under way end, for a moment: what it does not commit, the next process reads again."""
        self._is_ending = True
        if self._round is not None:
            await asyncio.wait([self._round], timeout=STOP_S)
        if self._failure is not None:
            raise self._failure
        if self._round is None and self._reader is not None:
            self._reader.close()

    def look_behind(self) -> None:
        """Tell how far the archive is behind, and alarm where it stands still or the topic may forget first."""
        behind_ms = self.clock.now_ms() - self._archived_to_ms
        behind_ms = 0.0 if behind_ms < 0 or not self._partitions() else behind_ms
        stopped = len(self._partitions()) if self._refused else len(self._still)
        self.metrics.set("archive_behind_ms", behind_ms)
        self.metrics.set("archive_lag_records", self._lag if self._partitions() else 0)
        self.metrics.set("archive_stopped", stopped)
        is_late = 0 <= self.kept_ms < 2 * behind_ms
        if (not is_late and not stopped) or self.clock.monotonic() < self._alarm_due_s:
            return
        self._alarm_due_s = self.clock.monotonic() + ALARM_EVERY_S
        for why in filter(None, (self._refused, *self._still.values())):
            log.error("the archive of events stands still: %s", why)
        if is_late:
            log.error(
                "the archive of %s is %.1f h behind and the topic keeps %.1f h: what it forgets before it is archived "
                "is lost to every replay. Raise the topic's retention.ms, restart the sink, then see whether the store "
                "takes writes.",
                *(self.topic, behind_ms / 3_600_000, self.kept_ms / 3_600_000),
            )

    async def _work(self, ours: frozenset[int]) -> None:
        try:
            is_whole = await self._waits.call("archive events", partial(self._one_round, ours))
            if not is_whole:
                self._due_s = 0.0
        except asyncio.CancelledError:
            raise
        except Unavailable as error:
            self._forget()
            self._due_s = self.clock.monotonic() + AGAIN_S
            if not self._is_ending:
                log.warning("a round of the archive is done again: %s", error)
        except InvariantBroken as error:
            self._refused = str(error)
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            self._round = None

    def _forget(self) -> None:
        """Ask archive and log again: nobody knows what a call that failed did."""
        self._places.clear()
        self._still.clear()
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    # -- one round, in a thread

    def _one_round(self, ours: frozenset[int]) -> bool:
        """Archive what is there of these partitions; return False where more waits."""
        self._places = {p: place for p, place in self._places.items() if p in ours}
        self._still = {p: why for p, why in self._still.items() if p in ours}
        now_ms = self.clock.now_ms()
        if self._reader is None:
            self._reader = self._open_reader()
        self._begin(ours)
        begins, ends = self._reader.begin_offsets(self.topic), self._reader.end_offsets(self.topic)
        taking = self._read(self._reader, {p: begins[p] for p in ours}, {p: ends[p] for p in ours})
        if taking.records:
            self._archived_to_ms = min(record.timestamp_ms for record in taking.records)
            self._commit(taking)
        self._tell(taking, ends, now_ms)
        return taking.is_whole or self._is_ending

    def _begin(self, ours: Collection[int]) -> None:
        new = [p for p in ours if p not in self._places]
        if not new:
            return
        state = self.archive.state()
        for partition in new:
            at = None if state is None else state.whole.get(partition)
            last = None if at is None else self.archive.last(partition)
            mark = None if last is None else mark_of(last)
            self._places[partition] = _Place(None if at is None else at.end, mark)
            log.info("%s/%d is archived up to offset %s", self.topic, partition, at.end if at else "none")

    def _read(self, reader: Reader, begins: Mapping[int, int], ends: Mapping[int, int]) -> _Round:
        """Read what is not archived yet, up to a commit's bytes."""
        froms: dict[int, int] = {}
        lost: dict[int, Offsets] = {}
        looked: dict[int, Mark] = {}
        """What must be there before anything else is taken, by partition."""
        begun: dict[int, int] = {}
        for partition, place in self._places.items():
            begin, end = begins[partition], ends[partition]
            following = begin if place.following is None else place.following
            if partition in self._still:
                continue
            if end < following:
                self._stand_still(partition, following, f"the topic ends at {end}")
                continue
            if begin > following:
                lost[partition] = Offsets(following, begin)
            begun[partition] = froms[partition] = max(begin, following)
            if place.last is not None and place.last.offset >= begin and end > following:
                looked[partition], froms[partition] = place.last, place.last.offset
        reading = {p: offset for p, offset in froms.items() if ends[p] > begun[p]}
        for partition in lost:
            self._tell_lost(partition, lost[partition])
        taking = _Round([], {}, lost, {}, True)
        if not reading:
            return taking
        try:
            found, is_whole = self._records(reader, reading, {p: ends[p] for p in reading}, looked)
        except InvariantBroken as error:
            # What begins and ends were asked of is deleted, or lost, since: the next round sees which.
            raise Unavailable(f"the topic changed while it was read: {error}") from error
        reader.assign({})
        last = {record.partition: record for record in found}
        kept = [record for record in found if record.partition not in self._still]
        for partition in reading.keys() - self._still.keys():
            newest = last.get(partition)
            # Offsets of no record, such as a transaction's marker, lie before an end that was reached.
            end = ends[partition] if is_whole else newest.offset + 1 if newest else begun[partition]
            if newest is not None:
                taking.taken[partition] = Offsets(begun[partition], end)
                taking.last[partition] = mark_of(newest)
        wanted = {p: span for p, span in lost.items() if p in taking.taken}
        return taking._replace(records=kept, lost=wanted, is_whole=is_whole)

    def _records(
        self, reader: Reader, froms: Mapping[int, int], ends: Mapping[int, int], looked: dict[int, Mark]
    ) -> tuple[list[VerbatimRecord], bool]:
        """Return new records, and whether all up to the ends were read."""
        found: list[VerbatimRecord] = []
        size = 0
        for record in read_range(reader, self.topic, begins=froms, ends=ends):
            mark = looked.pop(record.partition, None)
            if mark is not None:
                if mark_of(record) != mark:
                    what = "another record lies" if record.offset == mark.offset else "no record lies"
                    self._stand_still(record.partition, mark.offset + 1, f"{what} at offset {mark.offset} now")
                continue
            if record.partition in self._still:
                continue
            found.append(cast("VerbatimRecord", record))
            size += len(record.value or b"") + len(record.key or b"")
            if size >= self.config.commit_bytes or len(found) >= COMMIT_RECORDS or self._is_ending:
                return found, False
        for partition, mark in looked.items():
            self._stand_still(partition, mark.offset + 1, f"no record lies at offset {mark.offset} now")
        return found, True

    def _stand_still(self, partition: int, following: int, found: str) -> None:
        self._still[partition] = (
            f"{self.topic}/{partition} is archived up to offset {following}, and {found}: the broker has lost the "
            "topic's end, which it had confirmed. What is archived is what was there; what comes has offsets that are "
            "taken, and no reader puts the two together. See the brokers' logs and disks; bring the topic back, or "
            "raise log.generation to begin anew beside what is archived."
        )

    def _tell_lost(self, partition: int, lost: Offsets) -> None:
        if self._told.get(partition) == lost.begin:
            return
        self._told[partition] = lost.begin
        self.metrics.add("gap_total", topic=self.topic)
        log.error(
            "%s/%d: the topic forgot offsets %d to before %d before they were archived: no replay and no ledger has "
            "them any more, and both say so. Raise the topic's retention.ms; the sink was away or behind for longer.",
            *(self.topic, partition, *lost),
        )

    def _commit(self, taking: _Round) -> None:
        begin_s = self.clock.monotonic()
        self.archive.append(taking.records, taking.taken, taking.lost)
        for partition, span in taking.taken.items():
            self._places[partition] = _Place(span.end, taking.last[partition])
        self.metrics.add("archived_records_total", len(taking.records))
        size = sum(len(record.value or b"") + len(record.key or b"") for record in taking.records)
        self.metrics.add("archived_bytes_total", size)
        self.metrics.observe("archive_commit_seconds", self.clock.monotonic() - begin_s)

    def _tell(self, taking: _Round, ends: Mapping[int, int], now_ms: int) -> None:
        ours = {p: place for p, place in self._places.items() if p not in self._still}
        self._lag = sum(max(0, ends[p] - (place.following or 0)) for p, place in ours.items())
        if taking.is_whole:
            self._lag = 0
            self._archived_to_ms = now_ms
        elif taking.last:
            self._archived_to_ms = min(mark.time_ms for mark in taking.last.values())
