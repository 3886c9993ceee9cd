"""The loss ledger: what was read, joined, stored and learnt, and whether anything is missing or counted twice.

`lost` and `twice` are found by comparing ids (impression event id x task), not by subtracting counters:

1. the events log is joined once more by the same pure join: these samples *should* be, at these positions;
2. the lake holds ids, and says up to which positions it is whole;
3. each step names the ranges that it took, and says up to which positions the model contains everything.

What should be at or below the positions that an effect committed, and is not in it, is lost; what is in it more than
once is twice. What lies above is on its way and neither.

Legend: N expected samples, in (partition, position) order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.formats.dead_letters import DeadLetter, Fate
from headrace.contract.formats.events import Punctuation
from headrace.contract.formats.positions import START, Position, Positions, order_of, orders, position_of
from headrace.contract.formats.steps import Step
from headrace.contract.recipe import Recipe
from headrace.trainer.model.calibration import left_out
from headrace.trainer.source.batch import sample_hashes

KEYS = pa.schema(
    [
        pa.field("partition", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("rank", pa.int32()),
        pa.field("event_id", pa.string()),
        pa.field("task", pa.string()),
    ]
)
"""What identifies a sample and says where it lies."""
TIMED_KEYS = KEYS.append(pa.field("event_time_ms", pa.int64()))
"""The same with its impression's event time, by which the lake orders, parts and drops rows."""
JOINED = TIMED_KEYS.append(pa.field("label", pa.float32()))
"""The same with its label, by which a recipe may leave samples out."""

StoredKeys = Callable[[int], pa.Table]
"""Gives KEYS of the lake at a version, in total order (event time, partition, offset, rank)."""


class TaskCounts(msgspec.Struct, kw_only=True):
    """One task: impressions = positives + negatives + waiting; feedback = the sum of the last five."""

    impressions: int = 0
    feedback: int = 0
    positives: int = 0
    negatives: int = 0
    waiting: int = 0
    matched: int = 0
    duplicate: int = 0
    late: int = 0
    orphans: int = 0
    pending: int = 0

    def closes(self) -> bool:
        """Say whether both sums hold."""
        judged = self.positives + self.negatives + self.waiting
        answered = self.matched + self.duplicate + self.late + self.orphans + self.pending
        return self.impressions == judged and self.feedback == answered


class ModelCounts(msgspec.Struct, kw_only=True):
    """One run of one model: samples = learnt + refused + sampled_out + in_flight."""

    model: str = ""
    run: str = ""
    steps: int = 0
    samples: int = 0
    learnt: int = 0
    refused: int = 0
    sampled_out: int = 0
    in_flight: int = 0
    lost: int = 0
    twice: int = 0

    def closes(self) -> bool:
        """Say whether the sum holds."""
        return self.samples == self.learnt + self.refused + self.sampled_out + self.in_flight


class Ledger(msgspec.Struct, kw_only=True):
    """All totals, integers. `read` counts events that have their outcome; what a gateway still holds is in none."""

    read: int = 0
    appended: int = 0
    dead_lettered: int = 0
    repeated: int = 0
    retried: int = 0
    """Dead letters that were offered again; each event is counted once, where it ended."""
    impressions: int = 0
    feedback: int = 0
    external: int = 0
    repeated_in_log: int = 0
    positives: int = 0
    negatives: int = 0
    waiting: int = 0
    matched: int = 0
    duplicate: int = 0
    late: int = 0
    orphans: int = 0
    pending: int = 0
    samples: int = 0
    learnt: int = 0
    refused: int = 0
    sampled_out: int = 0
    in_flight: int = 0
    stored: int = 0
    lost: int = 0
    twice: int = 0
    closes: bool = False
    tasks: dict[str, TaskCounts] = {}
    models: dict[str, ModelCounts] = {}
    lost_where: dict[str, int] = {}
    """Where `lost` was found: `log` (a gateway was given a receipt and the log lacks it), `topic`, `lake`, `model`."""
    twice_where: dict[str, int] = {}
    dead_letters: dict[str, int] = {}
    """By reason, undeclared ones included."""
    retained: int = 0
    """Rows that were stored and that `lake.retention_ms` dropped since: no loss."""


@dataclass(frozen=True)
class Expected:
    """What the pure join makes of the events log."""

    samples: pa.Table
    """JOINED, in (partition, position) order."""
    rows: dict[str, int]
    """Rows in the log by kind, repeats included: `impression`, `feedback`, `external`."""
    repeated_in_log: int
    tasks: dict[str, TaskCounts]
    impressions: int
    feedback: int


@dataclass(frozen=True)
class Found:
    """What the other topics and the lake hold, read before the events log."""

    topic: pa.Table
    """KEYS of the samples topic by the reader's rule: what is not beyond the last position is dropped."""
    lake: pa.Table
    """KEYS of the lake, as many rows as it has."""
    lake_positions: Positions
    steps: Sequence[Step]
    stored_keys: StoredKeys
    letters: Sequence[DeadLetter]
    tags: frozenset[str]
    """Declared tags: a dead letter of another tag is no declared event, and left out of the totals."""
    punctuations: Sequence[Punctuation]
    retried: Sequence[tuple[DeadLetter, Fate]] = ()
    """Those of `letters` that were offered again, with what came of it."""
    retained_before_ms: int = 0
    """Rows of event time before this are in the lake no more, or late and still there, as retention left them."""


def draw(expected: Expected, found: Found, *, recipe: Recipe) -> Ledger:
    """Return the ledger. Samples of tasks that the recipe doesn't have, and negatives that its `negative_share` leaves
    out, count as sampled out.
    """
    ledger = Ledger(tasks=expected.tasks, external=expected.rows.get("external", 0))
    reasons = Counter(letter.reason for letter in found.letters)
    reasons.subtract(letter.reason for letter, _ in found.retried)
    ledger.dead_letters = {reason: count for reason, count in reasons.items() if count}
    letters = sum(letter.tag in found.tags for letter in found.letters)
    fates = Counter[str](fate for letter, fate in found.retried if letter.tag in found.tags)
    draw_gateways(ledger, sum(expected.rows.values()), letters, found.punctuations, fates)
    ledger.impressions, ledger.feedback = expected.impressions, expected.feedback
    ledger.repeated_in_log = expected.repeated_in_log
    for name in ("positives", "negatives", "waiting", "matched", "duplicate", "late", "orphans", "pending"):
        setattr(ledger, name, sum(getattr(counts, name) for counts in expected.tasks.values()))
    ids_N = sample_ids(expected.samples)
    _draw_topic(ledger, expected, found, ids_N)
    _draw_lake(ledger, expected, found, ids_N)
    for run in _runs(found.steps):
        counts = _draw_model(expected, found, run, ids_N, recipe)
        ledger.models[counts.run] = counts
        for name in ("learnt", "refused", "sampled_out", "in_flight"):
            setattr(ledger, name, getattr(counts, name))
        ledger.lost_where["model"] = counts.lost
        ledger.twice_where["model"] = counts.twice
    if not ledger.models:
        ledger.in_flight = ledger.samples
    ledger.lost, ledger.twice = sum(ledger.lost_where.values()), sum(ledger.twice_where.values())
    ledger.closes = _closes(ledger)
    return ledger


def _closes(ledger: Ledger) -> bool:
    return (
        ledger.read == ledger.appended + ledger.dead_lettered + ledger.repeated
        and ledger.appended == ledger.impressions + ledger.feedback + ledger.external + ledger.repeated_in_log
        and ledger.samples == ledger.learnt + ledger.refused + ledger.sampled_out + ledger.in_flight
        and all(counts.closes() for counts in ledger.tasks.values())
        and all(counts.closes() for counts in ledger.models.values())
        and ledger.lost == ledger.twice == 0
    )


def draw_gateways(
    ledger: Ledger,
    appended: int,
    dead_lettered: int,
    punctuations: Iterable[Punctuation],
    fates: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Fill read, appended, dead_lettered, repeated, from rows in the log, declared dead letters and punctuation.

    `fates` counts the letters that were offered again by what came of it. Such a letter's event is counted where it
    ended (in the log, as repeated, or as a newer letter), so the letter itself is taken out; the retry's marks are the
    receipts of what it appended and refused.

    The log and the dead letters say what is there; the gateways' totals, newest of each epoch, say what was given
    receipts. A killed gateway's last totals may be older than its last records, never newer: totals beyond what is
    there are a loss.
    """
    said: dict[tuple[str, int], dict[str, int]] = {}
    for punctuation in punctuations:
        if punctuation.counts:
            newest = said.setdefault((punctuation.gateway, punctuation.epoch), {})
            for name, value in punctuation.counts.items():
                newest[name] = max(newest.get(name, 0), value)
    total = Counter[str]()
    for counts in said.values():
        total.update(counts)
    total.update(appended=fates.get("appended", 0), repeated=fates.get("repeated", 0))
    total.update(dead_lettered=fates.get("refused", 0))
    ledger.retried = sum(fates.values())
    ledger.appended, ledger.dead_lettered = appended, dead_lettered - ledger.retried
    ledger.repeated = total["repeated"]
    settled = total["appended"] + total["dead_lettered"] + total["repeated"]
    # What the crawler wrote is no gateway's: it must not stand in for what a gateway lost.
    theirs = appended - ledger.external
    untold = max(0, theirs - total["appended"]) + max(0, dead_lettered - total["dead_lettered"])
    ledger.read = settled + untold + ledger.external - ledger.retried
    ledger.lost_where["log"] = ledger.read - ledger.appended - ledger.dead_lettered - ledger.repeated


def _draw_topic(ledger: Ledger, expected: Expected, found: Found, ids_N: pa.Array) -> None:
    # What the lake is whole up to must have been in the topic, even where the topic itself ends earlier.
    reached = highest(found.topic).advanced(found.lake_positions.by_partition)
    ledger.samples = found.topic.num_rows
    lost, twice = compare(expected.samples, ids_N, sample_ids(found.topic), reached)
    ledger.lost_where["topic"], ledger.twice_where["topic"] = lost, twice


def _draw_lake(ledger: Ledger, expected: Expected, found: Found, ids_N: pa.Array) -> None:
    """Draw the lake; what retention may have dropped can't be lost there, and still must not be there twice."""
    ledger.stored, there = found.lake.num_rows, sample_ids(found.lake)
    lost, twice = compare(expected.samples, ids_N, there, found.lake_positions)
    if found.retained_before_ms:
        old_N = pc.less(expected.samples["event_time_ms"], found.retained_before_ms).combine_chunks()
        old = expected.samples.filter(old_N)
        ledger.retained, _ = compare(old, ids_N.filter(old_N), there, found.lake_positions)
    ledger.lost_where["lake"], ledger.twice_where["lake"] = lost - ledger.retained, twice


def _draw_model(expected: Expected, found: Found, run: Sequence[Step], ids_N: pa.Array, recipe: Recipe) -> ModelCounts:
    """Count how often the run's steps took each expected sample, by their ranges alone."""
    times_N = taken(expected.samples, ids_N, run, found.stored_keys)
    last = run[-1]
    positions = Positions.from_json(found.lake_positions.generation, last.positions)
    covered_N = covers(expected.samples, positions)
    ours_N = pc.is_in(expected.samples["task"], value_set=pa.array(recipe.heads)).to_numpy()
    learnt_N = ours_N & ~_left_out(expected.samples, recipe)
    topic_N = pc.is_in(ids_N, value_set=sample_ids(found.topic)).to_numpy(zero_copy_only=False)
    took_N = times_N > 0
    named = sum(r.rows for step in run for r in step.ranges)
    counts = ModelCounts(model=last.model, run=last.run, steps=len(run))
    counts.learnt = int((took_N & learnt_N).sum())
    counts.sampled_out = int((took_N & ~learnt_N).sum())
    counts.in_flight = int((topic_N & ~took_N).sum())
    counts.samples = int((topic_N | took_N).sum())
    counts.lost = int((covered_N & ours_N & ~took_N).sum()) + max(0, int(times_N.sum()) - named)
    counts.twice = int(np.maximum(times_N - 1, 0).sum()) + max(0, named - int(times_N.sum()))
    return counts


def _left_out(samples: pa.Table, recipe: Recipe) -> npt.NDArray[np.bool_]:
    """Say which samples the trainer scores and does not learn: bool [N]."""
    if recipe.negative_share == 1.0 or not samples.num_rows:
        return np.zeros(samples.num_rows, np.bool_)
    rows = samples.combine_chunks().to_batches()[0]
    return left_out(recipe, rows["label"].to_numpy(), sample_hashes(rows))


def compare(samples: pa.Table, ids_N: pa.Array, there: pa.Array, positions: Positions) -> tuple[int, int]:
    """Return (lost, twice): how often `there` lacks an id at or below `positions`, and how often it has one too much.

    An eager task has two samples of an id where feedback came. An id that should not be there at all counts as twice:
    something made it up.
    """
    due = _counts_in(there, ids_N.filter(pa.array(covers(samples, positions))))
    right = _counts_in(ids_N, there)
    return int(due.clip(min=0).sum()), int(right.clip(min=0).sum())


def _counts_in(known: pa.Array, ids: pa.Array) -> npt.NDArray[np.int64]:
    """Return, for each distinct one of `ids`, how many more times it is there than in `known`."""
    counted, have = ids.value_counts(), known.value_counts()
    places = pc.index_in(counted.field("values"), value_set=have.field("values"))
    return np.asarray(
        counted.field("counts").to_numpy() - pc.fill_null(have.field("counts").take(places), 0).to_numpy()
    )


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
    """Return KEYS of a version of the lake that is no more, in total order; None where the steps don't tell it.

    A run that has learnt all of a version goes on live from the version's positions: they stand in its next step. What
    the log has up to them was in the version, but for what retention (`retained`) had dropped by then, whole hours
    from the oldest on: the ranges say how many rows were left. Rows that came later than their hour's end by more than
    the retention are told wrongly.
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
            found = samples.filter(pa.array(held_N)).filter(pc.field("task").isin(tasks))
            found = found.sort_by([(n, "ascending") for n in ("event_time_ms", "partition", "offset", "rank")])
            return (found.slice(max(0, found.num_rows - rows)) if retained else found).select(KEYS.names)
    return None


def _overlaps(starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Return how many of the half-open intervals contain each of 0 ... size - 1."""
    edges = np.zeros(size + 1, np.int64)
    np.add.at(edges, np.minimum(starts, size), 1)
    np.add.at(edges, np.minimum(np.maximum(stops, starts), size), -1)
    return np.cumsum(edges)[:size]


def sample_ids(keys: pa.Table) -> pa.Array:
    """Return one string a row that identifies the sample: event id and task."""
    joined = pc.binary_join_element_wise(keys["event_id"].cast(pa.string()), keys["task"].cast(pa.string()), "\x00")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def order(keys: pa.Table) -> npt.NDArray[np.int64]:
    """Return one number a row that sorts as (offset, rank) does."""
    return orders(keys["offset"].to_numpy(), keys["rank"].to_numpy())


def covers(keys: pa.Table, positions: Positions) -> npt.NDArray[np.bool_]:
    """Return which rows lie at or below `positions`."""
    partition_N = keys["partition"].to_numpy()
    bound_P = np.full(int(partition_N.max(initial=-1)) + 1, order_of(START), np.int64)
    for partition, position in positions.by_partition.items():
        if partition < len(bound_P):
            bound_P[partition] = order_of(position)
    result: npt.NDArray[np.bool_] = order(keys) <= bound_P[partition_N]
    return result


def highest(keys: pa.Table) -> Positions:
    """Return the last position of each partition."""
    partition_N, order_N = keys["partition"].to_numpy(), order(keys)
    last = {int(p): int(order_N[partition_N == p].max()) for p in np.unique(partition_N)}
    return Positions(1, {p: position_of(o) for p, o in last.items()})


def _runs(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps by run, the newest run last; a step that was written again counts once."""
    runs: dict[str, dict[int, Step]] = {}
    for step in steps:
        runs.setdefault(step.run, {})[step.step] = step
    return [[run[n] for n in sorted(run)] for run in runs.values()]
