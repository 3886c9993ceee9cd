"""Which ids the lake has, of single hours: files of other hours are not opened, and rows are not kept in memory."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake.exceptions import DeltaError

from headrace.backends.lake.delta import DeltaLake, LakeState
from headrace.backends.lake.hour_files import DATE, HOUR, HOUR_MS
from headrace.backends.lake.scan import dataset_of, fragments_by_path, partition_columns
from headrace.contract.errors import Unavailable

_HOURS_MAX = 1_000
"""Hours that are named one by one; of more, the whole range of days is asked for."""


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
        wanted = (ds.field("event_time_ms") >= begin_ms) & (ds.field("event_time_ms") < end_ms)
        wanted &= ds.field(column).isin(pa.array(sorted(ids), pa.string()))
        if partition_columns(table):
            wanted &= _hours(begin_ms // HOUR_MS, -(-end_ms // HOUR_MS))
        found: set[str] = set()
        try:
            data = dataset_of(table, list(fragments_by_path(table).values()))
            for batch in data.scanner(columns=[column], filter=wanted).to_batches():
                found.update(pc.unique(batch.column(0)).to_pylist())
        except (DeltaError, OSError, pa.ArrowException) as error:
            raise Unavailable(f"the lake at {self._lake.uri} can't be read: {error}") from error
        return frozenset(found)


def _hours(first: int, following: int) -> pc.Expression:
    """Return what holds for rows of the hours since 1970 from `first` to before `following`."""
    times = [datetime.fromtimestamp(hour * HOUR_MS // 1000, UTC) for hour in range(first, following)]
    if len(times) > _HOURS_MAX:
        return (ds.field(DATE) >= times[0].date()) & (ds.field(DATE) <= times[-1].date())
    chosen = ds.scalar(False)
    for day in sorted({time.date() for time in times}):
        hours = pa.array([time.hour for time in times if time.date() == day], pa.int32())
        chosen |= (ds.field(DATE) == day) & ds.field(HOUR).isin(hours)
    return chosen
