"""Which ids the lake has, of single hours: files of other hours are not opened, and rows are not kept in memory."""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake.exceptions import DeltaError

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.lake_state import LakeState
from headrace.backends.lake.version_files import VersionFiles
from headrace.contract.errors import Unavailable


class LakeIds:
    """The ids of one lake."""

    def __init__(self, lake: DeltaLake) -> None:
        self._lake = lake

    def state(self, version: int | None = None) -> LakeState | None:
        """Return the newest version's state; None while there is no lake."""
        return self._lake.state(version)

    def stored(self, ids: Collection[str], column: str, begin_ms: int, end_ms: int) -> frozenset[str]:
        """Return which of `ids` are in `column` of samples with impression times in [begin_ms, end_ms).

        Raises `Unavailable` where the store does not answer.
        """
        table = self._lake.open()
        if table is None or begin_ms >= end_ms or column not in [field.name for field in table.schema().fields]:
            return frozenset()
        among = ds.field(column).isin(pa.array(sorted(ids), pa.string()))
        found: set[str] = set()
        try:
            for batch in VersionFiles(table).batches([column], (begin_ms, end_ms), among)[0]:
                found.update(pc.unique(batch.column(0)).to_pylist())
        except (DeltaError, OSError, pa.ArrowException) as error:
            raise Unavailable(f"the lake at {self._lake.uri} can't be read: {error}") from error
        return frozenset(found)
