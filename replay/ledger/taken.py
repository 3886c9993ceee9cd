"""Which samples the steps of a run took, by their ranges alone. Pure.

Legend: N expected samples, in (partition, position) order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.formats.positions import Position, Positions, order_of
from headrace.contract.formats.steps import Step, StepRange
from headrace.contract.recipe import Recipe
from headrace.kernels.sample_ids import id_hashes
from headrace.replay.ledger.keys import KEYS, covers, order, sample_ids
from headrace.trainer.commit.lineage import passed_over
from headrace.trainer.source.pieces import StoredOrder
from headrace.trainer.source.stored import stored_order

StoredKeys = Callable[[int], pa.Table | None]
"""Gives KEYS of the lake at a version, in total order (event time, partition, offset, rank); None where the version is
no more and nothing tells what it held."""
CHOSEN_OF_MAX = 8
"""Most tasks among which those of a run are looked for: 2^8 choices."""


def taken(samples: pa.Table, ids_N: pa.Array, steps: Iterable[Step], stored_keys: StoredKeys) -> npt.NDArray[np.int64]:
    """Return how often the steps' ranges took each expected sample, int64 [N].

    What ranges took of a version that is no more is not in it.
    """
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
        if keys is None:
            continue
        starts, stops = (np.array([c[i] for c in cuts], np.int64) for i in (0, 1))
        times_K = _overlaps(starts, stops, keys.num_rows)
        at_K = pc.index_in(sample_ids(keys), value_set=ids_N)
        known_K = at_K.is_valid().to_numpy(zero_copy_only=False)
        np.add.at(times_N, at_K.drop_null().to_numpy(), times_K[known_K])
    return times_N


def beside_lake(samples: pa.Table, steps: Sequence[Step]) -> npt.NDArray[np.bool_]:
    """Return which samples a run that has not learnt all of the lake says that it learnt live: bool [N]."""
    first: dict[int, Position] = {}
    last: dict[int, Position] = {}
    for each in (r for step in steps for r in step.ranges if r.kind == "live"):
        first.setdefault(each.partition, Position(*each.after))
        last[each.partition] = Position(*each.upto)
    return covers(samples, Positions(0, last)) & ~covers(samples, Positions(0, first))


def left_out_by_name(samples: pa.Table, steps: Iterable[Step]) -> npt.NDArray[np.bool_]:
    """Say which samples a run left out by name: bool [N]."""
    left_N = np.zeros(samples.num_rows, np.bool_)
    partition_N, order_N = samples["partition"].to_numpy(), order(samples)
    for each in passed_over(steps):
        within_N = (order_N > order_of(each.after)) & (order_N <= order_of(each.upto))
        left_N |= (partition_N == each.partition) & within_N
    return left_N


def recipe_of_ranges(samples: pa.Table, steps: Iterable[Step], recipe: Recipe) -> Recipe:
    """Return the recipe by which a run's live ranges hold as many rows as they say, and the same: `recipe`, or `recipe`
    with the fewest other tasks that fit; `recipe` where none does. Where only the numbers fit, those.
    """
    steps = list(steps)
    live = [r for step in steps for r in step.ranges if r.kind == "live"]
    names = sorted(samples["task"].unique().to_pylist())
    counts_RT = np.stack([_rows_of(samples, live, name) for name in names], axis=1) if names and live else None
    if counts_RT is None:
        return recipe
    rows_R = np.array([r.rows for r in live], np.int64)
    choices = [recipe.heads]
    if len(names) <= CHOSEN_OF_MAX:
        choices += [some for size in range(1, len(names) + 1) for some in combinations(names, size)]
    fitting = [t for t in choices if (counts_RT[:, [name in t for name in names]].sum(axis=1) == rows_R).all()]
    for tasks in fitting:
        ours_N = pc.is_in(samples["task"], value_set=pa.array(tasks)).to_numpy()
        if not swapped(samples, ours_N, steps, {}):
            break
    else:
        tasks = fitting[0] if fitting else recipe.heads
    return recipe if tasks == recipe.heads else msgspec.structs.replace(recipe, task=tasks[0], tasks=tasks)


def _rows_of(samples: pa.Table, live: Sequence[StepRange], task: str) -> npt.NDArray[np.int64]:
    """Return how many samples of a task each range holds."""
    ours = samples.filter(pc.equal(samples["task"], task))
    partition_N, order_N = ours["partition"].to_numpy(), order(ours)
    found_R = np.zeros(len(live), np.int64)
    for partition in {r.partition for r in live}:
        here_R = np.array([r.partition == partition for r in live])
        sorted_K = np.sort(order_N[partition_N == partition])
        afters, uptos = (np.array([order_of(each) for each in ends], np.int64) for ends in _ends(live, here_R))
        found_R[here_R] = np.searchsorted(sorted_K, uptos, "right") - np.searchsorted(sorted_K, afters, "right")
    return found_R


def _ends(live: Sequence[StepRange], here_R: npt.NDArray[np.bool_]) -> tuple[list[tuple[int, int]], ...]:
    ours = [r for r, here in zip(live, here_R, strict=True) if here]
    return [r.after for r in ours], [r.upto for r in ours]


def stored_by_log(
    samples: pa.Table,
    steps: Iterable[Step],
    version: int,
    tasks: tuple[str, ...],
    *,
    by: StoredOrder = "event_time",
    retained: bool,
) -> pa.Table | None:
    """Return KEYS of a version of the lake that is no more, in total order; None where the steps do not say.

    A run that has learnt all of a version stands at the version's positions in its next step, or where live samples
    were learnt beside it, behind them: its first live ranges say where it began with each partition. What the log has
    up to there was in the version, but for what retention (`retained`) had dropped by then, whole hours from the
    oldest on: the ranges say how many rows were left. Rows that came later than their hour's end by more than the
    retention are counted wrongly.
    """
    rows, run = 0, ""
    begins: dict[int, Position] = {}
    for step in steps:
        if step.run != run:
            rows, run, begins = 0, step.run, {}
        for each in (r for r in step.ranges if r.kind == "live"):
            begins.setdefault(each.partition, Position(*each.after))
        stops = [r.stop for r in step.ranges if r.kind == "stored" and r.version == version]
        if stops:
            rows = max(stops)
        elif rows and step.positions and step.branch is None:
            positions = Positions.from_json(0, step.positions).by_partition
            held_N = covers(samples, Positions(0, {**positions, **begins}))
            found = stored_order(samples.filter(pa.array(held_N)), tasks, by)
            return (found.slice(max(0, found.num_rows - rows)) if retained else found).select(KEYS.names)
    return None


def swapped(
    samples: pa.Table, ours_N: npt.NDArray[np.bool_], steps: Iterable[Step], keys: Mapping[int, pa.Table | None]
) -> int:
    """Return how many ranges took as many samples as they should, and not the same: their sums of ids differ.

    Args:
        ours_N: which samples are of the run's tasks.
        keys: KEYS of these tasks, in total order, by version of the lake.
    """
    told = [r for step in steps for r in step.ranges if r.sum is not None]
    count = 0
    ours = samples.filter(pa.array(ours_N))
    for partition in {r.partition for r in told if r.kind == "live"}:
        here = ours.filter(pc.equal(ours["partition"], partition))
        live = [r for r in told if r.kind == "live" and r.partition == partition]
        order_K = order(here)
        ends = [np.searchsorted(order_K, [order_of(r.after) for r in live], "right")]
        ends.append(np.searchsorted(order_K, [order_of(r.upto) for r in live], "right"))
        count += _unlike(here, live, *ends)
    for version, rows in keys.items():
        cuts = [r for r in told if r.kind == "stored" and r.version == version]
        if rows is not None and cuts:
            ends = [np.minimum([r.start for r in cuts], len(rows)), np.minimum([r.stop for r in cuts], len(rows))]
            count += _unlike(rows, cuts, *ends)
    return count


def _unlike(
    rows: pa.Table, ranges: Sequence[StepRange], starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
) -> int:
    sums_S = np.zeros(rows.num_rows + 1, np.uint64)
    np.cumsum(id_hashes(rows), out=sums_S[1:])
    there_R = (sums_S[stops] - sums_S[starts]).tolist()
    triples = zip(ranges, (stops - starts).tolist(), there_R, strict=True)
    return sum(each.rows == rows_ and each.sum != there for each, rows_, there in triples)


def _overlaps(starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Return how many of the half-open intervals contain each of 0 ... size - 1."""
    edges = np.zeros(size + 1, np.int64)
    np.add.at(edges, np.minimum(starts, size), 1)
    np.add.at(edges, np.minimum(np.maximum(stops, starts), size), -1)
    return np.cumsum(edges)[:size]
