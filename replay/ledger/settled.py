"""Whether the aggregator wrote what it should: every value of the log, counted again from the events alone.

By definition a value as of a grid point T takes in, of every partition, the rows of event times up to T that lie before
the punctuation with which that partition's own watermark reached T; a row that came later counts from the first grid
point after it. So each row counts from `enter` until its bucket leaves the window at `leave`, and at exactly these two
grid points its key gets a value. Slow and plain on purpose: nothing here is the aggregator's but the watermark's rule.

Legend: N events of one key, T values of one key, E entries of the counter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.config import Config
from headrace.contract.errors import EventRejected
from headrace.contract.formats.events import (
    AGGREGATE,
    AGGREGATE_SCHEMA,
    FEEDBACK,
    IMPRESSION,
    PUNCTUATION,
    decode_batch,
    decode_punctuation,
)
from headrace.contract.interfaces.log import Record
from headrace.contract.project import Project
from headrace.contract.spec import Counter
from headrace.stream.features.counters import amounts, bucket_ms, feeds, key_strings, weights
from headrace.stream.join.late_rows import counted_from_ms
from headrace.stream.join.watermark import Watermark

I64s = npt.NDArray[np.int64]
Key = tuple[str, str]
"""Counter and key."""

VALUES_AT_ONCE = 64
"""Values of one key that are counted together: bounds [T, N]."""


class SettledCounts(msgspec.Struct, kw_only=True):
    """What the check found. All is well when only `values` is not 0."""

    values: int = 0
    """Rows in the log, of all partitions and epochs."""
    wrong: int = 0
    """Rows whose counts are not those of the events."""
    missing: int = 0
    """Grid points at which a key changed and a partition has no row."""
    undue: int = 0
    """Rows at grid points at which nothing of their key changed: what bounds the rate."""

    def closes(self) -> bool:
        """Say whether every value is right, there, and due."""
        return self.wrong == self.missing == self.undue == 0


@dataclass
class _Events:
    """Rows of one key, as lists until they are counted."""

    times: list[int] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    """Number of the grid point that a row counts from."""
    entries: list[int] = field(default_factory=list)
    amounts: list[int] = field(default_factory=list)


@dataclass
class _Values:
    """Rows of one key in one partition."""

    as_of: list[int] = field(default_factory=list)
    counts: list[list[float]] = field(default_factory=list)


@dataclass
class _Log:
    """What the log holds: events by key, values by partition and key, and how far each watermark came."""

    events: dict[Key, _Events] = field(default_factory=dict)
    values: dict[int, dict[Key, _Values]] = field(default_factory=dict)
    reached: dict[int, int] = field(default_factory=dict)


def check_settled(
    project: Project, config: Config, records: Iterable[Record], *, upto_ms: int = 2**62
) -> SettledCounts:
    """Hold every aggregate of `events` against the events before it.

    Args:
        records: the whole topic, in order within a partition, any partition first.
        upto_ms: punctuation with a later timestamp is not waited for: its values may be on their way.
    """
    found = _read(project, config, records, upto_ms)
    counts = SettledCounts()
    for values in found.values.values():
        counts.values += sum(len(each.as_of) for each in values.values())
    partitions = range(config.log.partitions)
    if len(found.reached) < len(partitions):
        counts.wrong = counts.values
        return counts
    grid_ms = config.aggregate.grid_ms
    top = min(found.reached.values()) // grid_ms
    first = min((min(each.as_of) for v in found.values.values() for each in v.values()), default=top * grid_ms)
    for key, events in found.events.items():
        counter = next(c for c in project.features.counters if c.name == key[0])
        rows = _Rows(counter, events, grid_ms=grid_ms, first=first)
        due = rows.due()
        for partition in partitions:
            said = found.values.get(partition, {}).pop(key, _Values())
            as_of = set(said.as_of)
            counts.missing += len({at for at in due if at <= top * grid_ms} - as_of)
            counts.undue += len(as_of - due)
            counts.wrong += rows.wrong(said)
    # What is left has no event at all.
    counts.wrong += sum(len(each.as_of) for values in found.values.values() for each in values.values())
    return counts


def _read(project: Project, config: Config, records: Iterable[Record], upto_ms: int) -> _Log:
    others = [c for c in project.features.counters if not c.is_local(project.impression.key)]
    grid_ms, log = config.aggregate.grid_ms, _Log()
    watermarks: dict[int, Watermark] = {}
    seen: set[tuple[int, str, str]] = set()
    for record in records:
        partition, kind = record.partition, record.headers.get("kind", "")
        if record.value is None:
            continue
        watermark = watermarks.setdefault(partition, Watermark(config.ingest.silent_ms))
        try:
            if kind == PUNCTUATION:
                reached_ms = watermark.take(decode_punctuation(record.value), record.timestamp_ms)
                if record.timestamp_ms <= upto_ms:
                    log.reached[partition] = reached_ms
            elif kind == AGGREGATE:
                _keep_values(log, partition, decode_batch(record.value, AGGREGATE_SCHEMA))
            batch = decode_batch(record.value) if kind in (IMPRESSION, FEEDBACK) else None
        except (EventRejected, msgspec.DecodeError):
            continue  # The join counts it.
        if batch is not None:
            name = record.headers.get("type", kind)
            from_ms = counted_from_ms(record.headers, watermark.time_ms, config.join.repeat_horizon_ms)
            fresh = list(_fresh(batch, partition, name, seen, from_ms))
            for counter in others:
                _keep_events(log, counter, name, batch, fresh, watermark.time_ms // grid_ms, grid_ms)
    return log


def _fresh(
    batch: pa.RecordBatch, partition: int, name: str, seen: set[tuple[int, str, str]], from_ms: int
) -> Iterator[int]:
    times = batch.column("event_time_ms").to_pylist()
    for row, event_id in enumerate(batch.column("event_id").to_pylist()):
        if (partition, name, event_id) not in seen and times[row] >= from_ms:
            seen.add((partition, name, event_id))
            yield row


def _keep_events(
    log: _Log, counter: Counter, name: str, batch: pa.RecordBatch, fresh: list[int], reached: int, grid_ms: int
) -> None:
    fed = [(feed.entry, amounts(feed, batch).tolist()) for feed in feeds(counter, name)]
    if not fed:
        return
    keys = key_strings([batch.column(field) for field in counter.key_fields])
    times = batch.column("event_time_ms").to_pylist()
    for row in fresh:
        key = keys[row]
        if key is None:
            continue
        events = log.events.setdefault((counter.name, key), _Events())
        for entry, adds in fed:
            events.times.append(times[row])
            events.at.append(max(reached + 1, -(-times[row] // grid_ms)))
            events.entries.append(entry)
            events.amounts.append(adds[row])


def _keep_values(log: _Log, partition: int, batch: pa.RecordBatch) -> None:
    ours = log.values.setdefault(partition, {})
    names, keys, as_of, _, counts = (column.to_pylist() for column in batch.columns)
    for name, key, at_ms, row in zip(names, keys, as_of, counts, strict=True):
        values = ours.setdefault((name, key), _Values())
        values.as_of.append(at_ms)
        values.counts.append(row)


class _Rows:
    """The events of one key, each from `enter` to `leave`, both in milliseconds."""

    def __init__(self, counter: Counter, events: _Events, *, grid_ms: int, first: int) -> None:
        self.counter, self.grid_ms = counter, grid_ms
        self.width_ms = bucket_ms(counter)
        self.time_N = np.array(events.times, np.int64)
        self.bucket_N = self.time_N // self.width_ms
        self.enter_N = np.maximum(np.array(events.at, np.int64) * grid_ms, first)
        self.leave_N = (self.bucket_N + counter.buckets) * self.width_ms
        self.entry_N = np.array(events.entries, np.int64)
        self.amount_N = np.array(events.amounts, np.int64)

    def due(self) -> set[int]:
        """Return the grid points at which the key gets a value."""
        leave_N = -(-self.leave_N // self.grid_ms) * self.grid_ms
        return set(self.enter_N.tolist()) | set(leave_N[self.leave_N > self.enter_N].tolist())

    def wrong(self, said: _Values) -> int:
        """Return how many of the values are not what the events give."""
        count = 0
        for start in range(0, len(said.as_of), VALUES_AT_ONCE):
            as_of_T = np.array(said.as_of[start : start + VALUES_AT_ONCE], np.int64)
            right_TE = self._values(as_of_T).astype(np.float32)
            rows = said.counts[start : start + VALUES_AT_ONCE]
            count += sum(row != right for row, right in zip(rows, right_TE.tolist(), strict=True))
        return count

    def _values(self, as_of_T: I64s) -> npt.NDArray[np.float64]:
        kinds = [entry.kind for entry in self.counter.entries()]
        weight_of = weights(self.counter)
        as_of_T1 = as_of_T[:, None]
        inside_TN = (self.enter_N <= as_of_T1) & (as_of_T1 < self.leave_N)
        age_TN = as_of_T1 // self.width_ms - self.bucket_N
        out_TE = np.zeros((len(as_of_T), len(kinds)))
        for entry, kind in enumerate(kinds):
            ours_TN = inside_TN & (self.entry_N == entry)
            if kind == "last":
                latest_T = np.where(ours_TN, self.time_N, -1).max(axis=1)
                out_TE[:, entry] = np.where(latest_T < 0, 0, 1 + as_of_T - latest_T)
            elif weight_of is None:
                out_TE[:, entry] = (ours_TN * self.amount_N).sum(axis=1)
            else:
                out_TE[:, entry] = self._faded(ours_TN, age_TN, weight_of)
            if kind == "sum":
                out_TE[:, entry] /= 1e6
        return out_TE

    def _faded(self, ours_TN: npt.NDArray[np.bool_], age_TN: I64s, weight_of: tuple[float, ...]) -> Any:
        """Add up from the youngest bucket to the oldest, whole buckets at once: floats must meet in that order."""
        total_T = np.zeros(len(age_TN))
        for age, weight in enumerate(weight_of):
            total_T += (ours_TN & (age_TN == age)) @ self.amount_N * weight
        return total_T
