"""`events` as one log: from the archive what the topic no longer has, from the topic the rest.

1. Below the topic's first record a partition is read from one version of the archive, which is leased meanwhile; from
   there on from the topic, which is nearer. Equal records lie in both.
2. Where both are, they are held together: the topic must have the newest archived record at its offset, or have
   forgotten it. Where it has another one there, or ends before, the broker has lost the topic's end, and no order holds
   for what was archived and what came since: `InvariantBroken` says so.
3. Offsets that the topic forgot before they were archived, or that the archive's retention dropped, are refused with
   both ends. `begin_offsets` is the first offset from which all is there.

Other topics are read as ever. A group of rows of a file, some 4 MiB, is in memory for each file that is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from headrace.contract.errors import InvariantBroken
from headrace.contract.interfaces.archive import ArchiveReader, ArchiveState, Offsets
from headrace.contract.interfaces.log import Reader, Record, read_range

SOME_BYTES = 8 * 1024 * 1024
"""A poll ends with the record that reaches it."""


class ArchivedReader:
    """A `Reader` over topic and archive. For one thread."""

    def __init__(
        self,
        live: Reader,
        archive: ArchiveReader,
        topic: str,
        *,
        holder: str,
        cuts: Mapping[int, int] | None = None,
    ) -> None:
        """Open nothing yet.

        Args:
            topic: that is archived.
            holder: names the lease.
            cuts: by partition, below which offset the archive is read where both have it; the topic's first by default.
        """
        self._live, self._archive, self._topic, self._holder = live, archive, topic, holder
        self._cuts = dict(cuts or {})
        self._is_asked = False
        self._state: ArchiveState | None = None
        """Of the version that is leased; None where there is no archive."""
        self._stored: dict[int, _Stored] = {}
        """The partitions that are read from the archive now."""
        self._from_live: list[tuple[str, int]] = []
        """Those that are read from the topic."""

    def assign(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Read on from these offsets; replaces the former assignment.

        Raises `InvariantBroken` where an offset is in neither any more, `Unavailable`.
        """
        self._stored, self._from_live = {}, []
        begins = self._live.begin_offsets(self._topic) if any(topic == self._topic for topic, _ in offsets) else {}
        live = {}
        for (topic, partition), offset in offsets.items():
            cut = self._cuts.get(partition, begins.get(partition, 0)) if topic == self._topic else 0
            if offset >= cut:
                live[topic, partition] = offset
                continue
            state = self._reaching(partition, offset, begins[partition])
            till = min(cut, state.whole[partition].end)
            records = self._archive.read(state.version, partition, Offsets(offset, till))
            self._stored[partition] = _Stored(records, offset, till)
        self._assign_live(live)

    def poll(self, records_max: int, timeout_s: float) -> Sequence[Record]:
        """Return up to `records_max` records, in order within a partition, those of the archive first. Raises as
        `Reader.poll`."""
        for partition in list(self._stored):
            # Each in its turn: whoever waits for another partition gets it soon.
            stored = self._stored.pop(partition)
            found = stored.some(records_max)
            if stored.is_read:
                self._assign_live({**self._live_positions(), (self._topic, partition): stored.till})
            else:
                self._stored[partition] = stored
            if found:
                return found
        try:
            return self._live.poll(records_max, timeout_s)
        except InvariantBroken:
            begins, places = self._live.begin_offsets(self._topic), self._live_positions()
            if not any(topic == self._topic and at < begins[p] for (topic, p), at in places.items()):
                raise
            # The topic forgot what was to come next: the archive may have it.
            self.assign(places)
            return ()

    def position(self, topic: str, partition: int) -> int:
        """Return the offset that an assigned partition is read to."""
        stored = self._stored.get(partition) if topic == self._topic else None
        return self._live.position(topic, partition) if stored is None else stored.following

    def begin_offsets(self, topic: str) -> dict[int, int]:
        """Return the first offset of every partition from which all is there. Raises `Unavailable`, and
        `InvariantBroken` where topic and archive do not fit."""
        begins = self._live.begin_offsets(topic)
        if topic != self._topic:
            return begins
        state = self._known()
        whole = {} if state is None else state.whole
        # Where the archive ends before the topic begins, what is between is nowhere.
        return {
            p: whole[p].begin if p in whole and whole[p].begin <= begin <= whole[p].end else begin
            for p, begin in begins.items()
        }

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Return, a partition, the offset that a reader can read up to now."""
        return self._live.end_offsets(topic)

    def offset_at(self, topic: str, partition: int, time_ms: int) -> int | None:
        """Return the offset of the first archived record of this time or later; None where the archive has none: what
        there is of that time lies in the topic."""
        state = self._known() if topic == self._topic else None
        if state is None or partition not in state.whole:
            return None
        return self._archive.offset_at(state.version, partition, time_ms)

    def close(self) -> None:
        """Stop reading, and give the lease back."""
        if self._state is not None:
            self._archive.let_go(self._holder)
        self._live.close()

    def _assign_live(self, offsets: Mapping[tuple[str, int], int]) -> None:
        self._from_live = list(offsets)
        self._live.assign(offsets)

    def _live_positions(self) -> dict[tuple[str, int], int]:
        return {place: self._live.position(*place) for place in self._from_live}

    def _known(self) -> ArchiveState | None:
        return self._state if self._is_asked else self._newest()

    def _newest(self) -> ArchiveState | None:
        """Lease the newest version, look that the topic fits to it, and return what it holds."""
        state = self._archive.state()
        if state is not None:
            self._archive.hold(state.version, self._holder)
            reading = self._live_positions()
            begins, ends = self._live.begin_offsets(self._topic), self._live.end_offsets(self._topic)
            for partition, whole in state.whole.items():
                self._check_kept(partition, whole.end, begins[partition], ends[partition])
            self._assign_live(reading)
        self._state, self._is_asked = state, True
        return state

    def _reaching(self, partition: int, offset: int, begin: int) -> ArchiveState:
        """Return the state of a version that has a partition from `offset` on up to where the topic begins.

        Raises `InvariantBroken` where there is none.
        """
        state = self._known()
        if state is not None and partition in state.whole and state.whole[partition].end < begin:
            # The topic forgot more since, and the sink archived it before.
            state = self._newest()
        whole = None if state is None else state.whole.get(partition)
        what = f"{self._topic}/{partition}: offset {offset} is wanted, the topic begins at {begin}"
        if state is None or whole is None:
            raise InvariantBroken(f"{what}, and nothing of it is archived.")
        if whole.end < begin:
            raise InvariantBroken(
                f"{what} and the archive ends at {whole.end}: offsets {whole.end} to before {begin} were forgotten "
                "before they were archived. Reading on would skip them; what comes from the topic's first record on "
                "is whole."
            )
        if offset < whole.begin:
            lost = state.lost.get(partition)
            why = (
                f"offsets {lost.begin} to before {lost.end} were forgotten before they were archived"
                if lost is not None and lost.end == whole.begin
                else "archive.retention_ms dropped what lay before"
            )
            raise InvariantBroken(f"{what} and the archive is whole from {whole.begin} on: {why}.")
        return state

    def _check_kept(self, partition: int, end: int, begin: int, topic_end: int) -> None:
        """Raise `InvariantBroken` where the topic does not go on from what is archived."""
        if topic_end < end:
            raise self._lost(partition, end, f"the topic ends at {topic_end}")
        last = self._archive.last(partition)
        if last is None or last.offset < begin:
            return
        place = {partition: last.offset}, {partition: last.offset + 1}
        found = next(iter(read_range(self._live, self._topic, begins=place[0], ends=place[1])), None)
        if found is None or _content(found) != _content(last):
            raise self._lost(partition, end, f"{'no' if found is None else 'another'} record lies at {last.offset} now")

    def _lost(self, partition: int, end: int, found: str) -> InvariantBroken:
        return InvariantBroken(
            f"{self._topic}/{partition} is archived up to offset {end}, and {found}: the broker has lost the topic's "
            "end, which it had confirmed. What is archived is what was there, and can be read as the Delta table that "
            "it is; no order holds for it and what came since. See the brokers' logs and disks; bring the topic back, "
            "or raise log.generation."
        )


class _Stored:
    """Records of a partition that are read from the archive."""

    def __init__(self, records: Iterator[Record], following: int, till: int) -> None:
        self._records, self.following, self.till = records, following, till
        self.is_read = False

    def some(self, records_max: int) -> list[Record]:
        found: list[Record] = []
        size = 0
        while len(found) < records_max and size < SOME_BYTES:
            record = next(self._records, None)
            if record is None:
                self.is_read = True
                break
            found.append(record)
            size += len(record.value or b"")
            self.following = record.offset + 1
        return found


def _content(record: Record) -> tuple[object, ...]:
    return record.offset, record.timestamp_ms, record.key, record.value, record.headers
