"""Reads rows of an open table batch by batch; each says `moved`: a big table is told from a store that hangs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from headrace.process.moved import moved


def scan(table: Any, columns: Sequence[str], store: Any, only: ds.Expression | None = None) -> pa.Table:
    """Return these columns of the rows that `only` keeps, all by default, in any order.

    Args:
        table: a `DeltaTable`.
        store: the file system to read it with; None lets the table say.
    """
    scanner = table.to_pyarrow_dataset(filesystem=store).scanner(columns=list(columns), filter=only)
    batches = []
    for batch in scanner.to_batches():
        batches.append(batch)
        moved()
    return pa.Table.from_batches(batches, scanner.projected_schema)
