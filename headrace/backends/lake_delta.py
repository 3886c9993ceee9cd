"""The lake as a Delta table, on a POSIX path (local disk, CephFS) or hdfs://host:port/path.

One commit holds the files, and, as Delta application transactions, where each partition has got to:

| application id | version |
|---|---|
| `samples-g<generation>-p<partition>` | the `samples` offset to go on from |
| `position-g<generation>-p<partition>` | the last position in the lake, offset * 2**22 + rank |

Transactions survive the checkpoints of Delta's own log, so a writer that restarts asks the table alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.positions import Position, Positions

# A rank is below 2**22 (join.pending_max of 2 million impressions may expire in one record), an offset below 2**41.
RANK_BITS = 22
PARTITIONS_MAX = 256


@dataclass(frozen=True)
class LakeState:
    """What one version of the lake holds."""

    version: int
    positions: Positions
    """Everything at or below these is in the lake."""
    next_offsets: Mapping[int, int]
    """The `samples` offsets to go on from."""


class DeltaLake:
    """One table of samples. Safe for several writers: Delta refuses the second of two that move one partition."""

    def __init__(self, uri: str, *, generation: int = 1, partitions: int = PARTITIONS_MAX) -> None:
        self.uri = uri
        self.generation = generation
        self.partitions = partitions
        """How many partitions `state` asks for: each question reads the Delta log again, slow on HDFS."""

    def append(
        self, batches: Sequence[pa.RecordBatch], next_offsets: Mapping[int, int], positions: Mapping[int, Position]
    ) -> int:
        """Commit rows and the places that they lead to, all or nothing; return the new version.

        Raises `Unavailable` when the store does not answer or another writer was first: ask `state` and go on from
        there, since the commit may have happened all the same.
        """
        transactions = [
            Transaction(self._offset_id(partition), offset) for partition, offset in sorted(next_offsets.items())
        ]
        for partition, position in sorted(positions.items()):
            if position.offset >= 0:
                transactions.append(
                    Transaction(self._position_id(partition), position.offset << RANK_BITS | position.rank)
                )
        if "://" not in self.uri:
            Path(self.uri).mkdir(parents=True, exist_ok=True)
        try:
            write_deltalake(
                self.uri,
                pa.Table.from_batches(batches),
                mode="append",
                schema_mode="merge",
                # A retry by the library could hide that another writer has moved the same partition.
                commit_properties=CommitProperties(app_transactions=transactions, max_commit_retries=0),
            )
        except (DeltaError, CommitFailedError, OSError) as error:
            raise Unavailable(f"the lake at {self.uri} did not take a commit: {error}") from error
        table = self._table(None)
        if table is None:
            raise InvariantBroken(f"the lake at {self.uri} is gone right after a commit; nothing may delete it.")
        return int(table.version())

    def state(self, version: int | None = None) -> LakeState | None:
        """Return the newest version's state (or that version's); None while there is no lake.

        Raises `Unavailable` when the store does not answer.
        """
        table = self._table(version)
        if table is None:
            return None
        offsets: dict[int, int] = {}
        positions: dict[int, Position] = {}
        for partition in range(self.partitions):
            offset = table.transaction_version(self._offset_id(partition))
            if offset is not None:
                offsets[partition] = offset
            packed = table.transaction_version(self._position_id(partition))
            if packed is not None:
                positions[partition] = Position(packed >> RANK_BITS, packed & ((1 << RANK_BITS) - 1))
        return LakeState(table.version(), Positions(self.generation, positions), offsets)

    def read(self, version: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Return that version's rows (the newest one's by default), in any order."""
        table = self._table(version)
        if table is None:
            raise Unavailable(f"there is no lake at {self.uri} yet; the sink makes it with its first commit.")
        try:
            return table.to_pyarrow_table(columns=list(columns) if columns is not None else None)
        except (DeltaError, OSError) as error:
            raise Unavailable(f"the lake at {self.uri} can't be read: {error}") from error

    def _table(self, version: int | None) -> Any:
        try:
            return DeltaTable(self.uri, version=version)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            raise Unavailable(f"the lake at {self.uri} does not answer: {error}") from error

    def _offset_id(self, partition: int) -> str:
        return f"samples-g{self.generation}-p{partition}"

    def _position_id(self, partition: int) -> str:
        return f"position-g{self.generation}-p{partition}"
