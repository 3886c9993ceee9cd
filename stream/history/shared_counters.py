"""Counters over keys that lie in several partitions, as the aggregator settles them, for the impressions of a history.

The aggregator's own core counts the events of some time at once, and settles every point of its grid among them. An
impression then takes the newest value before its own time: what it would find where no aggregate was late. It brings it
as a served value, so the join needs no aggregates.

Legend: N impressions, R settled values, E entries of a counter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.config import Config
from headrace.contract.formats.events import PUNCTUATION, Punctuation, encode_punctuation
from headrace.contract.interfaces.log import Record
from headrace.contract.project import Project
from headrace.contract.spec import Counter
from headrace.stream.aggregate.core import AggregatorState, Settled
from headrace.stream.features.counters import bucket_ms, key_texts, weights
from headrace.stream.join.record_columns import as_columns

GATEWAY, EPOCH = "history", 1
TIME_BITS = 42
"""A time in ms has so many bits until the year 2109."""

Counted = tuple[int, dict[str, str], bytes]
"""Partition, headers and value of a record."""
Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]


class SharedCounters:
    """All such counters of a project; events come in order of time."""

    def __init__(self, project: Project, config: Config) -> None:
        self._partitions = config.log.partitions
        key = project.impression.key
        self.counters = [counter for counter in project.features.counters if not counter.is_local(key)]
        self._state = AggregatorState(
            project,
            self._partitions,
            grid_ms=config.aggregate.grid_ms,
            silent_ms=config.ingest.silent_ms,
            horizon_ms=config.join.repeat_horizon_ms,
        )
        self._offset = 0
        self._known: dict[str, dict[str, tuple[int, list[float]]]] = {c.name: {} for c in self.counters}
        """By counter and key, the newest value that is not zero, and as of when."""

    def settle(self, records: Sequence[Counted], after_ms: int, tick_ms: int) -> list[Settled]:
        """Count records of events and return what is settled up to the point `tick_ms` of the grid; `after_ms` is one
        before all of them."""
        # The aggregator's grid begins where its first punctuation says.
        first = self._punctuation(after_ms) if self._state.settled_ms < 0 else []
        settled: list[Settled] = []
        for partition, headers, value in [*first, *records, *self._punctuation(tick_ms)]:
            settled += self._state.take(Record(GATEWAY, partition, self._offset, None, value, headers, 0))
            self._offset += 1
        return [each for each in settled if each.is_shared]

    def _punctuation(self, time_ms: int) -> list[Counted]:
        told = encode_punctuation(Punctuation(GATEWAY, EPOCH, time_ms))
        return [(partition, {"kind": PUNCTUATION}, told) for partition in range(self._partitions)]

    def with_values(self, impressions: pa.RecordBatch, settled: Sequence[Settled]) -> pa.RecordBatch:
        """Return impressions, up to the last of the settled points, with the values that they find; what they brought
        stays."""
        time_N = impressions["event_time_ms"].to_numpy()
        for counter in self.counters:
            ours = [each for each in settled if each.counter == counter.name]
            found_NE = self._values(counter, key_texts([impressions[f] for f in counter.key_fields]), time_N, ours)
            for name, column in as_columns(counter.columns(), found_NE, impressions).items():
                at = impressions.schema.get_field_index(name)
                impressions = impressions.set_column(at, impressions.schema.field(at), column)
            known = self._known[counter.name]
            for each in ours:
                if any(each.counts):
                    known[each.key] = each.as_of_ms, each.counts
                else:
                    known.pop(each.key, None)
        return impressions

    def _values(self, counter: Counter, texts: pa.Array, time_N: Int64s, settled: Sequence[Settled]) -> Float64s:
        known = self._known[counter.name]
        encoded = texts.dictionary_encode()
        keys = encoded.dictionary.to_pylist()
        code_of = {key: code for code, key in enumerate(keys)}
        rows = [(code, *known[key]) for key, code in code_of.items() if key in known]
        rows += [(code_of[s.key], s.as_of_ms, s.counts) for s in settled if s.key in code_of]
        out_NE = np.zeros((len(time_N), len(counter.counts)))
        if not rows:
            return out_NE
        place_R = np.array([(code << TIME_BITS) + as_of for code, as_of, _ in rows], np.int64)
        order_R = np.argsort(place_R, kind="stable")
        place_R = place_R[order_R]
        # The log holds them as float32.
        value_RE = np.array([counts for _, _, counts in rows], np.float32)[order_R].astype(np.float64)
        code_N = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
        at_N = np.searchsorted(place_R, (code_N << TIME_BITS) + time_N, "left") - 1
        has_N = (at_N >= 0) & (code_N >= 0)
        has_N &= (place_R[at_N] >> TIME_BITS) == code_N
        as_of_N = place_R[at_N] & ((1 << TIME_BITS) - 1)
        out_NE[has_N] = aged(counter, value_RE[at_N[has_N]], as_of_N[has_N], time_N[has_N])
        return out_NE


def aged(counter: Counter, value_NE: Float64s, known_N: Int64s, time_N: Int64s) -> Float64s:
    """Return values as of `known_N` at later times: what fades by itself has faded, as `AggregateLookup` does."""
    width_ms, fading = bucket_ms(counter), weights(counter)
    top_N = time_N // width_ms
    age_N = top_N - known_N // width_ms
    value_NE = value_NE.copy()
    for e, entry in enumerate(counter.entries()):
        value_N = value_NE[:, e]
        if entry.kind == "last":
            young_N = (value_N != 0) & ((known_N + 1 - value_N).astype(np.int64) // width_ms > top_N - counter.buckets)
            value_NE[:, e] = np.where(young_N, value_N + (time_N - known_N), 0.0)
        elif fading is not None:
            weight_A = np.array(fading)
            value_NE[:, e] = np.where(
                age_N < counter.buckets, value_N * weight_A[np.minimum(age_N, counter.buckets - 1)], 0.0
            )
    return value_NE
