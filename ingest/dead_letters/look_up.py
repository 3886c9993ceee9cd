"""Looks late events up: whether their ids were taken before. Reads the log, and the lake where the log begins too late.

1. An event is in no record that is older than its time, less `EARLIER_MS` and `skew_ms` for clocks that differ. The
   partition is read from the first record of that time on, to its end. One pass answers for all letters of a call.
2. Where the partition does not reach back so far, samples of the event's hours are asked for its id.
   a. There it is: a repeat.
   b. The lake does not hold every sample of what the log no longer has: a later look-up can tell.
   c. It does, and it is an impression: it is new. Every impression has a sample once its windows are over.
   d. Anything else is unknown: feedback that was late, a duplicate or an orphan is in no sample.

The lake holds every sample of what was deleted where it has one that was resolved long enough after it. A partition in
which nobody sees anything any more has none: there the join's stored state tells, which moves on with every
punctuation. Its watermark is far enough, and the lake has all of `samples` that was there when the state was stored.

Found is a repeat even where the rest could not be read. Nothing is written here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

import pyarrow as pa

from headrace.contract.errors import Unavailable
from headrace.contract.formats.events import FEEDBACK, IMPRESSION
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.archive import TimeSeeker
from headrace.contract.interfaces.lake import JoinedUpTo, LakeState, StoredIds
from headrace.contract.interfaces.log import Reader, Record, read_range
from headrace.contract.project import Project
from headrace.ingest.dead_letters.letters import Letter

Verdict = Literal["new", "repeated", "unknown"]
EARLIER_MS = 600_000
"""How much older a record's time may be than its events', beside `ingest.skew_ms`: clocks that differ, and a watermark
that was behind."""
_PAUSE_RECORDS = 500
_HOUR_MS = 3_600_000
_ID_ONLY = pa.ipc.IpcReadOptions(included_fields=[0], use_threads=False)


class _Span(NamedTuple):
    """What the log has of a partition."""

    begin: int
    end: int
    begin_ms: int
    """Time of its first record, 0 where nothing was ever deleted before it."""


class LookUp:
    """Looks up letters of `too_late` events. For one thread."""

    def __init__(
        self,
        project: Project,
        topics: Topics,
        reader: Reader,
        stored: StoredIds | None,
        joined: JoinedUpTo | None = None,
        *,
        skew_ms: int,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        """`pause` is called every few hundred records; what it raises ends the look-up."""
        self._topics, self._reader, self._stored, self._pause = topics, reader, stored, pause
        self._joined = joined
        self._at_work: Callable[[], None] = lambda: None
        self._earlier_ms = EARLIER_MS + skew_ms
        self._windows_ms = max((task.window_ms + task.correct_ms for task in project.tasks), default=-1)

    def verdicts(self, letters: Sequence[Letter], at_work: Callable[[], None] = lambda: None) -> dict[int, Verdict]:
        """Return a verdict by each letter's offset; none for those that only a later look-up can tell.

        `at_work` is called as often as `pause`.

        Raises `Unavailable` where the log cannot be read, `InvariantBroken` where retention deletes what is being read.
        """
        found: dict[int, Verdict] = {}
        self._at_work = at_work
        begins, ends = self._reader.begin_offsets(self._topics.events), self._reader.end_offsets(self._topics.events)
        by_partition: defaultdict[int, list[Letter]] = defaultdict(list)
        for letter in letters:
            by_partition[letter.content.partition].append(letter)
        spans = {p: self._span(p, begins[p], ends[p]) for p in by_partition if p in begins}
        self._look_in_log({p: by_partition[p] for p in spans}, spans, found)
        left = []
        for letter in letters:
            span = spans.get(letter.content.partition)
            if span is None:
                found[letter.offset] = "unknown"
            elif letter.offset not in found:
                if self._since_ms(letter) >= span.begin_ms:
                    found[letter.offset] = "new"
                else:
                    left.append(letter)
        if left:
            self._look_in_lake(left, spans, found)
        return found

    def _turn(self) -> None:
        self._pause()
        self._at_work()

    def _since_ms(self, letter: Letter) -> int:
        return letter.content.event_time_ms - self._earlier_ms

    # -- 1. the log

    def _span(self, partition: int, begin: int, end: int) -> _Span:
        if begin == 0 and self._topics.generation == 1:
            return _Span(begin, end, 0)
        first = self._first_at(partition, begin, end)
        # An empty partition says nothing of any time.
        return _Span(begin, end, first.timestamp_ms if first is not None else 2**62)

    def _look_in_log(
        self, by_partition: Mapping[int, list[Letter]], spans: Mapping[int, _Span], found: dict[int, Verdict]
    ) -> None:
        wanted: dict[tuple[int, str], dict[str, list[int]]] = {}
        firsts, ends = {}, {}
        for partition, letters in by_partition.items():
            span = spans[partition]
            firsts[partition] = self._offset_at(partition, min(map(self._since_ms, letters)), span)
            ends[partition] = span.end
            for letter in letters:
                ids = wanted.setdefault((partition, letter.content.event_type), {})
                ids.setdefault(letter.content.event_id, []).append(letter.offset)
        for number, record in enumerate(read_range(self._reader, self._topics.events, begins=firsts, ends=ends)):
            if number % _PAUSE_RECORDS == 0:
                self._turn()
            kind = record.headers.get("kind", "")
            if record.value is None or kind not in (IMPRESSION, FEEDBACK):
                continue
            ids = wanted.get((record.partition, record.headers.get("type") or kind), {})
            if ids:
                for event_id in ids.keys() & set(_ids_of(record.value)):
                    found.update(dict.fromkeys(ids[event_id], "repeated"))

    def _offset_at(self, partition: int, time_ms: int, span: _Span) -> int:
        """Return an offset before which no record is of `time_ms` or later. The broker's times grow along a partition;
        a record without a time counts as one of 0."""
        low, high = span.begin, span.end
        if isinstance(self._reader, TimeSeeker):
            self._turn()
            known = self._reader.offset_at(self._topics.events, partition, time_ms)
            if known is not None:
                return max(low, known)
        while low < high:
            middle = (low + high) // 2
            record = self._first_at(partition, middle, high)
            if record is None or record.timestamp_ms >= time_ms:
                high = middle
            else:
                low = record.offset + 1
        return low

    def _first_at(self, partition: int, offset: int, end: int) -> Record | None:
        """Return the first record from `offset` on and before `end`."""
        self._turn()
        topic = self._topics.events
        return next(iter(read_range(self._reader, topic, begins={partition: offset}, ends={partition: end})), None)

    # -- 2. the lake

    def _look_in_lake(self, letters: Iterable[Letter], spans: Mapping[int, _Span], found: dict[int, Verdict]) -> None:
        """Judge what the log cannot tell; where the lake is away, or has not got so far, it is left for later."""
        if self._stored is None or self._windows_ms < 0:
            found.update((letter.offset, "unknown") for letter in letters)
            return
        by_hour: defaultdict[int, list[Letter]] = defaultdict(list)
        for letter in letters:
            by_hour[letter.content.event_time_ms // _HOUR_MS].append(letter)
        for hour, ours in sorted(by_hour.items()):
            self._turn()
            try:
                # Before the rows: what a later version stores as well is no matter, what it promises would be.
                state = self._stored.state()
            except Unavailable:
                return
            # One hour that cannot be read holds up no other.
            with suppress(Unavailable):
                self._look_in_hour(state, hour, ours, spans, found)

    def _look_in_hour(
        self,
        state: LakeState | None,
        hour: int,
        letters: list[Letter],
        spans: Mapping[int, _Span],
        found: dict[int, Verdict],
    ) -> None:
        assert self._stored is not None
        begin_ms, end_ms = hour * _HOUR_MS, (hour + 1) * _HOUR_MS
        impressions = [one for one in letters if one.content.event_type == IMPRESSION]
        feedback = [one for one in letters if one.content.event_type != IMPRESSION]
        # An impression that a feedback answers may be as much older as its windows are long.
        for ours, earlier_ms, column in (
            (impressions, 0, "event_id"),
            (feedback, self._windows_ms + self._earlier_ms, "feedback_id"),
        ):
            ids = {one.content.event_id for one in ours}
            there = self._stored.stored(ids, column, begin_ms - earlier_ms, end_ms) if ids else frozenset[str]()
            found.update((one.offset, "repeated") for one in ours if one.content.event_id in there)
        whole: dict[int, bool] = {}
        for one in _left(letters, found):
            if state is None or one.content.event_time_ms < state.retained_before_ms:
                found[one.offset] = "unknown"
                continue
            partition = one.content.partition
            if partition not in whole:
                whole[partition] = self._has_all(state, partition, spans[partition])
            if whole[partition]:
                found[one.offset] = "new" if one.content.event_type == IMPRESSION else "unknown"

    def _has_all(self, state: LakeState, partition: int, span: _Span) -> bool:
        """Say whether the lake holds every sample of what the log of a partition no longer has."""
        if span.begin_ms >= 2**62:
            return False
        # All that was deleted was read by the watermark of the first record that is left.
        over_ms = span.begin_ms + self._windows_ms + self._earlier_ms
        if state.positions.at(partition).offset >= self._offset_at(partition, over_ms, span):
            return True
        joined = self._joined.joined(partition) if self._joined is not None else None
        if joined is None or joined.watermark_ms < over_ms:
            return False
        # After the state was read: what it led to had been delivered when it was stored.
        samples_end = self._reader.end_offsets(self._topics.samples)[partition]
        return state.next_offsets.get(partition, 0) >= samples_end


def _left(letters: Iterable[Letter], found: Mapping[int, Verdict]) -> list[Letter]:
    return [one for one in letters if one.offset not in found]


def _ids_of(value: bytes) -> list[str]:
    """Return the ids of a record's events; none where it is no batch, which the stream takes nothing of either."""
    try:
        with pa.ipc.open_stream(pa.py_buffer(value), options=_ID_ONLY) as reader:
            return [event_id for batch in reader for event_id in batch.column(0).to_pylist()]
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return []
