"""Sample rows as the learner takes them: the project's columns, featurized by its own spec."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.formats.sample import matrix
from headrace.contract.hashing import combine64
from headrace.contract.project import Project
from headrace.kernels.hashes import hash64_texts
from headrace.stream.features.featurize import featurize
from headrace.trainer.model.batch import Batch


def conform(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return stored rows with exactly `schema`'s columns: missing ones null, unknown ones gone (growth rule)."""
    have = set(rows.schema.names)
    columns = [rows[f.name].cast(f.type) if f.name in have else pa.nulls(len(rows), f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def of_tasks(rows: pa.Table, tasks: tuple[str, ...]) -> pa.Table:
    """Return the rows of these tasks."""
    return rows.filter(pc.is_in(rows["task"], value_set=pa.array(tasks)))


def to_batch(rows: pa.Table, project: Project) -> Batch:
    """Return sample rows as the learner takes them; rows of another spec's digest are featurized again."""
    spec = project.features
    table = rows.combine_chunks()
    batches = table.to_batches()
    batch = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
    if batch.num_rows and pc.all(pc.equal(batch["spec"], spec.digest())).as_py():
        slots_BF, numeric_BD = matrix(batch["slots"], spec.slots), matrix(batch["numeric"], spec.numerics)
    else:
        slots_BF, numeric_BD = featurize(batch, spec)
    return Batch(
        np.array(slots_BF, np.int64),
        np.array(numeric_BD, np.float32),
        np.array(batch["label"], np.float32),
        np.array(batch["weight"], np.float32),
        np.array(batch["event_time_ms"], np.int64),
        np.array(pc.fill_null(pc.index_in(batch["task"], value_set=pa.array(project.recipe.heads)), -1), np.int8),
        sample_hashes(batch) if project.recipe.negative_share < 1 else np.zeros(batch.num_rows, np.int64),
    )


def sample_hashes(rows: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """Return a hash of each sample's identity, its impression and task: int64 [B]."""
    return combine64(hash64_texts(rows["event_id"]), hash64_texts(rows["task"])).view(np.int64)
