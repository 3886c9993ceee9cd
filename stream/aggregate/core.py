"""The aggregator's core: counters over all partitions, settled on a grid of event time. Pure.

What a grid point T holds does not depend on how partitions were read in turn: of every partition exactly the rows of
event times up to T that lie before the punctuation with which that partition's own watermark reached T.

A change of rules is in force in a partition from its record's offset, as in the join. A counter that a change brings
counts each partition's rows from that partition's change on, and is settled from the first grid point on that no
partition reached before its change: whoever reads its values has read the change. A counter that all partitions have
dropped counts no more, is settled while its windows empty, and then is gone. Others go on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from headrace.contract.errors import ConfigRejected, EventRejected, InvariantBroken
from headrace.contract.formats.events import (
    FEEDBACK,
    IMPRESSION,
    PUNCTUATION,
    SPEC,
    decode_batch,
    decode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.hashing import hash_text
from headrace.contract.interfaces.log import Record
from headrace.contract.project import Project
from headrace.contract.rules import Rules, check_growth, decode_change, lanes_of, rules_of
from headrace.contract.spec import Counter
from headrace.kernels.arrays import U64s
from headrace.kernels.hashes import hash128_texts
from headrace.stream.features.counters import CounterState, amounts, feeds, key_strings, value_as_of
from headrace.stream.join.late_rows import counted_from_ms
from headrace.stream.join.recent_keys import RecentKeys
from headrace.stream.join.record_columns import checked
from headrace.stream.join.watermark import Watermark

VERSION = 3
_NEVER = 2**62
NOT_YET, ENDED = -1, -2
"""Instead of a grid point: the partition does not count for a counter yet, or no more."""

Staged = tuple[int, str, int, int, int]
"""Number of the counter, key, entry, event time, amount."""


@dataclass(frozen=True)
class Settled:
    """One key's values as of a grid point; `buckets` is empty when nothing is in the window any more."""

    counter: str
    key: str
    as_of_ms: int
    counts: list[float]
    bucket_ms: int
    buckets: dict[int, list[int]]
    is_shared: bool = True
    """False for a counter with the partition key in its own, which each partition keeps itself."""


class _Reading:
    """By which rules a partition is read, and the lanes that its rules have used so far."""

    def __init__(self, project: Project, number: int, rules: Rules, lanes: Sequence[tuple[str, str]]) -> None:
        self.number, self.rules = number, rules
        self.lanes = [*lanes, *(lane for lane in lanes_of(rules.tasks) if lane not in lanes)]
        project = rules.over(project)
        self.counters = project.features.counters
        self.impressions = impression_schema(project)
        self.feedback = {f.name: feedback_schema(project, f) for f in project.feedback}


class AggregatorState:
    """Counters of every key, and per partition what its watermark has not settled yet."""

    def __init__(self, project: Project, partitions: int, *, grid_ms: int, silent_ms: int, horizon_ms: int) -> None:
        self.project, self.grid_ms, self.horizon_ms = project, grid_ms, horizon_ms
        self.counters: dict[int, CounterState] = {}
        self._begins: dict[int, list[int]] = {}
        """Of each counter, by partition, the first grid point that its rows count for."""
        self._live: set[int] = set()
        """Counters that are settled."""
        self._numbered = 0
        self.offsets = [-1] * partitions
        self.watermarks = [Watermark(silent_ms) for _ in range(partitions)]
        self.seen = [RecentKeys(horizon_ms) for _ in range(partitions)]
        self.staged: list[dict[int, list[Staged]]] = [{} for _ in range(partitions)]
        """Per partition the rows that a grid point, or the first one after it, takes in."""
        self.settled_ms = -1
        self.epoch_seen = -1
        self.bad_records = 0
        """Since this object was made; no part of the state."""
        first = _Reading(project, 1, rules_of(project), ())
        self.readings = [first] * partitions
        for counter in first.counters:
            number = self._number_of(counter)
            self._begins[number] = [0] * partitions
            self._live.add(number)

    def take(self, record: Record) -> list[Settled]:
        """Apply one record and return what it settled; one at or below the partition's offset is ignored.

        One that can't be decoded is counted (`bad_records`) and changes nothing else, in the join and here alike.
        """
        partition = record.partition
        if record.offset <= self.offsets[partition] or record.value is None:
            return []
        self.offsets[partition] = record.offset
        kind = record.headers.get("kind", "")
        try:
            if kind == PUNCTUATION:
                told = decode_punctuation(record.value)
                watermark_ms = self.watermarks[partition].take(told, record.timestamp_ms)
                self.seen[partition].advance(watermark_ms)
                return self._settle()
            reading, name = self.readings[partition], record.headers.get("type", "")
            if kind == IMPRESSION:
                batch = checked(decode_batch(record.value, reading.impressions))
                self._stage(partition, IMPRESSION, batch, record.headers)
            elif kind == FEEDBACK and name in reading.feedback:
                batch = checked(decode_batch(record.value, reading.feedback[name]))
                self._stage(partition, name, batch, record.headers)
            elif kind == SPEC:
                self._change(record, record.value)
        except (EventRejected, msgspec.DecodeError):
            self.bad_records += 1
        return []

    def _change(self, record: Record, value: bytes) -> None:
        """Read the partition by other rules from now on; what the join ignores is ignored here too."""
        partition, before = record.partition, self.readings[record.partition]
        change = decode_change(value, where=f"{record.topic}/{partition} offset {record.offset}")
        if change.number <= before.number:
            return
        try:
            check_growth(before.rules, change.rules, before.lanes)
        except ConfigRejected:
            return
        reading = self.readings[partition] = _Reading(self.project, change.number, change.rules, before.lanes)
        following = self.watermarks[partition].time_ms // self.grid_ms + 1
        counted = {self._number_of(counter) for counter in reading.counters}
        for number, begins in self._begins.items():
            if number not in counted:
                begins[partition] = ENDED
            elif begins[partition] < 0:
                begins[partition] = max(0, following)

    def _number_of(self, counter: Counter) -> int:
        """Return the number of a counter: the one that it has, or a new one that no other will get."""
        known = next((number for number, state in self.counters.items() if state.counter == counter), None)
        if known is not None:
            return known
        number = self._numbered
        self._numbered += 1
        self.counters[number] = CounterState(counter)
        self._begins[number] = [NOT_YET] * len(self.offsets)
        return number

    def _stage(self, partition: int, name: str, batch: Any, headers: Mapping[str, str]) -> None:
        reached = self.watermarks[partition].time_ms // self.grid_ms
        times = batch.column("event_time_ms").to_pylist()
        # What the join drops is counted nowhere.
        from_ms = counted_from_ms(headers, self.watermarks[partition].time_ms, self.horizon_ms)
        keys_N2 = hash128_texts(batch.column("event_id"), hash_text(name))
        fresh = _unseen(self.seen[partition], keys_N2, [time_ms >= from_ms for time_ms in times])
        for index, state in self.counters.items():
            if self._begins[index][partition] < 0:
                continue
            fed = [(feed.entry, amounts(feed, batch).tolist()) for feed in feeds(state.counter, name)]
            if not fed:
                continue
            keys = key_strings([batch.column(field) for field in state.counter.key_fields])
            for row in fresh:
                key_text = keys[row]
                if key_text is not None:
                    # A value as of T knows nothing later than T, however early that came.
                    at = max(reached + 1, -(-times[row] // self.grid_ms))
                    rows = self.staged[partition].setdefault(at, [])
                    rows += [(index, key_text, entry, times[row], adds[row]) for entry, adds in fed]

    def _settle(self) -> list[Settled]:
        top = min(w.time_ms for w in self.watermarks) // self.grid_ms
        if top < 0:
            return []
        settled: list[Settled] = []
        grid = self.settled_ms // self.grid_ms + 1 if self.settled_ms >= 0 else top
        points = sorted({at for staged in self.staged for at in staged})
        first = grid
        while grid <= top:
            settled += self._settle_at(grid, is_first=grid == first)
            grid = max(grid + 1, min(top, self._following(grid, points)))
        self.settled_ms = max(self.settled_ms, top * self.grid_ms)
        return settled

    def _following(self, grid: int, points: Sequence[int]) -> int:
        """Return the next point at which something can change: rows (at `points`, in order), a bucket's end, or the
        first point of a counter that is new."""
        place = bisect_right(points, grid)
        changes = list(points[place : place + 1])
        for index, state in self.counters.items():
            if state.rows:
                end_ms = (grid * self.grid_ms // state.width_ms + 1) * state.width_ms
                changes.append(-(-end_ms // self.grid_ms))
            if index not in self._live and NOT_YET not in self._begins[index]:
                changes.append(max(grid + 1, *self._begins[index]))
        return min(changes, default=_NEVER)

    def _settle_at(self, grid: int, *, is_first: bool) -> list[Settled]:
        as_of_ms = grid * self.grid_ms
        changed: dict[int, set[str]] = {index: set() for index in self.counters}
        for index, state in self.counters.items():
            left = as_of_ms // state.width_ms - state.counter.buckets
            before = (as_of_ms - self.grid_ms) // state.width_ms - state.counter.buckets
            for bucket in range(max(before, left - 2 * state.counter.buckets) + 1, left + 1):
                changed[index] |= state.keys_of(bucket)
        for staged in self.staged:
            # Points are visited in order; before the first one of a call there may be rows of earlier ones.
            for at in [at for at in staged if at <= grid] if is_first else [grid] * (grid in staged):
                for index, key, entry, time_ms, amount in staged.pop(at):
                    self.counters[index].add(key, entry, time_ms, amount)
                    changed[index].add(key)
        for index in self.counters.keys() - self._live:
            begins = self._begins[index]
            if NOT_YET not in begins and grid >= max(begins):
                self._live.add(index)
                changed[index] |= self.counters[index].rows.keys()
        settled = [
            self._value(state, key, as_of_ms)
            for index, state in self.counters.items()
            if index in self._live
            for key in sorted(changed[index])
        ]
        for state in self.counters.values():
            state.advance(as_of_ms)
        self._forget_dropped()
        return settled

    def _forget_dropped(self) -> None:
        """Let go of counters that no partition counts for any more and whose windows are empty."""
        for index in [i for i, begins in self._begins.items() if set(begins) == {ENDED} and not self.counters[i].rows]:
            if not any(item[0] == index for staged in self.staged for rows in staged.values() for item in rows):
                del self.counters[index], self._begins[index]
                self._live.discard(index)

    def _value(self, state: CounterState, key: str, as_of_ms: int) -> Settled:
        row = state.rows.get(key, {})
        oldest = as_of_ms // state.width_ms - state.counter.buckets + 1
        counts = [float(c) for c in value_as_of(row, state.counter, as_of_ms)]
        kept = {b: list(c) for b, c in sorted(row.items()) if b >= oldest}
        is_shared = not state.counter.is_local(self.project.impression.key)
        return Settled(state.counter.name, key, as_of_ms, counts, state.width_ms, kept, is_shared)

    def to_plain(self) -> dict[str, Any]:
        """Return the state as dicts, lists, numbers, texts and bytes."""
        return {
            "v": VERSION,
            "offsets": self.offsets,
            "watermarks": [w.to_plain() for w in self.watermarks],
            "seen": [_plain_memory(memory) for memory in self.seen],
            "staged": [[[at, rows] for at, rows in sorted(staged.items())] for staged in self.staged],
            "readings": [[r.number, msgspec.to_builtins(r.rules), r.lanes] for r in self.readings],
            "counters": [
                [n, msgspec.to_builtins(c.counter), self._begins[n], n in self._live, c.to_plain()]
                for n, c in self.counters.items()
            ],
            "numbered": self._numbered,
            "settled_ms": self.settled_ms,
            "epoch_seen": self.epoch_seen,
        }

    def load_plain(self, plain: dict[str, Any]) -> None:
        """Take over what `to_plain` gave. Raises `InvariantBroken` for a state of another format or partition key."""
        key = self.project.impression.key
        if plain.get("v") != VERSION or plain["readings"][0][1]["key"] != key:
            raise InvariantBroken(
                f"the stored counters are of format {plain.get('v', 1)}, this is {VERSION}; or their partition key is "
                f"not {key!r}. Raise log.generation to begin anew."
            )
        self.offsets = list(plain["offsets"])
        _load_each(self.watermarks, plain["watermarks"])
        for memory, (slices, first, keys, values) in zip(self.seen, plain["seen"], strict=True):
            keys_N2 = np.frombuffer(keys, np.uint64).reshape(-1, 2)
            memory.load([(start_ms, seq) for start_ms, seq in slices], first, keys_N2, np.frombuffer(values, np.uint8))
        self.readings = [
            _Reading(self.project, number, msgspec.convert(rules, Rules), [(task, of) for task, of in lanes])
            for number, rules, lanes in plain["readings"]
        ]
        self.counters, self._begins, self._live, self._numbered = {}, {}, set(), plain["numbered"]
        for number, declared, begins, is_live, rows in plain["counters"]:
            self.counters[number] = CounterState(msgspec.convert(declared, Counter))
            self.counters[number].load_plain(rows)
            self._begins[number] = list(begins)
            self._live |= {number} if is_live else set()
        self.staged = [{at: [(i, k, e, t, a) for i, k, e, t, a in rows] for at, rows in s} for s in plain["staged"]]
        self.settled_ms, self.epoch_seen = plain["settled_ms"], plain["epoch_seen"]


def _unseen(seen: RecentKeys, keys_N2: U64s, counted_N: Sequence[bool]) -> list[int]:
    """Return the rows that count and were not seen before, here or earlier in the batch, and remember these."""
    fresh: dict[bytes, int] = {}
    for row, known in enumerate(seen.get(keys_N2)):
        if known is None and counted_N[row]:
            fresh.setdefault(keys_N2[row].tobytes(), row)
    rows = list(fresh.values())
    seen.put(keys_N2[rows], np.zeros(len(rows), np.uint8))
    return rows


def _plain_memory(memory: RecentKeys) -> list[Any]:
    first, following = memory.live
    keys_N2, values_N = memory.rows(first, following)
    return [memory.slices, first, keys_N2.tobytes(), values_N.tobytes()]


def _load_each(several: Sequence[Any], plains: Sequence[Any]) -> None:
    for one, plain in zip(several, plains, strict=True):
        one.load_plain(plain)
