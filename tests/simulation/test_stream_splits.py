"""Goal: how rows are cut into records never changes a sample. Method: 1,000 seeds of traffic, each cut in three ways.

One row a record, neighbours together at will, and what a worker joins at once of either: the content is the same, and
the positions of one cut do not depend on how its records are handed on.
"""

from __future__ import annotations

from random import Random

import pyarrow as pa
import pytest
from join_world import POSITION_COLUMNS, records, state, traffic

from headrace.contract.interfaces.log import Record

BLOCKS = [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 40))]


def joined(log: list[Record], random: Random | None) -> tuple[pa.Table, object]:
    """Return the samples; with `random`, records are handed on several at once."""
    join, at, tables = state(), 0, []
    while at < len(log):
        some = 1 if random is None else random.randrange(1, 12)
        emitted = join.take_all(log[at : at + some])
        at += some
        if emitted is not None:
            tables.append(emitted.batch)
    return pa.Table.from_batches(tables, schema=join.schema), join.totals


@pytest.mark.parametrize("block", BLOCKS)
def test_cuts_never_change_a_sample(block):
    for seed in range(25 * block, 25 * block + 25):
        items = traffic(seed, 150)
        alone, cut = records(items, None), records(items, Random(seed))
        expected, totals = joined(alone, None)
        assert expected.num_rows > 20
        several, totals_of_several = joined(cut, None)
        assert several.drop_columns(POSITION_COLUMNS).equals(expected.drop_columns(POSITION_COLUMNS)), f"seed {seed}"
        at_once, totals_at_once = joined(cut, Random(seed + 1))
        assert at_once.equals(several), f"seed {seed}"
        assert totals == totals_of_several == totals_at_once
