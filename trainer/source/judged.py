"""What a step's record says of its rows: the sum of their ids' hashes, and how many of them are not learnt. Pure.

The rows of a step are judged together; a range of them is then told by two rows of running totals.

Legend: B rows, S rows and one more, J the sum of hashes, refused, left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.formats.sample import matrix
from headrace.contract.formats.steps import StepRange
from headrace.contract.project import Project
from headrace.contract.recipe import Recipe
from headrace.contract.spec import FeatureSpec
from headrace.kernels.sample_ids import id_hashes
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.calibration import acceptable, left_out
from headrace.trainer.source.batch import heads_of, sample_hashes, targets

U64s = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]


JUDGED = ("event_id", "task", "correction", "label", "value", "weight", "numeric", "spec")
"""The columns that are looked at."""
Judge = Callable[[pa.RecordBatch], U64s]
"""Gives running totals of rows of the run's tasks, uint64 [S, J], the first row zeros."""


def with_judged(
    ranges: Sequence[StepRange], rows_of: Sequence[Sequence[pa.RecordBatch]], judge: Judge
) -> tuple[StepRange, ...]:
    """Return ranges that also say what is judged of their rows, all in one go: a call costs as much as 1,000 rows."""
    pieces = [piece.select(JUDGED) for pieces in rows_of for piece in pieces]
    if not pieces:
        return tuple(ranges)
    totals_SJ = judge(pieces[0] if len(pieces) == 1 else pa.concat_batches(pieces))
    told: list[StepRange] = []
    start = 0
    for each, own in zip(ranges, rows_of, strict=True):
        stop = start + sum(piece.num_rows for piece in own)
        sum_, refused, left_out_ = (totals_SJ[stop] - totals_SJ[start]).tolist()
        told.append(msgspec.structs.replace(each, sum=sum_, refused=refused, left_out=left_out_))
        start = stop
    return tuple(told)


def judge_of(project: Project) -> Judge:
    """Return the judge of what a learner of this project takes."""
    spec, recipe = project.features, project.recipe
    digest = spec.digest()

    def judge(rows: pa.RecordBatch) -> U64s:
        totals_SJ = np.zeros((rows.num_rows + 1, 3), np.uint64)
        refused_B = refused_rows(rows, spec, digest, recipe)
        np.cumsum(id_hashes(rows), out=totals_SJ[1:, 0])
        if refused_B.any():
            np.cumsum(refused_B, out=totals_SJ[1:, 1])
        if recipe.negative_share < 1:
            np.cumsum(_left_out(rows, recipe) & ~refused_B, out=totals_SJ[1:, 2])
        return totals_SJ

    return judge


def refused_rows(rows: pa.RecordBatch, spec: FeatureSpec, digest: str, recipe: Recipe) -> Bools:
    """Say which rows no learner of `spec` and `recipe` takes: bool [B].

    Numbers that another spec made are not looked at: the trainer featurizes those rows again.
    """
    ours_B = pc.fill_null(pc.equal(rows["spec"], digest), False).to_numpy(zero_copy_only=False)
    refused_B = np.zeros(rows.num_rows, np.bool_)
    for is_ours, here_B in ((True, ours_B), (False, ~ours_B)):
        if here_B.all() and len(here_B):
            return ~_acceptable(rows, spec.numerics if is_ours else 0, recipe)
        if here_B.any():
            part = rows.filter(pa.array(here_B))
            refused_B[here_B] = ~_acceptable(part, spec.numerics if is_ours else 0, recipe)
    return refused_B


def _left_out(rows: pa.RecordBatch, recipe: Recipe) -> Bools:
    return left_out(recipe, rows["label"].to_numpy(), sample_hashes(rows))


def _acceptable(rows: pa.RecordBatch, numerics: int, recipe: Recipe) -> Bools:
    count = rows.num_rows
    numeric_BD = matrix(rows["numeric"], numerics) if numerics else np.zeros((count, 0))
    batch = Batch(
        np.zeros((count, 0), np.int64),
        np.array(numeric_BD, np.float32),
        targets(rows, recipe),
        np.array(rows["weight"], np.float32),
        np.zeros(count, np.int64),
        # Rows of other tasks are not the run's; they are not judged here.
        np.maximum(heads_of(rows, recipe), 0),
        np.zeros(count, np.int64),
    )
    return acceptable(batch, recipe)
