"""The loss ledger: what was read, joined, stored and learnt, and whether anything is missing or counted twice.

`lost` and `twice` are found by comparing ids (impression event id x task), not by subtracting counters:

1. the events log is joined once more by the same pure join: these samples *should* be, at these positions;
2. the lake holds ids, and says up to which positions it is whole;
3. each step names the ranges that it took, and says up to which positions the model contains everything. A run that
   goes on from another one has that one's steps up to there; what it left out by name is `skipped`, and not lost.

What should be at or below the positions that an effect committed, and is not in it, is lost; what is in it more than
once is twice. What lies above is on its way and neither.

Legend: N expected samples, in (partition, position) order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.config import LedgerConfig
from headrace.contract.formats.dead_letters import DeadLetter, Fate
from headrace.contract.formats.events import Punctuation
from headrace.contract.formats.positions import Positions
from headrace.contract.formats.sample import conform
from headrace.contract.formats.steps import Step
from headrace.contract.recipe import Recipe
from headrace.replay.ledger.behind import oldest
from headrace.replay.ledger.keys import (
    JOINED,
    KEYS,
    compare,
    covers,
    highest,
    in_order,
    is_imported,
    sample_ids,
)
from headrace.replay.ledger.ledger import Ledger, ModelCounts, TaskCounts
from headrace.replay.ledger.taken import beside_lake, left_out_by_name, recipe_of_ranges, swapped, taken
from headrace.stream.join.watermark import NO_TIME
from headrace.trainer.commit.lineage import lineages
from headrace.trainer.model.calibration import left_out
from headrace.trainer.source.batch import sample_hashes

BEHIND_MAX_MS = LedgerConfig().behind_max_ms

StoredKeysOfRun = Callable[[int, tuple[str, ...], Sequence[Step]], pa.Table | None]
"""Gives KEYS of the lake at a version, of these tasks, in total order; None where the version is no more and the steps
of the run do not tell either what it held."""


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
    resolved_ms_N: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """The watermark at which each sample was resolved."""
    newest_ms: int = NO_TIME
    """The newest watermark of a partition; without one nothing is old."""


@dataclass(frozen=True)
class Found:
    """What the other topics and the lake hold, read before the events log."""

    topic: pa.Table
    """KEYS of the samples topic by the reader's rule: what is not beyond the last position is dropped."""
    lake: pa.Table
    """KEYS of the lake, as many rows as it has but for imported history."""
    lake_positions: Positions
    steps: Sequence[Step]
    stored_keys: StoredKeysOfRun
    letters: Sequence[DeadLetter]
    tags: frozenset[str]
    """Declared tags: a dead letter of another tag is no declared event, and left out of the totals."""
    punctuations: Sequence[Punctuation]
    retried: Sequence[tuple[DeadLetter, Fate]] = ()
    """Those of `letters` that were offered again, with what came of it."""
    retained_before_ms: int = 0
    """Rows of event time before this are in the lake no more, or late and still there, as retention left them."""
    refused: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    """Ids of stored samples that no learner takes."""
    topic_begins: Positions = field(default_factory=lambda: Positions(0))
    """Where the samples topic begins whose first records retention took; what lay there before is not looked for."""
    imported: pa.Table = field(default_factory=KEYS.empty_table)
    """KEYS of the lake's rows of imported history."""
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    """By run, where it is known."""


def draw(expected: Expected, found: Found, *, recipe: Recipe, behind_max_ms: int = BEHIND_MAX_MS) -> Ledger:
    """Return the ledger. Negatives that a run's `negative_share` leaves out count as sampled out, samples of tasks that
    its recipe doesn't have as those of other tasks.

    Args:
        recipe: of the project as it is now; taken for a run whose own is not known and whose ranges fit it.
        behind_max_ms: how old the oldest sample may be that is not stored, or not learnt.
    """
    ledger = Ledger(tasks=expected.tasks, external=expected.rows.get("external", 0), behind_max_ms=behind_max_ms)
    letters, fates = count_letters(ledger, found.letters, found.retried, found.tags)
    draw_gateways(ledger, sum(expected.rows.values()), letters, found.punctuations, fates)
    ledger.impressions, ledger.feedback = expected.impressions, expected.feedback
    ledger.repeated_in_log = expected.repeated_in_log
    ids_N = sample_ids(expected.samples)
    if found.topic_begins.by_partition:
        forgotten = expected.samples.filter(pa.array(covers(expected.samples, found.topic_begins)))
        found = replace(found, topic=pa.concat_tables([found.topic, forgotten.select(KEYS.names)]))
    _draw_topic(ledger, expected, found, ids_N)
    _draw_lake(ledger, expected, found, ids_N)
    _draw_imported(ledger, found, ids_N)
    ours_N = _of_tasks(expected.samples, recipe)
    _draw_behind(ledger, expected, "lake", ~covers(expected.samples, found.lake_positions))
    _draw_behind(ledger, expected, "model", ours_N)
    for run in _runs(found.steps):
        counts, left_N = _draw_model(expected, found, run, ids_N, recipe)
        _draw_behind(ledger, expected, "model", left_N)
        ledger.models[counts.run] = counts
    return finish(ledger)


def finish(ledger: Ledger) -> Ledger:
    """Fill the totals of what is drawn by task, by model run and by place, and the verdict."""
    for name in ("positives", "negatives", "waiting", "matched", "duplicate", "late", "orphans", "pending"):
        setattr(ledger, name, sum(getattr(counts, name) for counts in ledger.tasks.values()))
    if ledger.models:
        newest = list(ledger.models.values())[-1]
        for name in ("learnt", "refused", "sampled_out", "other_tasks", "skipped", "in_flight", "unaccounted"):
            setattr(ledger, name, getattr(newest, name))
        ledger.imported_due = newest.imported
        ledger.lost_where["model"] = sum(counts.lost for counts in ledger.models.values())
        ledger.twice_where["model"] = sum(counts.twice for counts in ledger.models.values())
    else:
        ledger.in_flight = ledger.samples
    ledger.lost, ledger.twice = sum(ledger.lost_where.values()), sum(ledger.twice_where.values())
    ledger.overdue = sorted(where for where, ms in ledger.behind_ms.items() if ms > ledger.behind_max_ms)
    ledger.closes = _closes(ledger)
    return ledger


def count_letters(
    ledger: Ledger, letters: Sequence[DeadLetter], retried: Sequence[tuple[DeadLetter, Fate]], tags: frozenset[str]
) -> tuple[int, Counter[str]]:
    """Fill `dead_letters` and `undeclared`, without what was offered again; return how many letters are of declared
    events, and what came of those that were offered again."""
    declared = [letter for letter in letters if letter.tag in tags]
    reasons = Counter(letter.reason for letter in declared)
    reasons.subtract(letter.reason for letter, _ in retried if letter.tag in tags)
    ledger.dead_letters = {reason: count for reason, count in reasons.items() if count}
    # No declared event has these tags, so no total of events counts them.
    ledger.undeclared = len(letters) - len(declared) - sum(letter.tag not in tags for letter, _ in retried)
    return len(declared), Counter[str](fate for letter, fate in retried if letter.tag in tags)


def _closes(ledger: Ledger) -> bool:
    settled = ledger.learnt + ledger.refused + ledger.sampled_out + ledger.other_tasks + ledger.skipped
    return (
        ledger.read == ledger.appended + ledger.dead_lettered + ledger.repeated
        and ledger.appended == ledger.impressions + ledger.feedback + ledger.external + ledger.repeated_in_log
        and ledger.samples + ledger.imported_due == settled + ledger.in_flight
        and all(counts.closes() for counts in ledger.tasks.values())
        and all(counts.closes() for counts in ledger.models.values())
        and ledger.lost == ledger.twice == ledger.unaccounted == len(ledger.seals_wrong) == 0
    )


def draw_gateways(
    ledger: Ledger,
    appended: int,
    dead_lettered: int,
    punctuations: Iterable[Punctuation],
    fates: Mapping[str, int] = MappingProxyType({}),
    *,
    beyond: int = 0,
) -> None:
    """Fill read, appended, dead_lettered, repeated, from rows in the log, declared dead letters and punctuation.

    `fates` counts the letters that were offered again by what came of it. Such a letter's event is counted where it
    ended (in the log, as repeated, or as a newer letter), so the letter itself is taken out; the retry's marks are the
    receipts of what it appended and refused.

    `beyond` counts receipts, of gateways and marks, for rows that lie in the log beyond those of `appended`: these
    events are in no figure yet.

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
    total["appended"] -= beyond
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


def _draw_imported(ledger: Ledger, found: Found, ids_N: pa.Array) -> None:
    """Draw imported history: nothing but the lake knows it; what is there twice, or live too, is twice."""
    there = sample_ids(found.imported)
    ledger.imported = len(there)
    distinct = there.unique()
    ledger.twice_where["lake"] += len(there) - len(distinct) + int(_is_in(distinct, ids_N).sum())


def _draw_behind(ledger: Ledger, expected: Expected, where: str, left_N: npt.NDArray[np.bool_]) -> None:
    """Say how old the oldest sample is that has not got there; a later call for the same place stands."""
    if expected.newest_ms != NO_TIME:
        ledger.behind_ms[where] = oldest(expected.resolved_ms_N, expected.newest_ms, left_N)


def _draw_model(
    expected: Expected, found: Found, run: Sequence[Step], ids_N: pa.Array, recipe: Recipe
) -> tuple[ModelCounts, npt.NDArray[np.bool_]]:
    """Count how often the run's steps took each expected sample, by their ranges alone, and say which it has still to
    learn: bool [N]."""
    last = run[-1]
    recipe = found.recipes.get(last.run) or recipe_of_ranges(expected.samples, run, recipe)
    versions = {r.version for step in run for r in step.ranges if r.kind == "stored"}
    read = {version: found.stored_keys(version, recipe.heads, run) for version in sorted(versions)}
    given = _given(read)
    samples = pa.concat_tables([given, expected.samples.select(given.column_names)]).combine_chunks()
    given_N = np.arange(samples.num_rows) < given.num_rows
    ids_N = sample_ids(samples)
    ours_N = _of_tasks(samples, recipe)
    times_N = taken(samples, ids_N, run, read.__getitem__)
    # A live range passes samples of other tasks by and counts them in none of its rows.
    ours_taken = int(times_N[ours_N].sum())
    positions = Positions.from_json(found.lake_positions.generation, last.positions)
    # Positions are told once the lake is learnt, with all that was imported.
    covered_N = np.where(given_N, bool(positions.by_partition), covers(samples, positions))
    if not positions.by_partition:
        covered_N |= beside_lake(samples, run)
    refused_N = ours_N & _is_in(ids_N, found.refused)
    learnt_N = ours_N & ~refused_N & ~_left_out(samples, recipe)
    topic_N = given_N | _is_in(ids_N, sample_ids(found.topic))
    took_N = times_N > 0
    left_N = ours_N & ~took_N & left_out_by_name(samples, run)
    ranges = [r for step in run for r in step.ranges]
    named, unknown = sum(r.rows for r in ranges), {version for version, keys in read.items() if keys is None}
    counts = ModelCounts(model=last.model, run=last.run, steps=sum(step.branch is None for step in run))
    counts.unaccounted = sum(r.rows for r in ranges if r.kind == "stored" and r.version in unknown)
    named -= counts.unaccounted
    counts.live = sum(r.rows for r in ranges if r.kind == "live")
    counts.stored = named - counts.live
    counts.learnt = int((took_N & learnt_N).sum())
    counts.refused = int((took_N & refused_N).sum())
    counts.sampled_out = int((took_N & ours_N).sum()) - counts.learnt - counts.refused
    counts.other_tasks = int(((topic_N | took_N) & ~ours_N).sum())
    counts.skipped = int((topic_N & left_N).sum())
    counts.in_flight = max(0, int((topic_N & ours_N & ~took_N & ~left_N).sum()) - counts.unaccounted)
    counts.samples = int((took_N & ours_N).sum()) + counts.other_tasks + counts.in_flight + counts.skipped
    if not unknown:
        counts.lost = int((covered_N & ours_N & ~took_N & ~left_N).sum()) + max(0, ours_taken - named)
    counts.imported = int((given_N & ours_N).sum())
    counts.twice = int(np.maximum(times_N - 1, 0).sum()) + max(0, named - ours_taken)
    # As many, and not the same: at least one is missing, and one is there that should not be.
    exchanged = swapped(samples, ours_N, run, read)
    counts.lost, counts.twice = counts.lost + exchanged, counts.twice + exchanged
    return counts, (ours_N & ~took_N & ~covered_N)[given.num_rows :]


def _given(read: Mapping[int, pa.Table | None]) -> pa.Table:
    """Return the rows of imported history, each once, in versions of the lake that a run learnt: JOINED, in order."""
    found = [keys.filter(pa.array(is_imported(keys))) for keys in read.values() if keys is not None]
    if not any(keys.num_rows for keys in found):
        return JOINED.empty_table()
    rows = in_order(conform(pa.concat_tables(found, promote_options="default"), JOINED)).combine_chunks()
    first_N = np.unique(sample_ids(rows).dictionary_encode().indices.to_numpy(), return_index=True)[1]
    return rows.take(pa.array(np.sort(first_N))).combine_chunks()


def _of_tasks(samples: pa.Table, recipe: Recipe) -> npt.NDArray[np.bool_]:
    """Say which samples are of the recipe's tasks: bool [N]."""
    return _is_in(samples["task"], pa.array(recipe.heads))


def _is_in(ids_N: pa.Array | pa.ChunkedArray, known: pa.Array) -> npt.NDArray[np.bool_]:
    found_N: npt.NDArray[np.bool_] = pc.is_in(ids_N, value_set=known).to_numpy(zero_copy_only=False)
    return found_N


def _left_out(samples: pa.Table, recipe: Recipe) -> npt.NDArray[np.bool_]:
    """Say which samples the trainer scores and does not learn: bool [N]."""
    if recipe.negative_share == 1.0 or not samples.num_rows:
        return np.zeros(samples.num_rows, np.bool_)
    rows = samples.combine_chunks().to_batches()[0]
    return left_out(recipe, rows["label"].to_numpy(), sample_hashes(rows))


def _runs(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps by run, the one that was written last at the end; a step that was written again counts once. A
    run that goes on from another one has that one's steps up to there too."""
    return [
        [step if step.run == run else msgspec.structs.replace(step, run=run) for step in found]
        for run, found in lineages(steps).items()
    ]
