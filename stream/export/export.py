"""Point-in-time export: labelled samples of a time range as Parquet files with a manifest.

Features are what was served, or known at the event's time, since that is what samples hold. Labels are what one version
of the lake knows. The rows are those of `impressions`, in its order; equal calls on an equal version give equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from headrace.backends.lake.delta import DeltaLake
from headrace.contract.errors import ConfigRejected, InvariantBroken
from headrace.contract.formats.sample import conform
from headrace.contract.interfaces.progress import Progress, Silent
from headrace.contract.project import Project
from headrace.stream.export.columns import (
    EVENT_TIMESTAMP,
    ExportColumns,
    input_types,
    plain_type,
    plan_columns,
    sample_columns,
)
from headrace.stream.export.folder import FILE_ROWS, ROW_GROUP_ROWS, FileEntry, parquet_folder, refuse_occupied
from headrace.stream.export.impressions import impressions
from headrace.stream.export.source import SLICE_ROWS, LakeSlices, iso

FORMAT = 1
SORTED_BY = (EVENT_TIMESTAMP, "partition", "impression_offset", "impression_row")
"""What the manifest says of the order; all but the first are the impression's place in the log."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What is to be exported."""

    begin_ms: int
    """Event time of the first, Unix milliseconds."""
    end_ms: int
    """Event time before which the last is."""
    version: int
    """Of the lake: labels are what it knows."""
    tasks: tuple[str, ...] | None = None
    """All by default."""
    columns: tuple[str, ...] | None = None
    """Names or patterns; all by default."""
    overwrite: bool = False
    """Replace an older export."""


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What was written."""

    version: int
    rows: int
    """Impressions."""
    samples: int
    """Samples that they come from."""
    files: list[FileEntry]
    columns: list[str]


def export_samples(
    lake: DeltaLake,
    project: Project,
    target: Path,
    request: ExportRequest,
    *,
    progress: Progress | None = None,
    beat: Callable[[], None] = lambda: None,
    slice_rows: int = SLICE_ROWS,
    row_group_rows: int = ROW_GROUP_ROWS,
    file_rows: int = FILE_ROWS,
) -> Exported:
    """Write the samples to the folder `target`, all or nothing.

    Args:
        beat: called between slices, so that the caller can renew its lease of the version.

    Raises:
        ConfigRejected: a name that there is not, a range without samples, a folder that may not be replaced.
        Unavailable: the lake cannot be read, or the folder not be written.
        InvariantBroken: rows of the version are gone.
    """
    if request.begin_ms >= request.end_ms:
        raise ConfigRejected(
            f"--from {iso(request.begin_ms)} is not before --to {iso(request.end_ms)}, which is left out itself."
        )
    refuse_occupied(target.resolve(), overwrite=request.overwrite)
    source = LakeSlices(lake, request.version, request.begin_ms, request.end_ms, slice_rows=slice_rows)
    plan = plan_columns(project, source.schema, tasks=request.tasks, only=request.columns)
    wanted = sample_columns(plan, project.features, input_types(project))
    slices, shown, done, rows_done = source.slices(), progress or Silent(), 0, 0
    shown.begin("export", sum(one.rows for one in slices))
    try:
        with parquet_folder(
            target, plan.schema, overwrite=request.overwrite, row_group_rows=row_group_rows, file_rows=file_rows
        ) as folder:
            for one in slices:
                samples = _fitted(source.read(one, wanted, plan.tasks), wanted)
                rows = impressions(samples, plan, project.features)
                folder.write(rows)
                done, rows_done = done + samples.num_rows, rows_done + rows.num_rows
                shown.done(done)
                beat()
            if not rows_done:
                raise _nothing(source, request, plan)
            folder.finish(_manifest(project, source, request, plan))
    finally:
        shown.end()
    return Exported(version=source.version, rows=rows_done, samples=done, files=folder.files, columns=plan.schema.names)


def _fitted(rows: pa.Table, wanted: dict[str, pa.DataType]) -> pa.Table:
    try:
        return conform(rows, pa.schema(list(wanted.items())))
    except pa.ArrowException as error:
        differ = [n for n, kind in wanted.items() if n in rows.column_names and plain_type(rows[n].type) != kind]
        raise InvariantBroken(
            f"the lake's columns {differ} have other types than the project declares: {error}. Declare them as they "
            "are stored, or leave them out with --columns."
        ) from error


def _nothing(source: LakeSlices, request: ExportRequest, plan: ExportColumns) -> ConfigRejected:
    held = "holds none" if source.extent_ms is None else "holds {} to {}".format(*map(iso, source.extent_ms))
    tasks = f" of tasks {', '.join(plan.tasks)}" if request.tasks else ""
    return ConfigRejected(
        f"no samples{tasks} have an event time from {iso(request.begin_ms)} to before {iso(request.end_ms)}; version "
        f"{source.version} of the lake {held}. Nothing was written."
    )


def _manifest(project: Project, source: LakeSlices, request: ExportRequest, plan: ExportColumns) -> dict[str, Any]:
    """Return what the manifest says besides rows and files. Nothing in it depends on when or where it is made."""
    return {
        "format": FORMAT,
        "project": project.name,
        "spec": project.features.digest(),
        "lake_version": source.version,
        "from": iso(request.begin_ms),
        "to": iso(request.end_ms),
        "tasks": [task for task in project.tasks if task.name in plan.tasks],
        "sorted_by": SORTED_BY,
        "columns": [{"name": field.name, "type": str(field.type)} for field in plan.schema],
    }
