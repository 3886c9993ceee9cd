"""Goal: a change of rules in mid-stream is a function of the log like all else. Method: seeded traffic through the
plain join and the compiled one, cut and gathered at will, crashed and restored before, at and after the change."""

from __future__ import annotations

from random import Random

import pyarrow as pa
import pytest
from join_oracle import PlainJoin
from join_world import CONFIG, LONG, POSITION_COLUMNS, PROJECT, records
from rules_world import PROJECTS, SCHEMAS, changing

from headrace.contract.config import JoinConfig
from headrace.contract.interfaces.log import Record
from headrace.stream.join.join import JoinState
from headrace.stream.join.state import encode_state, load_state

SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 8))]


def join_of(config: JoinConfig = CONFIG, project: int = 0) -> JoinState:
    return JoinState(PROJECTS[project], config, silent_ms=300, partition=0)


def samples(join: JoinState | PlainJoin, log: list[Record], gather: Random | None = None) -> list[dict]:
    """Return all samples as rows; with `gather`, several records are taken at once."""
    rows: list[dict] = []
    at, after = 0, (-1, -1)
    while at < len(log):
        count = 1 if gather is None else gather.randrange(1, 9)
        emitted = join.take(log[at]) if gather is None else join.take_all(log[at : at + count])
        at += count
        if emitted is not None:
            assert emitted.after == after
            rows += present(emitted.batch)
            after = emitted.last
    return rows


def present(batch: pa.RecordBatch) -> list[dict]:
    """Return rows without what is null: a record has the columns of all rules that its rows were read by."""
    return [{name: value for name, value in row.items() if value is not None} for row in batch.to_pylist()]


@pytest.mark.parametrize("config", [CONFIG, LONG], ids=["forgets", "remembers"])
@pytest.mark.parametrize("seed", SEEDS)
def test_equal_samples_and_totals_across_changes(seed, config):
    log = records(changing(seed), Random(seed), SCHEMAS)
    plain = PlainJoin(PROJECT, config, silent_ms=300, partition=0)
    compiled, gathered = join_of(config), join_of(config)
    expected = samples(plain, log)
    assert len({row["spec"] for row in expected}) > 1 or len({row["task"] for row in expected}) > 1
    assert samples(compiled, log) == expected
    assert samples(gathered, log, Random(seed)) == expected
    assert compiled.totals == gathered.totals == plain.totals
    assert compiled.waiting == len(plain.waiting)
    assert len(compiled.payload) == sum(waiting.open.bit_count() for waiting in plain.waiting.values())
    assert compiled.rules.number == 4


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 3))])
def test_cuts_across_a_change_give_equal_samples(block):
    for seed in range(10 * block, 10 * block + 10):
        items = changing(seed, 80, 2)
        whole, cut = join_of(), join_of()
        one, other = samples(whole, records(items, None, SCHEMAS)), samples(cut, records(items, Random(seed), SCHEMAS))
        for row in (*one, *other):
            for name in POSITION_COLUMNS:
                del row[name]
        assert one == other, f"seed {seed}"
        assert whole.totals == cut.totals


@pytest.mark.parametrize("seed", SEEDS)
def test_a_crash_anywhere_around_a_change_changes_no_bit(seed):
    log = records(changing(seed), Random(seed), SCHEMAS)
    calm = join_of()
    expected = samples(calm, log)
    random, join, stored, found, taken = Random(seed + 1_000), join_of(), None, [], (-1, -1)
    while join.offset + 1 < len(log):
        record = log[join.offset + 1]
        is_change = record.headers["kind"] == "spec"
        if is_change and random.random() < 0.5:
            stored = encode_state(join)
        emitted = join.take(record)
        if emitted is not None and emitted.last > taken:
            found += present(emitted.batch)
            taken = emitted.last
        if random.random() < (0.5 if is_change else 0.04):
            stored = encode_state(join)
        if random.random() < (0.3 if is_change else 0.03):
            # The restarted worker has whatever project lies on its disk: what the state says counts.
            join = join_of(project=random.randrange(3) if stored is not None else 0)
            if stored is not None:
                load_state(join, stored)
    assert found == expected
    assert join.totals == calm.totals


@pytest.mark.parametrize("seed", range(3))
def test_the_ledger_of_every_task_closes_across_changes(seed):
    items = changing(seed, 1_500, 4)
    join = join_of(LONG)
    rows = samples(join, records(items, Random(seed), SCHEMAS))
    assert join.totals.repeated_in_log > 0
    for (task, feedback), counts in zip(join.tasks, join.totals.tasks, strict=True):
        assert counts.impressions == counts.positives + counts.negatives + counts.waiting
        answered = counts.matched + counts.duplicate + counts.late + counts.orphans + counts.pending
        assert answered == join.answers[list(join.feedback).index(feedback)]
        ours = [row for row in rows if row["task"] == task]
        assert sum(row["label"] for row in ours if not row["correction"]) <= counts.positives
        corrected = [row for row in ours if row["correction"]]
        assert len({row["event_id"] for row in corrected}) == len(corrected)
