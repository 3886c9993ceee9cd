"""Which samples the steps of a run took, by their ranges alone. Pure.

Legend: N expected samples, in (partition, position) order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.formats.positions import Position, Positions, order_of
from headrace.contract.formats.steps import Step
from headrace.replay.ledger.keys import KEYS, covers, order, sample_ids
from headrace.trainer.source.stored import stored_order

StoredKeys = Callable[[int], pa.Table]
"""Gives KEYS of the lake at a version, in total order (event time, partition, offset, rank)."""


def taken(samples: pa.Table, ids_N: pa.Array, steps: Iterable[Step], stored_keys: StoredKeys) -> npt.NDArray[np.int64]:
    """Return how often the steps' ranges took each expected sample, int64 [N]."""
    live: dict[int, list[tuple[Position, Position]]] = {}
    stored: dict[int, list[tuple[int, int]]] = {}
    for step in steps:
        for took in step.ranges:
            if took.kind == "live":
                live.setdefault(took.partition, []).append((Position(*took.after), Position(*took.upto)))
            else:
                stored.setdefault(took.version, []).append((took.start, took.stop))
    times_N = np.zeros(samples.num_rows, np.int64)
    partition_N, order_N = samples["partition"].to_numpy(), order(samples)
    for partition, spans in live.items():
        rows = np.flatnonzero(partition_N == partition)
        afters, uptos = (np.array([order_of(s[i]) for s in spans], np.int64) for i in (0, 1))
        starts = np.searchsorted(order_N[rows], afters, "right")
        stops = np.searchsorted(order_N[rows], uptos, "right")
        times_N[rows] += _overlaps(starts, stops, len(rows))
    for version, cuts in stored.items():
        keys = stored_keys(version)
        starts, stops = (np.array([c[i] for c in cuts], np.int64) for i in (0, 1))
        times_K = _overlaps(starts, stops, keys.num_rows)
        at_K = pc.index_in(sample_ids(keys), value_set=ids_N)
        known_K = at_K.is_valid().to_numpy(zero_copy_only=False)
        np.add.at(times_N, at_K.drop_null().to_numpy(), times_K[known_K])
    return times_N


def stored_by_log(
    samples: pa.Table, steps: Iterable[Step], version: int, tasks: tuple[str, ...], *, retained: bool
) -> pa.Table | None:
    """Return KEYS of a version of the lake that is no more, in total order; None where the steps do not say.

    A run that has learnt all of a version goes on live from the version's positions: they stand in its next step. What
    the log has up to them was in the version, but for what retention (`retained`) had dropped by then, whole hours
    from the oldest on: the ranges say how many rows were left. Rows that came later than their hour's end by more than
    the retention are counted wrongly.
    """
    rows, run = 0, ""
    for step in steps:
        stops = [r.stop for r in step.ranges if r.kind == "stored" and r.version == version]
        if stops:
            rows, run = max(stops), step.run
        elif rows and step.run == run:
            positions = Positions.from_json(0, step.positions).by_partition
            befores = {r.partition: Position(*r.after) for r in reversed(step.ranges)}
            held_N = covers(samples, Positions(0, {**positions, **befores}))
            found = stored_order(samples.filter(pa.array(held_N)), tasks)
            return (found.slice(max(0, found.num_rows - rows)) if retained else found).select(KEYS.names)
    return None


def _overlaps(starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Return how many of the half-open intervals contain each of 0 ... size - 1."""
    edges = np.zeros(size + 1, np.int64)
    np.add.at(edges, np.minimum(starts, size), 1)
    np.add.at(edges, np.minimum(np.maximum(stops, starts), size), -1)
    return np.cumsum(edges)[:size]
