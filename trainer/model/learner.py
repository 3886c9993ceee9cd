"""The learner: (state, batch) -> state, and nothing else. Equal batches in equal order give equal bits.

`Learner` is the contract, in NumPy and Arrow terms; tests/unit/trainer/test_conformance.py is the suite that every
learner passes, one of another framework too. `make_learner` builds the one that a recipe names.

Axes: B samples, F slots, U distinct ids of a batch, D numbers, K keys, V = 1 + dim values of a row, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from headrace.contract.config import TrainConfig
from headrace.contract.errors import ConfigRejected, InvariantBroken
from headrace.contract.formats.snapshot import Weights
from headrace.contract.project import Project
from headrace.contract.recipe import Recipe
from headrace.contract.spec import FeatureSpec
from headrace.trainer.model.batch import Batch, Bools
from headrace.trainer.model.calibration import TAKEN_BACK, Platt, acceptable, gradients, left_out
from headrace.trainer.model.digest import digest
from headrace.trainer.model.held import Held, ordered_tasks
from headrace.trainer.model.layers.average import Average
from headrace.trainer.model.layers.in_order import learn_in_order
from headrace.trainer.model.layers.linear_models import LinearModel
from headrace.trainer.model.moments import Known, Moments
from headrace.trainer.model.objectives import LOG_LOSS, kinds_of, value_gradients, values_said
from headrace.trainer.model.parts import DensePart, State, Store
from headrace.trainer.model.provisional import Provisional
from headrace.trainer.model.scoring import PLATT, Dense, Float32s, Lookup, said, score
from headrace.trainer.model.tables.columns import NO_ROWS, AllStoredRows, below
from headrace.trainer.model.tables.distinct_ids import distinct
from headrace.trainer.model.tables.from_recipe import make_tables
from headrace.trainer.model.tables.group import Tables
from headrace.trainer.model.tables.row_index import Int32s
from headrace.trainer.model.tables.table import Int64s

_NO_KEYS = np.empty(0, np.int64)


@dataclass(frozen=True)
class StepReport:
    """What one step did. `prediction_B` was made before the update; it is NaN where a sample was refused."""

    prediction_B: Float32s
    touched_K: Int64s
    """Keys whose rows changed, those that were forgotten among them: they have their initial values again."""
    learnt: int
    """Samples that were taken: they are learnt, or wait for the negatives of their time (see `held`)."""
    refused: int
    sampled_out: int = 0
    """Negatives that the recipe's `negative_share` leaves out; they are scored all the same."""
    gradient_norm: float = math.nan
    """L2 norm of the dense weights' gradients, those of the mean loss; NaN where it was not measured."""
    table_gradient_norm: float = math.nan
    """L2 norm of the gradients of the batch's rows, those of the summed loss, as rows learn from them."""


class Learner(Protocol):
    """A model that trains, whatever it is made of. Not thread-safe."""

    step: int
    """Batches learnt so far, refused ones too."""

    @property
    def rows(self) -> int:
        """Return how many ids have a row of their own."""

    def predict(self, batch: Batch) -> Float32s:
        """Return what the model says of each sample, of its own task: float32 [B]; changes nothing. That is the
        probability of a positive, or the expected value for a task that learns one."""

    def learn(self, batch: Batch) -> StepReport:
        """Score the batch, then take one step on it; or score and learn sample after sample, where the recipe says so.

        A sample with a NaN or infinite number, a label outside 0..1, a value that its objective does not take, a weight
        that is negative or not finite or a task
        that the recipe does not have is refused; a step whose gradients are not finite is refused whole and changes
        no weight. The step counts all the same.
        """

    def weights(self, keys_K: Int64s | None = None) -> Weights:
        """Return what serving needs of these keys (of all rows by default): keys, values, dense weights."""

    def state(self) -> State:
        """Return a copy of everything; `load` of it gives the same bits and the same future."""

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned."""

    def digest(self) -> str:
        """Return the digest of the whole state; see `headrace.trainer.model.digest`."""


def make_learner(
    recipe: Recipe,
    features: FeatureSpec,
    *,
    device: str = "cpu",
    device_rows: int = 0,
    ordered: Collection[str] = (),
) -> TableLearner:
    """Return the learner that the recipe names, as it begins. Raises `ConfigRejected`; see `Recipe.checked`.

    Args:
        device: where the dense part of `deepfm`, `dcn` and a module is learnt.
        device_rows: rows that are kept there, see `HotRows`; with 0 they are read and learnt on the host.
        ordered: tasks that are learnt in the order of impressions, see `held.ordered_tasks`.
    """
    recipe.checked(features)
    tables, dense = make_tables(recipe, features), make_dense(recipe, features, device=device, device_rows=device_rows)
    if not device_rows or isinstance(dense, LinearModel):
        return TableLearner(recipe, features, tables, dense, ordered)
    from headrace.trainer.model.tables.hot_rows import HotRows  # torch

    return TableLearner(recipe, features, HotRows(tables, device=device, rows=device_rows), dense, ordered)


def make_dense(recipe: Recipe, features: FeatureSpec, *, device: str, device_rows: int) -> DensePart:
    """Return the dense part that the recipe names, as it begins. Imports torch only where it needs it."""
    if recipe.model in ("logistic", "fm"):
        return LinearModel(recipe, features)  # So few numbers that sending them to a device costs more than it saves.
    if recipe.model == "module":
        from headrace.trainer.model.layers.user_module import UserModule

        return UserModule(recipe, features, device=device)
    from headrace.trainer.model.layers.deep_models import DeepModel

    return DeepModel(recipe, features, device=device, reads_device=device_rows > 0)


def learner_for(project: Project, config: TrainConfig) -> TableLearner:
    """Return the project's learner on the device that the settings name. A replay must use the same settings."""
    device = device_of(config.device)
    rows = config.device_rows if device == "cuda" else 0
    ordered = ordered_tasks(project.recipe, project.tasks)
    return make_learner(project.recipe, project.features, device=device, device_rows=rows, ordered=ordered)


def device_of(setting: str) -> str:
    """Return `cpu` or `cuda` for a setting that may be `auto`. Raises `ConfigRejected` where there is no CUDA."""
    import torch

    has_cuda = torch.cuda.is_available()
    if setting == "cuda" and not has_cuda:
        raise ConfigRejected("train.device is cuda and torch finds none: set it to auto or cpu.")
    return "cuda" if has_cuda and setting != "cpu" else "cpu"


class TableLearner:
    """A dense part over collisionless tables: every model of `Recipe.model`."""

    def __init__(
        self, recipe: Recipe, features: FeatureSpec, table: Store, dense: DensePart, ordered: Collection[str]
    ) -> None:
        self.recipe, self.features, self.table, self.net = recipe, features, table, dense
        self.step = 0
        self._kind_T = kinds_of(recipe)
        self._moments = Moments(recipe, features.numerics) if recipe.has_moments else None
        self._waits_T = np.full(len(recipe.heads), recipe.wait_for_negative)
        """Tasks that have had no negative yet, whose positives are not learnt."""
        sizes = {"slots": features.slots, "numerics": features.numerics}
        self._held = Held(recipe, ordered, **sizes) if ordered else None
        self._provisional = Provisional(recipe, slots=features.slots) if ordered and recipe.provisional else None
        self._platt = Platt(recipe) if recipe.calibrate else None
        self._average = Average(recipe.dense_average, dense.dense()) if recipe.dense_average else None

    @property
    def rows(self) -> int:
        """Return how many ids have a row of their own."""
        return len(self.table)

    @property
    def held(self) -> int:
        """Return how many positives wait for the negatives of their time."""
        return len(self._held) if self._held is not None else 0

    def slots_of(self, batch: Batch) -> Int64s:
        """Return the slots of all samples that `learn` of this batch learns, those held before among them: [B, F]."""
        if self._held is None or not len(self._held):
            return batch.slots_BF
        freed_HF = self._held.freed_slots(batch.where(acceptable(batch, self.recipe)))
        return np.concatenate([batch.slots_BF, freed_HF])

    def predict(self, batch: Batch) -> Float32s:
        """Return what the model says of each sample, of its own task; see `Learner.predict`."""
        return self.score(batch, lookup=self.lookup, dense=self.dense())

    def score(self, batch: Batch, *, lookup: Lookup, dense: Dense) -> Float32s:
        """Return the scores that these weights give in place of the learner's: float32 [B]. Looks each id up once."""
        keys_U, index_FB, _ = distinct(batch.slots_BF)
        return self._score(batch, lookup(keys_U), index_FB, dense)

    def _score(self, batch: Batch, values_UV: Float32s, index_FB: Int32s, dense: Dense) -> Float32s:
        values_NV = values_UV[index_FB.T.reshape(-1)]
        slots_BF, numeric_BD = batch.slots_BF, batch.numeric_BD
        said_BT = score(self.recipe, self.features, slots_BF, numeric_BD, lookup=lambda _: values_NV, dense=dense)
        out_B: Float32s = said_BT[np.arange(len(batch)), batch.task_B]
        return out_B

    def lookup(self, keys_K: Int64s) -> Float32s:
        """Return the values of keys, the initial ones where a key has no row: float32 [K, V]."""
        values_KV = self.table.lookup(keys_K)
        if self._provisional is not None:
            self._provisional.put_on(keys_K, values_KV, self.table)
        return values_KV

    def dense(self) -> dict[str, Float32s]:
        """Return copies of the dense weights that score, by name, in the order of `shapes_of`."""
        dense = self.net.dense() if self._average is None else self._average.means()
        if self._moments is not None:
            dense |= self._moments.dense()
            if self._provisional is not None and self.recipe.model != "module":
                self._provisional.take_off(dense, self.table)
        if self._platt is not None:
            dense[PLATT] = self._platt.weights_2T.copy()
        return dense

    def learn(self, batch: Batch) -> StepReport:
        """Score the batch, then take one step on it; see `Learner.learn`.

        Rows learn from the sum of the weighted log losses, so that a row's step does not depend on how many others
        share its batch; dense weights learn from the mean.
        """
        self._check_shape(batch)
        self.step += 1
        prediction_B = np.full(len(batch), np.nan, np.float32)
        keep_B = acceptable(batch, self.recipe)
        refused, part = len(batch) - int(keep_B.sum()), batch if keep_B.all() else batch.where(keep_B)
        place_M = np.flatnonzero(keep_B)
        if self._held is None:
            return self._learn_now(part, place_M, StepReport(prediction_B, _NO_KEYS, 0, refused))
        taken = self._held.take(part)
        waiting, freed = part.where(taken.waits_B), taken.batch.where(taken.place_M < 0)
        prediction_B[place_M[taken.waits_B]] = self.predict(waiting)
        place_M = np.where(taken.place_M < 0, -1, place_M[taken.place_M])
        so_far = StepReport(prediction_B, _NO_KEYS, len(waiting), refused)
        report = self._learn_now(taken.batch, place_M, so_far)
        if self._provisional is None:
            return report
        moved_K = self._provisional.move(waiting, freed, self._held.batch)
        return replace(report, touched_K=np.concatenate([report.touched_K, moved_K]))

    def _learn_now(self, part: Batch, place_M: Int64s, so_far: StepReport) -> StepReport:
        """Take the step on what is learnt now, `place_M` its places in the batch that came, -1 for what was held."""
        prediction_B, sampled_out = so_far.prediction_B, 0
        if self.recipe.negative_share < 1:
            out_M = left_out(self.recipe, part.label_B, part.id_B)
            sampled_out = int(out_M.sum())
            prediction_B[place_M[out_M]] = self.predict(part.where(out_M))
            part, place_M = part.where(~out_M), place_M[~out_M]
        if not len(part):
            return replace(so_far, sampled_out=sampled_out)
        if self._waits_T.any():
            part = self._without_early_positives(part)
        report = self._learn_in_order(part) if self.recipe.updates == "sample" else self._take_step(part)
        own_M, bad_M = place_M >= 0, np.zeros(len(part), np.bool_)
        prediction_B[place_M[own_M]] = report.prediction_B[own_M]
        if report.refused:
            bad_M = np.isnan(report.prediction_B)
        learnt = so_far.learnt + int((own_M & ~bad_M).sum())
        refused = so_far.refused + int((own_M & bad_M).sum())
        return replace(report, prediction_B=prediction_B, learnt=learnt, refused=refused, sampled_out=sampled_out)

    def _without_early_positives(self, batch: Batch) -> Batch:
        """Let positives weigh nothing whose task has had no negative, with this batch (or, sample after sample, before
        them); note which tasks have had one."""
        weight_B = batch.weight_B.copy()
        for task in np.flatnonzero(self._waits_T):
            here_B = batch.task_B == task
            negative_B = here_B & (batch.label_B == 0) & ~batch.correction_B
            self._waits_T[task] = not negative_B.any()
            if self._waits_T[task]:
                weight_B[here_B] = 0
            elif self.recipe.updates == "sample":
                early_B = here_B & (np.arange(len(batch)) < np.argmax(negative_B))
                weight_B[early_B] = 0
        return replace(batch, weight_B=weight_B)

    def _beside(self, batch: Batch) -> Bools:
        """Say which samples are beside one of the same impression that moments have counted: bool [B]."""
        if self.recipe.delayed in ("taken_back", "fake_negative_weighted"):
            return batch.correction_B
        out_B: Bools = batch.correction_B & (self._kind_T != LOG_LOSS)[batch.task_B]
        return out_B

    def _prepared(self, batch: Batch) -> tuple[Batch, Known | None, Float32s]:
        """Return the batch as it is learnt, what was known of its targets, and what is added to its log-odds.

        Moments count the batch here.
        """
        recipe, back_B, more_B = self.recipe, batch.correction_B, self._beside(batch)
        if recipe.delayed != "taken_back":
            back_B = back_B & (self._kind_T != LOG_LOSS)[batch.task_B]
        known, prior_B = None, np.zeros(len(batch), np.float32)
        if self._moments is not None:
            in_order = recipe.updates == "sample"
            what = batch.numeric_BD, batch.label_B, batch.weight_B, batch.task_B
            known = self._moments.take(*what, more_B=more_B, in_order=in_order)
            log_odds_B = (self._kind_T == LOG_LOSS)[batch.task_B]
            prior_B[log_odds_B] = known.before_2B[0, log_odds_B]
            batch = replace(batch, numeric_BD=known.numeric_BD)
        if back_B.any():
            # A negative that was left out was not learnt, so there is nothing to take back.
            back_B = back_B & ~left_out(recipe, np.zeros(len(batch), np.float32), batch.id_B)
            log_odds_B = back_B & (self._kind_T == LOG_LOSS)[batch.task_B]
            label_B = np.where(log_odds_B, TAKEN_BACK, batch.label_B).astype(np.float32)
            batch = replace(batch, label_B=label_B, correction_B=back_B)
        elif batch.correction_B.any():
            batch = replace(batch, correction_B=back_B)
        return batch, known, prior_B

    def _gradients(self, batch: Batch, known: Known | None, logit_B: Float32s, z_B: Float32s) -> Float32s:
        """Return the derivatives of the losses by the log-odds and, of value tasks, by z: float32 [B]."""
        value_B = (self._kind_T != LOG_LOSS)[batch.task_B]
        if known is None or not value_B.any():
            return gradients(self.recipe, logit_B, batch.label_B, batch.weight_B)
        weight_B = batch.weight_B
        if self.recipe.negative_share < 1:
            # Zeros that are learnt stand for those that are left out.
            kept = np.float32(1 / self.recipe.negative_share)
            with np.errstate(over="ignore"):  # An infinite gradient is refused.
                weight_B = weight_B * np.where(batch.label_B == 0, kept, np.float32(1))
        rest = batch.task_B, batch.correction_B, known.after_2B
        out_B = value_gradients(self.recipe, z_B, batch.label_B, weight_B, *rest)
        own_B = ~value_B
        out_B[own_B] = gradients(self.recipe, logit_B[own_B], batch.label_B[own_B], batch.weight_B[own_B])
        return out_B

    def _take_step(self, batch: Batch) -> StepReport:
        raw, moments = batch, self._moments.state() if self._moments is not None else None
        is_felt = self._provisional is not None and len(self._provisional) > 0
        before = self.dense() if self._average is not None or is_felt else {}
        base_T = self._moments.base_rates() if self._moments is not None else None
        batch, known, prior_B = self._prepared(batch)
        ids = self.table.distinct_ids(batch.slots_BF, batch.event_time_ms_B)
        values_UV = self.table.gather(ids)
        logits_BT = self.net.forward(values_UV, ids, batch.numeric_BD)
        own_B = np.arange(len(batch)), batch.task_B
        z_B = np.ascontiguousarray(logits_BT[own_B])
        logit_B = z_B if known is None else z_B + prior_B
        grad_BT = np.zeros_like(logits_BT)
        grad_BT[own_B] = self._gradients(batch, known, logit_B, z_B)
        grad_UV, norms = self.net.backward(grad_BT)
        if not norms.are_finite or not np.isfinite(logit_B).all():
            if self._moments is not None and moments is not None:
                self._moments.load(moments)
            return StepReport(np.full(len(batch), np.nan, np.float32), _NO_KEYS, 0, len(batch))
        if self._moments is not None and base_T is not None:
            rest = raw.label_B, raw.weight_B, raw.task_B
            self._moments.follow(base_T, z_B, *rest, more_B=self._beside(raw))
        if not before:
            said_B = self._said(logit_B, z_B, batch, known)
        else:
            if is_felt or not isinstance(values_UV, np.ndarray):
                values_UV = self.lookup(ids.keys_U)
            said_B = self._score(raw, values_UV, ids.index_FB, before)
        touched_K = self._expired_too(self.table.update(ids, grad_UV, batch.event_time_ms_B), batch)
        self.net.update(len(batch))
        if self._average is not None:
            self._average.add(self.net.dense())
        if self._platt is not None:
            self._platt.learn(logit_B, batch.label_B, batch.weight_B, batch.task_B)
        return StepReport(said_B, touched_K, len(batch), 0, 0, norms.dense / len(batch), norms.rows)

    def _learn_in_order(self, batch: Batch) -> StepReport:
        assert isinstance(self.net, LinearModel) and isinstance(self.table, Tables), "see Recipe.checked"
        moments = self._moments.state() if self._moments is not None else None
        batch, _, prior_B = self._prepared(batch)
        ids = self.table.distinct_ids(batch.slots_BF, batch.event_time_ms_B)
        felt_B = np.float32(0) if self._provisional is None else self._provisional.sums(batch.slots_BF, self.table)
        done = learn_in_order(self.recipe, self.table, self.net, batch, ids, prior_B)
        learnt = int(done.learnt_B.sum())
        if not learnt and self._moments is not None and moments is not None:
            self._moments.load(moments)
        logit_B = done.logit_B + felt_B
        said_B = np.where(done.learnt_B, self._said(logit_B, logit_B, batch, None), np.float32(np.nan))
        touched_K = self._expired_too(done.touched_K, batch) if learnt else _NO_KEYS
        if self._platt is not None and learnt:
            own = batch.where(done.learnt_B)
            self._platt.learn(done.logit_B[done.learnt_B], own.label_B, own.weight_B, own.task_B)
        norm = done.norms.dense / max(learnt, 1)
        return StepReport(said_B, touched_K, learnt, len(batch) - learnt, 0, norm, done.norms.rows)

    def _said(self, logit_B: Float32s, z_B: Float32s, batch: Batch, known: Known | None) -> Float32s:
        """Return what was said before the step."""
        platt_2B = self._platt.weights_2T[:, batch.task_B] if self._platt is not None else None
        out_B = said(self.recipe, logit_B, platt_2T=platt_2B, targets_2T=None, kind_T=self._kind_T)
        value_B = (self._kind_T != LOG_LOSS)[batch.task_B]
        if known is not None and value_B.any():
            known_2B = known.before_2B[:, value_B].astype(np.float32)
            out_B[value_B] = values_said(self._kind_T[batch.task_B[value_B]], z_B[value_B], known_2B)
        return out_B

    def _expired_too(self, touched_K: Int64s, batch: Batch) -> Int64s:
        forgotten_K = self.table.expire(int(batch.event_time_ms_B.max()))
        return np.concatenate([touched_K, forgotten_K]) if len(forgotten_K) else touched_K

    def weights(self, keys_K: Int64s | None = None) -> Weights:
        """Return what serving needs of these keys (of all rows by default): keys, values, dense weights."""
        if keys_K is None:
            keys_K = self.table.keys()
            if self._provisional is not None:
                keys_K = np.concatenate([keys_K, np.setdiff1d(self._provisional.keys(), keys_K)])
        return Weights(keys_K, self.lookup(keys_K), self.dense())

    def felt(self) -> tuple[Int64s, Float32s]:
        """Return the ids that are served otherwise than their rows say, positives that wait having been felt, and
        their values: int64 [K], float32 [K, V]."""
        keys_K = _NO_KEYS if self._provisional is None else self._provisional.keys()
        return keys_K, self.lookup(keys_K)

    def state(self) -> State:
        """Return a copy of everything; `load` of it gives the same bits."""
        return self._around(self.table.state())

    def rest(self) -> State:
        """Return a copy of everything but the rows that `table.indexes` has."""
        return self._around(self.table.rest())

    def _around(self, table: State) -> State:
        out: State = {"step": np.array([self.step], np.int64)}
        out |= {f"table.{name}": array for name, array in table.items()}
        out |= {f"dense.{name}": array for name, array in self.net.state().items()}
        if self._moments is not None:
            out |= {f"moments.{name}": array for name, array in self._moments.state().items()}
        if self.recipe.wait_for_negative:
            out["waits"] = self._waits_T.copy()
        if self._held is not None:
            out |= {f"held.{name}": array for name, array in self._held.state().items()}
        if self._platt is not None:
            out |= {"platt.weights": self._platt.weights_2T.copy(), "platt.squares": self._platt.squares_2T.copy()}
        if self._average is not None:
            out |= {f"average.{name}": array for name, array in self._average.state().items()}
        return out

    def load(self, state: Mapping[str, npt.NDArray[np.generic]], rows: AllStoredRows = NO_ROWS) -> None:
        """Replace everything by what `state` returned. Tables that `rows` names take theirs from there, piece by piece,
        so that no second copy of them is needed."""
        self.step = int(state["step"][0])
        self.table.load(below("table.", state), below("table.", rows))
        self.net.load({n.removeprefix("dense."): a for n, a in state.items() if n.startswith("dense.")})
        if self._moments is not None:
            self._moments.load({n.removeprefix("moments."): a for n, a in state.items() if n.startswith("moments.")})
        if self.recipe.wait_for_negative:
            self._waits_T = np.array(state["waits"], np.bool_)
        if self._held is not None:
            self._held.load({n.removeprefix("held."): a for n, a in state.items() if n.startswith("held.")})
            if self._provisional is not None:
                self._provisional.begin(self._held.batch)
        if self._platt is not None:
            self._platt.weights_2T = np.array(state["platt.weights"], np.float32)
            self._platt.squares_2T = np.array(state["platt.squares"], np.float32)
        if self._average is not None:
            self._average.load({n.removeprefix("average."): a for n, a in state.items() if n.startswith("average.")})

    def digest(self) -> str:
        """Return the digest of the whole state."""
        return digest(self.state())

    def _check_shape(self, batch: Batch) -> None:
        slots, numerics = self.features.slots, self.features.numerics
        if batch.slots_BF.shape[1:] != (slots,) or batch.numeric_BD.shape[1:] != (numerics,):
            raise InvariantBroken(
                f"a batch of {batch.slots_BF.shape[1]} slots and {batch.numeric_BD.shape[1]} numbers reached a model "
                f"of {slots} and {numerics}: it was featurized by another specification."
            )
