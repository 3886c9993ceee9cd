"""The learner: (state, batch) -> state, with nothing from outside. Equal batches in equal order give equal bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.contract.errors import InvariantBroken
from headrace.contract.project import Recipe
from headrace.contract.snapshot import Weights
from headrace.contract.spec import FeatureSpec
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.deepfm import DeepFM
from headrace.trainer.model.digest import digest
from headrace.trainer.model.scoring import Float32s, score, sigmoid
from headrace.trainer.model.table_optimizers import Optimizer
from headrace.trainer.model.tables import Int64s, Table

State = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class StepReport:
    """What one step did. `prediction_B` was made before the update; it is NaN where a sample was refused."""

    prediction_B: Float32s
    touched_K: Int64s
    """Keys whose rows changed."""
    learnt: int
    refused: int


class Learner:
    """DeepFM over collisionless tables. Not thread-safe."""

    def __init__(self, recipe: Recipe, features: FeatureSpec) -> None:
        self.recipe, self.slots, self.numerics = recipe, features.slots, features.numerics
        self.step = 0
        self.table = Table(
            dim=recipe.dim,
            seed=recipe.seed,
            scale=recipe.init_scale,
            optimizer=Optimizer(lr=recipe.lr_table, l2=recipe.l2_table),
        )
        self.dense = DeepFM(
            slots=self.slots,
            numerics=self.numerics,
            dim=recipe.dim,
            hidden=recipe.hidden,
            lr=recipe.lr_dense,
            seed=recipe.seed,
        )

    def predict(self, batch: Batch) -> Float32s:
        """Return the probability of a positive for each sample; changes nothing."""
        return score(batch.slots_BF, batch.numeric_BD, lookup=self.table.lookup, dense=self.dense.dense())

    def learn(self, batch: Batch) -> StepReport:
        """Score the batch, then take one step on it.

        A sample with a NaN or infinite number, a label outside 0..1 or a negative weight is refused; a batch whose
        gradients are not finite is refused whole and changes no weight. The step counts all the same.
        """
        if batch.slots_BF.shape[1:] != (self.slots,) or batch.numeric_BD.shape[1:] != (self.numerics,):
            raise InvariantBroken(
                f"a batch of {batch.slots_BF.shape[1]} slots and {batch.numeric_BD.shape[1]} numbers reached a model "
                f"of {self.slots} and {self.numerics}: it was featurized by another specification."
            )
        self.step += 1
        prediction_B = np.full(len(batch), np.nan, np.float32)
        keep_B = _acceptable(batch)
        part = batch if keep_B.all() else batch.where(keep_B)
        nothing = np.empty(0, np.int64)
        if not len(part):
            return StepReport(prediction_B, nothing, 0, len(batch))
        rows_BF = self.table.rows_for(part.slots_BF, part.event_time_ms_B)
        logits_B, grad_BFV, dense = self.dense.gradients(
            self.table.gather(rows_BF, part.slots_BF), part.numeric_BD, part.label_B, part.weight_B
        )
        finite = np.isfinite(logits_B).all() and np.isfinite(grad_BFV).all()
        if not finite or not all(bool(g.isfinite().all()) for g in dense.values()):
            return StepReport(prediction_B, nothing, 0, len(batch))
        prediction_B[keep_B] = sigmoid(logits_B)
        touched_R = self.table.update(rows_BF, grad_BFV, part.event_time_ms_B)
        self.dense.update(dense)
        return StepReport(prediction_B, self.table.keys_of(touched_R), len(part), len(batch) - len(part))

    def weights(self, keys_K: Int64s | None = None) -> Weights:
        """Return what serving needs of these keys (of all rows by default): keys, values, dense weights."""
        if keys_K is None:
            keys_K = self.table.keys()
        return Weights(keys_K, self.table.lookup(keys_K), self.dense.dense())

    def state(self) -> State:
        """Return a copy of everything; `load` of it gives the same bits."""
        out: State = {"step": np.array([self.step], np.int64)}
        out |= {f"table.{name}": array for name, array in self.table.state().items()}
        out |= {f"dense.{name}": array for name, array in self.dense.state().items()}
        return out

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned."""
        self.step = int(state["step"][0])
        self.table.load({n.removeprefix("table."): a for n, a in state.items() if n.startswith("table.")})
        self.dense.load({n.removeprefix("dense."): a for n, a in state.items() if n.startswith("dense.")})

    def digest(self) -> str:
        """Return the digest of the whole state."""
        return digest(self.state())


def _acceptable(batch: Batch) -> npt.NDArray[np.bool_]:
    finite_B = np.isfinite(batch.numeric_BD).all(axis=1) & np.isfinite(batch.weight_B)
    out: npt.NDArray[np.bool_] = finite_B & (batch.weight_B >= 0) & (batch.label_B >= 0) & (batch.label_B <= 1)
    return out
