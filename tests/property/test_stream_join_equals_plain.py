"""Goal: the compiled join is the plain one, faster. Method: one seeded log through both, cut and gathered at will."""

from __future__ import annotations

from random import Random

import pyarrow as pa
import pytest

from headrace.contract.config import JoinConfig
from headrace.contract.log import Record
from headrace.stream.join import JoinState
from tests.join_oracle import PlainJoin
from tests.property.test_stream_join import CONFIG, LONG, POSITION_COLUMNS, PROJECT, records, traffic

FEW = JoinConfig(early_feedback_ms=400, resolved_ms=1600, repeat_horizon_ms=3200, pending_max=12)


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
@pytest.mark.parametrize("seed", range(20))
def test_equal_samples_and_totals(seed, config):
    log = records(traffic(seed), Random(seed))
    plain, compiled, gathered = (
        kind(PROJECT, config, silent_ms=300, partition=0) for kind in (PlainJoin, JoinState, JoinState)
    )
    expected = samples(plain, log)
    assert samples(compiled, log).equals(expected)
    assert samples(gathered, log, Random(seed)).equals(expected)
    assert compiled.totals == gathered.totals == plain.totals
    assert len(compiled.pending) == len(plain.waiting)
    assert len(compiled.early) == plain.early_rows


@pytest.mark.parametrize("block", range(10))
def test_a_thousand_ways_to_cut_give_equal_samples(block):
    for seed in range(100 * block, 100 * block + 100):
        items = traffic(seed, 60)
        one, other = (JoinState(PROJECT, CONFIG, silent_ms=300, partition=0) for _ in range(2))
        whole = samples(one, records(items, None)).drop_columns(POSITION_COLUMNS)
        assert samples(other, records(items, Random(seed)), Random(seed)).drop_columns(POSITION_COLUMNS).equals(whole)
        assert one.totals == other.totals
