"""Samples of a time range out of one version of the lake, slice by slice in order of event time, in bounded memory.

A slice is a span of event time: `headrace.backends.lake.spans` cuts them. All samples of an impression have its event
time, so a slice has all or none of them. Files and row groups outside of its time are left out, so a sorted hour is
read once in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from headrace.backends.lake.delta import DeltaLake
from headrace.contract.errors import InvariantBroken
from headrace.contract.interfaces.lake import StoredSpan

SLICE_ROWS = 131_072
"""Samples that are in memory at once; more only where more have one millisecond of event time."""


class LakeSlices:
    """One version's samples of a range of event time; see the module. Take a lease of the version before."""

    def __init__(
        self, lake: DeltaLake, version: int, begin_ms: int, end_ms: int, *, slice_rows: int = SLICE_ROWS
    ) -> None:
        """Open the version. Raises `Unavailable`."""
        self._lake, self._within_ms, self._slice_rows = lake, (begin_ms, end_ms), slice_rows
        files = lake.files_of(version)
        self.version = files.version
        self.extent_ms = files.extent_ms
        """Event time of the version's first and last sample, None where the log does not say."""
        self.schema: pa.Schema = files.schema
        """The version's columns."""

    def slices(self) -> list[StoredSpan]:
        """Return the slices that have rows, in order of event time.

        Raises `Unavailable`, and `InvariantBroken` where retention has dropped rows, or a file is damaged.
        """
        return self._lake.spans(self.version, self._slice_rows, within_ms=self._within_ms)

    def read(self, one: StoredSpan, columns: Iterable[str], tasks: Sequence[str]) -> pa.Table:
        """Return a slice's samples of these tasks, in any order, with those of the columns that the lake has. Raises as
        `slices`."""
        have = set(self.schema.names)
        rows = self._lake.read(self.version, [name for name in columns if name in have], span_ms=one.span_ms)
        if rows.num_rows != one.rows:
            raise InvariantBroken(
                f"retention has dropped rows of version {self.version} of the lake, and vacuum its files: of event "
                f"times {iso(one.span_ms[0])} to {iso(one.span_ms[1])} it held {one.rows} and {rows.num_rows} are "
                "left. Begin the export later, or keep lake.retention_ms longer."
            )
        return rows.filter(pc.is_in(rows["task"], value_set=pa.array(tasks)))


def iso(time_ms: int) -> str:
    """Return a time as ISO 8601 in UTC.

    >>> iso(0), iso(1_500)
    ('1970-01-01T00:00:00Z', '1970-01-01T00:00:01.500Z')
    """
    spec = "milliseconds" if time_ms % 1_000 else "seconds"
    return datetime.fromtimestamp(time_ms / 1_000, UTC).isoformat(timespec=spec).replace("+00:00", "Z")
