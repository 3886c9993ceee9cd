"""Goal: the compiled join is the plain one, faster. Method: one seeded log through both, cut and gathered at will."""

from __future__ import annotations

from random import Random

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from join_oracle import PlainJoin
from join_world import CONFIG, LONG, POSITION_COLUMNS, PROJECT, records, traffic
from msgspec import structs

from headrace.contract.interfaces.log import Record
from headrace.stream.join.join import JoinState

EAGER = structs.replace(
    PROJECT, tasks=(structs.replace(PROJECT.tasks[0], policy="eager", correction_weight=2.0), *PROJECT.tasks[1:])
)


def samples(join: JoinState | PlainJoin, log: list[Record], gather: Random | None = None) -> pa.Table:
    """Return all samples; with `gather`, several records are taken at once."""
    batches: list[pa.RecordBatch] = []
    at, after = 0, (-1, -1)
    while at < len(log):
        count = 1 if gather is None else gather.randrange(1, 9)
        emitted = join.take(log[at]) if gather is None else join.take_all(log[at : at + count])
        at += count
        if emitted is not None:
            assert emitted.after == after
            batches.append(emitted.batch)
            after = emitted.last
    return pa.Table.from_batches(batches, schema=join.schema)


@pytest.mark.parametrize("config", [CONFIG, LONG], ids=["forgets", "remembers"])
@pytest.mark.parametrize("project", [PROJECT, EAGER], ids=["window", "eager"])
@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 12))])
def test_equal_samples_and_totals(seed, project, config):
    log = records(traffic(seed), Random(seed))
    plain, compiled, gathered = (
        kind(project, config, silent_ms=300, partition=0) for kind in (PlainJoin, JoinState, JoinState)
    )
    expected = samples(plain, log)
    assert samples(compiled, log).equals(expected)
    assert samples(gathered, log, Random(seed)).equals(expected)
    assert compiled.totals == gathered.totals == plain.totals
    assert len(compiled.pending) == len(plain.waiting)
    assert len(compiled.payload) == sum(counts.waiting for counts in plain.totals.tasks)
    assert len(compiled.early) == plain.early_rows


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 10))])
def test_a_thousand_ways_to_cut_give_equal_samples(block):
    for seed in range(100 * block, 100 * block + 100):
        items = traffic(seed, 60)
        one, other = (JoinState(PROJECT, CONFIG, silent_ms=300, partition=0) for _ in range(2))
        whole = samples(one, records(items, None)).drop_columns(POSITION_COLUMNS)
        assert samples(other, records(items, Random(seed)), Random(seed)).drop_columns(POSITION_COLUMNS).equals(whole)
        assert one.totals == other.totals


def test_an_eager_task_says_no_at_once_and_corrects_itself():
    join = JoinState(EAGER, LONG, silent_ms=300, partition=0)
    rows = samples(join, records(traffic(1), Random(1))).filter(pc.field("task") == "click").to_pylist()
    said: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        said.setdefault(row["event_id"], []).append((row["label"], row["weight"]))
    assert {tuple(labels) for labels in said.values()} == {((0.0, 1.0),), ((0.0, 1.0), (1.0, 2.0))}
    assert len(said) == join.totals.impressions
