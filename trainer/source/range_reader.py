"""Finds the rows of recorded step ranges, for recovery and for replay alike."""

from __future__ import annotations

import pyarrow as pa

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.steps import StepRange
from headrace.trainer.source.live import LiveRows
from headrace.trainer.source.stored import StoredRows


class RangeReader:
    """Gives out the rows of committed ranges, in the order of the steps: stored ranges of the open version of the lake,
    live ranges of what was read of the topic."""

    def __init__(self, stored: StoredRows, live: LiveRows, schema: pa.Schema) -> None:
        self.stored, self.live, self._schema = stored, live, schema

    def has(self, ranges: tuple[StepRange, ...]) -> bool:
        """Say whether every row of these ranges is read. Raises `InvariantBroken` where stored rows lie elsewhere."""
        return all(self.stored.has(each) if each.kind == "stored" else self.live.has(each) for each in ranges)

    def take(self, ranges: tuple[StepRange, ...]) -> pa.Table:
        """Return the rows of these ranges, in the ranges' order, and move on behind them.

        Raises `InvariantBroken` when the rows found are not those that the step counted.
        """
        tables: list[pa.Table] = []
        for each in ranges:
            rows = self.stored.take(each) if each.kind == "stored" else self.live.take(each)
            if rows.num_rows != each.rows:
                raise InvariantBroken(
                    f"{each} took {each.rows} samples and {rows.num_rows} are stored. `headrace ledger` shows which; "
                    "`headrace train repair --begin lake` begins a run without that step."
                )
            tables.append(rows)
        return pa.concat_tables(tables, promote_options="default") if tables else self._schema.empty_table()
