"""The seals of a lake, as Delta application transactions that lie in the commit with the rows that they count.

| application id | version |
|---|---|
| `sealed-since-g<generation>-p<partition>` | beyond which position (`order_of`) rows are counted; -1: all |
| `sealed-upto-g<generation>-p<partition>` | the position up to which they are |
| `sealed-count-g<generation>-p<partition>` | how many rows these are |
| `sealed-sum-g<generation>-p<partition>` | the sum of their ids' hashes modulo 2**64, as a signed number |

A commit of a release without seals moves the position and not the seal; the next one begins a seal behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from deltalake import Transaction

from headrace.contract.formats.positions import START, Position, order_of, position_of
from headrace.contract.formats.seals import SUM_MASK, PartitionSeal, Seal

HashIds = Callable[[pa.Table], npt.NDArray[np.uint64]]
"""Gives the hash of each row's sample id: uint64 [N]."""
Ask = Callable[[str], int | None]
"""Gives an application's version in the table."""

_FIELDS = ("since", "upto", "count", "sum")


def stored_seal(ask: Ask, generation: int, partition: int) -> PartitionSeal | None:
    """Return what the table says of a partition; None where nothing is sealed."""
    since, upto, count, total = (ask(f"sealed-{name}-g{generation}-p{partition}") for name in _FIELDS)
    if since is None or upto is None or count is None or total is None:
        return None
    return PartitionSeal(_position(since), position_of(upto), Seal(count, total & SUM_MASK))


def transactions(seals: Mapping[int, PartitionSeal], generation: int) -> list[Transaction]:
    """Return the transactions that store these seals."""
    found = []
    for partition, sealed in sorted(seals.items()):
        total = sealed.seal.sum
        signed = total - (SUM_MASK + 1) if total >> 63 else total
        since = -1 if sealed.since == START else order_of(sealed.since)
        values = (since, order_of(sealed.upto), sealed.seal.count, signed)
        for name, value in zip(_FIELDS, values, strict=True):
            found.append(Transaction(f"sealed-{name}-g{generation}-p{partition}", value))
    return found


def next_seals(
    table: Any,
    rows: pa.Table,
    positions: Mapping[int, Position],
    *,
    stood: Callable[[int], Position],
    mine: Mapping[int, PartitionSeal],
    hash_ids: HashIds | None,
    generation: int,
) -> dict[int, PartitionSeal]:
    """Return the seals after a commit of `rows` that moves partitions to `positions`; none without `hash_ids`.

    Args:
        table: at its newest version; None before its first commit.
        stood: gives where a partition stands in it.
        mine: what this writer stored last: where it fits, the table is not asked, which takes long on HDFS.
    """
    if hash_ids is None or not {"partition", "event_id", "task"} <= set(rows.column_names):
        return {}
    part_N, hash_N = rows["partition"].to_numpy(), hash_ids(rows)
    found: dict[int, PartitionSeal] = {}
    for partition, upto in positions.items():
        if upto == START:
            continue
        at = START if table is None else stood(partition)
        known = mine.get(partition)
        if table is not None and (known is None or known.upto != at):
            known = stored_seal(table.transaction_version, generation, partition)
        if known is None or known.upto != at:
            known = PartitionSeal(at, at, Seal())
        ours_N = hash_N[part_N == partition]
        fresh = Seal(len(ours_N), int(np.add.reduce(ours_N, dtype=np.uint64)))
        found[partition] = PartitionSeal(known.since, upto, known.seal.plus(fresh))
    return found


def stored_seals(table: Any, generation: int, partitions: int) -> dict[int, PartitionSeal]:
    """Return the seal of each partition that has one."""
    found = {p: stored_seal(table.transaction_version, generation, p) for p in range(partitions)}
    return {partition: seal for partition, seal in found.items() if seal is not None}


def _position(order: int) -> Position:
    return START if order < 0 else position_of(order)
