"""What one version of the lake holds, and what its application transactions are called.

The transactions of an import are `headrace.backends.lake.imports`'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.backends.delta.leases import NOTHING_IMPORTED, Lease
from headrace.contract.formats.positions import IMPORTED_FROM, Position, Positions, order_of
from headrace.contract.formats.seals import SUM_MASK, Seal

FIRST_IMPORTED = order_of(Position(IMPORTED_FROM, 0))


@dataclass(frozen=True)
class LakeState:
    """What one version of the lake holds."""

    version: int
    positions: Positions
    """Everything at or below these is in the lake."""
    next_offsets: Mapping[int, int]
    """The `samples` offsets to go on from."""
    retained_before_ms: int = 0
    """Rows of event time before this were dropped by retention; of hours after it, none was."""
    imported_upto: int = NOTHING_IMPORTED
    """The order (`order_of`) of the last imported row."""


def state_of_lease(lease: Lease) -> LakeState:
    """Return what a lease remembers of its version."""
    positions = Positions.from_json(lease.generation, lease.positions)
    offsets = {int(p): offset for p, offset in lease.next_offsets.items()}
    return LakeState(lease.version, positions, offsets, imported_upto=lease.imported_upto)


def upto_id(generation: int) -> str:
    """Return the application id under which a commit says up to where history is imported."""
    return f"imported-upto-g{generation}"


def imported_upto(table: Any, generation: int) -> int:
    """Return the order of the last imported row of an open table; `NOTHING_IMPORTED` where there is none."""
    stored = table.transaction_version(upto_id(generation))
    return NOTHING_IMPORTED if stored is None else FIRST_IMPORTED + int(stored)


def imported_seals(table: Any, tasks: Iterable[str], generation: int) -> tuple[dict[str, Seal], int]:
    """Return the seals of an open table's imported rows, by task, and how many rows of all tasks were imported."""
    found: dict[str, Seal] = {}
    for task in tasks:
        count, total = (table.transaction_version(name) for name in task_ids(task, generation))
        if count is not None and total is not None:
            found[task] = Seal(count, total & SUM_MASK)
    return found, int(table.transaction_version(count_id(generation)) or 0)


def task_ids(task: str, generation: int) -> tuple[str, str]:
    """Return the application ids of a task's imported rows and of the sum of their ids' hashes."""
    return f"imported-count-g{generation}-{task}", f"imported-sum-g{generation}-{task}"


def count_id(generation: int) -> str:
    """Return the application id under which a commit says how many rows were imported."""
    return f"imported-count-g{generation}"


def signed(total: int) -> int:
    """Return a sum modulo 2**64 as the signed number that a transaction holds."""
    return total - (SUM_MASK + 1) if total >> 63 else total
