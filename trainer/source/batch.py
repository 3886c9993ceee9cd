"""Sample rows as the learner takes them: the project's columns, featurized by its own spec."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.hashing import combine64
from headrace.contract.project import Project
from headrace.contract.recipe import Recipe
from headrace.kernels.hashes import hash64_texts
from headrace.stream.features.stored import stored_features
from headrace.trainer.model.batch import Batch


def of_tasks(rows: pa.Table, tasks: tuple[str, ...]) -> pa.Table:
    """Return the rows of these tasks."""
    return rows.filter(pc.is_in(rows["task"], value_set=pa.array(tasks)))


def to_batch(rows: pa.Table, project: Project) -> Batch:
    """Return sample rows as the learner takes them; rows of another spec's digest are featurized again."""
    table = rows.combine_chunks()
    batches = table.to_batches()
    batch = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
    slots_BF, numeric_BD = stored_features(batch, project.features)
    return Batch(
        np.array(slots_BF, np.int64),
        np.array(numeric_BD, np.float32),
        targets(batch, project.recipe),
        np.array(batch["weight"], np.float32),
        np.array(batch["event_time_ms"], np.int64),
        heads_of(batch, project.recipe),
        sample_hashes(batch) if project.recipe.negative_share < 1 else np.zeros(batch.num_rows, np.int64),
        np.array(pc.fill_null(batch["correction"], False), np.bool_),
    )


def heads_of(rows: pa.RecordBatch, recipe: Recipe) -> npt.NDArray[np.int8]:
    """Return which of the recipe's heads each row's task is, -1 for none: int8 [B]."""
    return np.array(pc.fill_null(pc.index_in(rows["task"], value_set=pa.array(recipe.heads)), -1), np.int8)


def targets(rows: pa.RecordBatch, recipe: Recipe) -> npt.NDArray[np.float32]:
    """Return what the rows' tasks learn, float32 [B]: the label, or for a task that learns a value that of the
    feedback, 0 where there was none and NaN where it brought none."""
    label_B = np.array(rows["label"], np.float32)
    if not recipe.values:
        return label_B
    here_B = np.array(pc.is_in(rows["task"], value_set=pa.array(recipe.values)), np.bool_) & (label_B > 0)
    value_B = np.array(pc.cast(rows["value"], pa.float64()).to_numpy(zero_copy_only=False), np.float64)
    with np.errstate(over="ignore"):  # What is beyond float32 is infinite, and refused.
        out_B: npt.NDArray[np.float32] = np.where(here_B, value_B, label_B).astype(np.float32)
    return out_B


def sample_hashes(rows: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """Return a hash of each sample's identity, its impression and task: int64 [B]."""
    return combine64(hash64_texts(rows["event_id"]), hash64_texts(rows["task"])).view(np.int64)
