"""What the next checkpoint stores of a table: pages whole, or rows by themselves.

1. A page of which at least a quarter changed since the checkpoint before is stored whole; so is a page that is new.
2. Rows that changed in other pages are stored by themselves.
3. Pages of which something lies by itself are stored whole in turn, those first that were stored longest ago: as many
   rows as lie by themselves now, and 1/64 of the table at least. Rows that changed before the oldest such page was
   stored are then needed no more: after 64 checkpoints all of them are gone, and what lies by itself takes no more
   bytes than the table.

So a checkpoint stores twice what changed and 1/64 of the table at most, but where a quarter of a page changed at once,
and no checkpoint ever stores all pages for the sake of order.

Axes: K rows that changed, P pages.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from headrace.trainer.commit.checkpoint import TableParts
from headrace.trainer.model.tables.row_index import Int64s

WHOLE_SHARE = 4
SWEEP = 64


class Plan(NamedTuple):
    """What is stored of one table."""

    pages: tuple[int, ...]
    """Stored whole, ascending."""
    rows_K: Int64s
    """Stored by themselves, ascending."""
    sizes_P: Int64s
    """Rows of each page now."""
    stale: frozenset[int]
    """Pages of which rows lie by themselves."""
    credit: int


def planned(before: TableParts | None, changed_K: Int64s, *, high: int, page_rows: int) -> Plan:
    """Return what the next checkpoint stores.

    Args:
        before: what the checkpoint before named; None stores everything.
        changed_K: rows that changed since, ascending, each once.
        high: rows of the table.
        page_rows: rows of a page.
    """
    count = max(1, -(-high // page_rows))
    sizes_P = np.minimum(high - page_rows * np.arange(count), page_rows)
    if before is None or before.page_rows != page_rows:
        return Plan(tuple(range(count)), changed_K[:0], sizes_P, frozenset(), 0)
    changed_P = np.bincount(changed_K // page_rows, minlength=count)
    whole_P = (changed_P > 0) & (changed_P * WHOLE_SHARE >= sizes_P)
    whole_P[len(before.pages) :] = True
    stale = [p for p in range(count) if not whole_P[p] and (changed_P[p] or before.pages[p].changed)]
    alone = int(changed_P[~whole_P].sum())
    credit = before.credit + (max(alone, high // SWEEP, 1) if len(changed_K) else 0)
    for page in sorted(stale, key=lambda page: before.pages[page].seq):
        if credit < sizes_P[page]:
            break
        credit -= int(sizes_P[page])
        whole_P[page] = True
    stale_left = frozenset(page for page in stale if not whole_P[page])
    rows_K = changed_K[~whole_P[changed_K // page_rows]]
    pages = tuple(np.flatnonzero(whole_P).tolist())
    return Plan(pages, rows_K, sizes_P, stale_left, credit if stale_left else 0)
