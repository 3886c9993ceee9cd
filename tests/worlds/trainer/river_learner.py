"""A learner of another framework behind the same contract: River's logistic regression, a sample at a time.

No table of ours, no dense part, no torch. It shows what the contract asks of a learner: NumPy in, NumPy out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from river import linear_model, optim

from headrace.contract.formats.snapshot import Weights
from headrace.contract.recipe import Recipe
from headrace.contract.spec import PAD, FeatureSpec
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.calibration import acceptable, left_out
from headrace.trainer.model.digest import digest
from headrace.trainer.model.learner import State, StepReport


class RiverLearner:
    """River's `LogisticRegression` with SGD; one weight an id, one a number."""

    def __init__(self, recipe: Recipe, features: FeatureSpec) -> None:
        self.recipe, self.step, self._numbers = recipe, 0, features.numerics
        self.model = linear_model.LogisticRegression(
            optimizer=optim.SGD(recipe.lr_table), intercept_lr=recipe.lr_table, l2=recipe.l2_table
        )

    @property
    def rows(self) -> int:
        return sum(isinstance(name, int) for name in self.model._weights)

    def _inputs(self, batch: Batch, i: int) -> dict[int | str, float]:
        numbers = {f"n{d}": float(x) for d, x in enumerate(batch.numeric_BD[i])}
        return {int(slot): 1.0 for slot in batch.slots_BF[i] if slot != PAD} | numbers

    def predict(self, batch: Batch) -> np.ndarray:
        said = [self.model.predict_proba_one(self._inputs(batch, i))[True] for i in range(len(batch))]
        return np.array(said, np.float32)

    def learn(self, batch: Batch) -> StepReport:
        self.step += 1
        keep_B = acceptable(batch, Recipe())
        out_B = keep_B & left_out(self.recipe, batch.label_B, batch.id_B)
        prediction_B = np.full(len(batch), np.nan, np.float32)
        prediction_B[keep_B] = self.predict(batch.where(keep_B))
        part = batch.where(keep_B & ~out_B)
        for i in range(len(part)):
            self.model.learn_one(self._inputs(part, i), bool(part.label_B[i] > 0.5), w=float(part.weight_B[i]))
        touched_K = np.unique(part.slots_BF[part.slots_BF != PAD])
        return StepReport(prediction_B, touched_K, len(part), int((~keep_B).sum()), int(out_B.sum()))

    def weights(self, keys_K: np.ndarray | None = None) -> Weights:
        known = self.model._weights
        if keys_K is None:
            keys_K = np.array([name for name in known if isinstance(name, int)], np.int64)
        values_KV = np.array([[known.get(key, 0.0)] for key in keys_K.tolist()], np.float32).reshape(-1, 1)
        numbers = [[known.get(f"n{d}", 0.0)] for d in range(self._numbers)]
        bias = np.array([self.model.intercept], np.float32)
        return Weights(keys_K, values_KV, {"bias": bias, "numeric": np.array(numbers, np.float32).reshape(-1, 1)})

    def state(self) -> State:
        known = self.model._weights
        keys = np.array([name for name in known if isinstance(name, int)], np.int64)
        return {
            "step": np.array([self.step], np.int64),
            "table.keys": keys,
            "table.values": np.array([known[key] for key in keys.tolist()], np.float64),
            "numeric": np.array([known.get(f"n{d}", 0.0) for d in range(self._numbers)], np.float64),
            "intercept": np.array([self.model.intercept, self.model.optimizer.n_iterations], np.float64),
        }

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        known = self.model._weights
        known.clear()
        for key, value in zip(state["table.keys"].tolist(), state["table.values"].tolist(), strict=True):
            known[key] = value
        for d, value in enumerate(state["numeric"].tolist()):
            known[f"n{d}"] = value
        self.step = int(state["step"][0])
        self.model.intercept = float(state["intercept"][0])
        self.model.optimizer.n_iterations = int(state["intercept"][1])

    def digest(self) -> str:
        return digest(self.state())
