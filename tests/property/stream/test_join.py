"""Goal: the join is a function of the partition's order. Method: seeded traffic, cut into records and crashed at will.

Content of samples (without positions) must not depend on how rows are cut; a crash with restore must not change a bit.
"""

from __future__ import annotations

from random import Random

import pyarrow as pa
import pytest
from join_world import LONG, POSITION_COLUMNS, PROJECT, drain, records, state, traffic

SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 8))]


@pytest.mark.parametrize("seed", SEEDS)
def test_cuts_change_positions_and_never_content(seed):
    items = traffic(seed)
    one, first = drain(records(items, None))
    other, second = drain(records(items, Random(seed)))
    assert one.num_rows > 50
    # Expiries of one punctuation are ordered by (expiry, offset, row): log order, whatever the cut.
    assert one.drop_columns(POSITION_COLUMNS).equals(other.drop_columns(POSITION_COLUMNS))
    assert first.totals == second.totals


@pytest.mark.parametrize("seed", SEEDS)
def test_a_crash_and_restore_changes_no_bit(seed):
    log = records(traffic(seed), Random(seed))
    expected, calm = drain(log)
    found, crashed = drain(log, crash=Random(seed + 1000))
    assert found.equals(expected)
    assert crashed.totals == calm.totals


@pytest.mark.parametrize("seed", range(3))
def test_the_ledger_of_a_task_closes(seed):
    samples, join = drain(records(traffic(seed, 1500), Random(seed)), config=LONG)
    for task, counts in zip(PROJECT.tasks, join.totals.tasks, strict=True):
        assert counts.impressions == counts.positives + counts.negatives + counts.waiting
        answered = counts.matched + counts.duplicate + counts.late + counts.orphans + counts.pending
        kinds = [i for i in traffic(seed, 1500) if i[0] == task.feedback]
        assert answered == len({row["event_id"] for _, row in kinds})
        ours = [r for r in samples.select(["task", "label"]).to_pylist() if r["task"] == task.name]
        assert sum(r["label"] for r in ours) == counts.positives == counts.matched
        assert len(ours) == counts.positives + counts.negatives
    assert join.totals.repeated_in_log > 0
    assert len(join.payload) == sum(c.waiting for c in join.totals.tasks)
    positions = list(zip(samples["offset"].to_pylist(), samples["rank"].to_pylist(), strict=True))
    assert positions == sorted(set(positions))


def test_a_record_taken_twice_changes_nothing():
    log = records(traffic(3), None)
    expected, _ = drain(log)
    join, tables = state(), []
    for record in log:
        for _ in range(2):
            emitted = join.take(record)
            if emitted is not None:
                tables.append(emitted.batch)
    assert pa.Table.from_batches(tables).equals(expected)
