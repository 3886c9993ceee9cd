"""Samples to one row an impression: its fields and features, and the labels of all tasks as they are known. Pure.

1. Samples are sorted by the impression's event time and position, then by correction and their own position.
2. The samples of one impression are neighbours then. They have equal fields, so the first one gives them.
3. Of a task's samples the last one gives its label: a correction comes after the negative that it corrects.

Legend: N samples, G impressions, F slots a row, D dense numbers a row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.spec import PAD, FeatureSpec
from headrace.stream.export.columns import EVENT_TIMESTAMP, IMPRESSION, LABELS, TIMESTAMP, ExportColumns, FeatureColumn
from headrace.stream.features.stored import stored_features

ORDER = ("event_time_ms", "partition", "impression_offset", "impression_row", "event_id")
"""The order of an export: the impression's event time, its place in the log, its id."""
_SAMPLES = ("correction", "offset", "rank")


def impressions(rows: pa.Table, plan: ExportColumns, spec: FeatureSpec) -> pa.Table:
    """Return one row for each impression that has a sample in `rows`, in `ORDER`, with the plan's columns.

    Args:
        rows: samples of the plan's tasks, [N], in any order, with the columns of `sample_columns`. All samples of an
            impression must be among them.
        spec: features of rows that another specification made are computed again by this one.
    """
    correction = pc.fill_null(rows["correction"], False)
    rows = rows.set_column(rows.schema.get_field_index("correction"), "correction", correction)
    keys = rows.select([*ORDER, *_SAMPLES])
    rows = rows.take(pc.sort_indices(keys, [(name, "ascending") for name in keys.column_names])).combine_chunks()
    begins_N = _begins(rows)
    group_N = np.cumsum(begins_N) - 1
    first = rows.take(pa.array(np.flatnonzero(begins_N)))
    found = {EVENT_TIMESTAMP: first["event_time_ms"].cast(TIMESTAMP)}
    found |= {name: first[name] for name in IMPRESSION if name in plan.names}
    found |= {name: first[source] for name, (source, _) in plan.raw.items() if name in plan.names}
    if plan.wanted_features:
        slots_GF, numeric_GD = stored_features(first, spec)
        found |= {one.name: _feature(one, slots_GF, numeric_GD) for one in plan.wanted_features}
    for task in plan.tasks:
        wanted = {f"{kind}.{task}": how for kind, how in LABELS.items() if f"{kind}.{task}" in plan.names}
        if wanted:
            last = _last_of(rows["task"], task, group_N, first.num_rows)
            found |= {name: rows[source].take(last).cast(kind) for name, (source, kind) in wanted.items()}
    return pa.table([found[name] for name in plan.names], schema=plan.schema)


def _begins(rows: pa.Table) -> npt.NDArray[np.bool_]:
    """Say of each sorted sample whether it is the first of its impression: bool [N]."""
    begins_N = np.ones(rows.num_rows, np.bool_)
    begins_N[1:] = False
    for name in ORDER:
        column = rows[name]
        differs = pc.not_equal(column.slice(1), column.slice(0, max(len(column) - 1, 0)))
        # Null where a lake of before has no such column: then the others tell.
        begins_N[1:] |= pc.fill_null(differs, False).to_numpy()
    return begins_N


def _last_of(tasks: pa.ChunkedArray, task: str, group_N: npt.NDArray[np.int64], groups: int) -> pa.Array:
    """Return which sample is the task's last of each impression, null where it has none: int64 [G]."""
    at = np.flatnonzero(pc.equal(tasks, task).to_numpy())
    of = group_N[at]
    is_last = np.ones(len(at), np.bool_)
    is_last[:-1] = of[1:] != of[:-1]
    last_G = np.full(groups, -1, np.int64)
    last_G[of[is_last]] = at[is_last]
    return pa.array(last_G, mask=last_G < 0)


def _feature(one: FeatureColumn, slots_GF: npt.NDArray[np.int64], numeric_GD: npt.NDArray[np.float32]) -> pa.Array:
    if not one.is_slots:
        return pa.array(np.ascontiguousarray(numeric_GD[:, one.first]))
    if not one.is_list:
        return pa.array(np.ascontiguousarray(slots_GF[:, one.first]))
    slots_GW = slots_GF[:, one.first : one.first + one.width]
    kept_GW = slots_GW != PAD
    offsets = np.zeros(len(slots_GW) + 1, np.int32)
    np.cumsum(kept_GW.sum(axis=1), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(slots_GW[kept_GW]))
