"""The recipe: which model, how it is built and how it is trained. Data only; every number is part of a run's digest.

Growth: a value that equals its default is not written, so a field that is added later leaves the digest of every
recipe that does without it. Hence a default never changes; a better number is a new recipe in
`headrace.trainer.recipes`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from headrace.contract.errors import ConfigRejected, listed
from headrace.contract.functions import model_of
from headrace.contract.spec import Feature, FeatureSpec

Model = Literal["deepfm", "dcn", "fm", "logistic", "module"]
Optimizer = Literal["adagrad_row", "adagrad", "ftrl", "adam"]
"""Of a row of the tables. `adagrad_row`: one sum of squares for the embedding, one for the linear weight."""
Delayed = Literal["none", "fake_negative_weighted", "fake_negative_calibrated", "taken_back"]
Objective = Literal["log_loss", "weighted", "squared", "huber", "tweedie"]
"""What a task learns: `log_loss` whether its feedback comes, the others the feedback's `value`, which is 0 where none
comes. See `headrace.trainer.model.objectives`."""

TASKS_MAX = 16
LAYERS_MAX = 8
Rate = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How the model is built and trained. The functions of `headrace.trainer.recipes` return good ones."""

    task: str = "click"
    """The main task: `scores` of /v1/rank are its scores, and it is evaluated first."""
    tasks: Annotated[tuple[str, ...], Meta(max_length=TASKS_MAX)] = ()
    """Tasks that are learnt together, `task` among them: tables and hidden layers are shared, each task has a head. A
    sample is of one task and trains that task's head. Empty: `task` alone."""
    objectives: dict[str, Objective] = {}
    """What a task learns where that is not whether its feedback comes: the expected `value` of it, on its own scale, 0
    for impressions without feedback. `weighted` (log loss, a positive weighs its value) and `tweedie` are for values
    from 0 on that are mostly 0, such as money; `squared` and `huber` for any number."""
    tweedie_power: Annotated[float, Meta(gt=1, lt=2)] = 1.5
    """Objective `tweedie`: the variance grows with the mean to this power. Nearer 1 for counts, nearer 2 for rare and
    large values."""
    huber_delta: Rate = 1.0
    """Objective `huber`: errors beyond so many standard deviations of the value count linearly. It learns something
    between median and mean."""
    model: Model = "deepfm"
    module: str = ""
    """Model `module`: name of a function that the project declares with `@model_function`, which returns the
    torch.nn.Module."""
    module_version: Annotated[int, Meta(ge=0)] = 1
    dim: Annotated[int, Meta(ge=0, le=256)] = 8
    """Numbers of a row's embedding; each row has a linear weight besides. `logistic` has none, whatever this is."""
    hidden: Annotated[tuple[Annotated[int, Meta(gt=0, le=4_096)], ...], Meta(max_length=LAYERS_MAX)] = (64, 32)
    """Widths of the hidden layers of `deepfm` and `dcn`."""
    cross_layers: Annotated[int, Meta(gt=0, le=LAYERS_MAX)] = 2
    """Cross layers of `dcn`: x_(l+1) = x_0 * (W_l x_l + b_l) + x_l."""
    cross_rank: Annotated[int, Meta(ge=0, le=4_096)] = 0
    """Rank of `dcn`'s matrices W_l; 0: full, which costs the square of the width of x_0."""
    lr_table: Rate = 0.05
    """Learning rate of rows; FTRL's alpha."""
    lr_dense: Rate = 0.001
    """Learning rate of dense weights, which learn by Adam."""
    dense_average: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """What a step leaves of a running average of the dense weights. The average scores and is served in place of the
    newest weights, which go on learning: it allows a higher `lr_dense`. 0: none. Source:
    `trainer.model.layers.average`."""
    l1_table: NotNegative = 0.0
    """FTRL's lambda 1: a weight whose adjusted sum of gradients is not above it is exactly 0."""
    l2_table: NotNegative = 0.0
    optimizer: Optimizer = "adagrad_row"
    ftrl_beta: NotNegative = 1.0
    """FTRL's beta: lr_table / (beta + sqrt(n)) is the rate of a weight with the sum of squares n."""
    adam_beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.999
    """Of rows that learn by Adam."""
    squares_half_life_ms: Annotated[int, Meta(ge=0)] = 0
    """Adagrad's rows: in so much event time a sum of squares halves, so that a row's rate does not end at 0 over weeks
    and an idle row learns fast again. 0: never."""
    squares_init: NotNegative = 0.0
    """Adagrad's rows: what a new row's sums of squares begin with. From 0 the first gradient of a row, large or small,
    moves it by lr_table; positives come first, and would move it more than their share."""
    init_scale: NotNegative = 0.01
    """A new row's embedding is uniform in +- this, by its key and the seed."""
    slot_dims: dict[str, Annotated[int, Meta(ge=0, le=256)]] = {}
    """Embedding numbers of some features' rows in place of `dim`, by `label_of(feature)`; at most `dim`."""
    slot_optimizers: dict[str, Optimizer] = {}
    """Optimizer of some features' rows, by `label_of(feature)`."""
    admit_after: Annotated[int, Meta(gt=0, le=255)] = 1
    """How often an id must be seen before it gets a row; until then it scores as a row that was never learnt."""
    admit_by: Literal["exact", "sketch"] = "exact"
    """How sightings are counted: each id by itself, or in a sketch of fixed size that may count too many."""
    expire_after_ms: Annotated[int, Meta(ge=0)] = 0
    """A row that was not used for so long in event time is removed. 0: never."""
    negative_share: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Share of the negatives that is learnt, chosen by a hash of the sample's id and the seed. The log-odds are
    corrected for it where they are learnt: what the model says is the probability among all samples."""
    delayed: Delayed = "none"
    """How a positive is learnt whose impression was learnt as a negative before. `taken_back`: the gradient of that
    negative is taken back, so that the model says the true rate; for tasks of policy `eager` and of `correct_ms`, and
    the only way for a task with an objective, whatever this says. The two others are for tasks of policy `eager`.
    `fake_negative_weighted`: samples
    are weighted so that the model says the true rate. `fake_negative_calibrated`: they are learnt as they come, and
    what the model learns, b = q / (1 + q), is turned into q when it scores. Source: Ktena et al., "Addressing delayed
    feedback for continuous training with neural networks in CTR prediction", RecSys 2019."""
    standardize: bool = False
    """Numbers are learnt as (x - mean) / standard deviation, both running, and a task's log-odds are learnt as what is
    added to those of its base rate so far. All of it is part of the model's state."""
    recent_base: bool = False
    """With `standardize`, by batch: a task's base rate is of recent samples more than of early ones, and what the model
    adds to it on average is taken off again. A base rate that rises while labels come late, and what weights had
    learnt to make up for it, then do not add up. See `headrace.trainer.model.moments`."""
    wait_for_negative: bool = False
    """Positives of a task are not learnt before its first negative. Positives come at once and negatives when their
    window ends, so that a log's first window would teach that all are positive."""
    ordered_from_ms: Annotated[int, Meta(ge=0)] = 0
    """Tasks of policy `window` whose window is this long or longer are learnt in the order of their impressions: a
    positive waits for the negatives of its impression's time. 0: no task; a positive is learnt when it comes, beside
    the negatives of a window ago, and with features that grow, such as counters that fill, the model then takes what
    has grown for what is positive. See `headrace.trainer.model.held`."""
    provisional: bool = False
    """With `ordered_from_ms`: a positive that waits is felt at once. Until it is learnt, the linear weights of its ids
    are served higher by about one step of it, by `lr_table` at most. See `headrace.trainer.model.provisional`."""
    stored_order: Literal["event_time", "position"] = "event_time"
    """Order in which the lake is learnt. `position`: as samples followed one another in the log, which is how they come
    live. By `event_time` the lake ends with the positives of a window whose negatives are still to come."""
    rate_rows: Annotated[int, Meta(ge=0, le=65_536)] = 0
    """Rows of a step that `lr_dense` is for. With it every sample weighs the same for the dense weights; where steps
    have n rows on average, fewer than these, the rate is lr_dense sqrt(n / rate_rows). So live steps make the weights
    swing no more than a backfill's. 0: a step is along the mean of its gradients, at `lr_dense`, whatever its size;
    live, a positive that comes alone then counts for more than negatives that come together."""
    calibrate: bool = False
    """Learn a scale and an offset of the log-odds, a pair a task, from scores made before their labels were learnt, and
    apply them to every score. Source: Platt, "Probabilistic outputs for support vector machines", 1999."""
    batch_rows: Annotated[int, Meta(gt=0, le=65_536)] = 512
    """Most rows in one training step."""
    updates: Literal["batch", "sample"] = "batch"
    """`sample`: every sample is a step of its own, scored with what those before it have taught, whatever batch they
    came in. For `logistic` and `fm` of one task whose rows are all of one kind."""
    seed: int = 7

    @property
    def heads(self) -> tuple[str, ...]:
        """Return the tasks in the order of the model's heads.

        >>> Recipe(task="click").heads, Recipe(tasks=("like", "click")).heads
        (('click',), ('like', 'click'))
        """
        return self.tasks or (self.task,)

    @property
    def values(self) -> tuple[str, ...]:
        """Return the tasks that learn a value, in the order of the heads.

        >>> Recipe(tasks=("click", "revenue"), objectives={"revenue": "tweedie"}).values
        ('revenue',)
        """
        return tuple(name for name in self.heads if self.objective(name) != "log_loss")

    def objective(self, task: str) -> Objective:
        """Return what a task learns."""
        return self.objectives.get(task, "log_loss")

    @property
    def has_moments(self) -> bool:
        """Say whether running moments are part of the model's state: of numbers, base rates and values."""
        return self.standardize or bool(self.values)

    @property
    def row_dim(self) -> int:
        """Return how many numbers a row of the tables has behind its first one.

        `logistic` keeps a linear weight a task and nothing else; every other model an embedding.
        """
        return len(self.heads) - 1 if self.model == "logistic" else self.dim

    @property
    def row_scale(self) -> float:
        """Return the scale of a new row's values: 0 for `logistic`, whose values are all linear weights."""
        return 0.0 if self.model == "logistic" else self.init_scale

    def checked(self, features: FeatureSpec) -> Recipe:
        """Return self, or raise `ConfigRejected` naming what contradicts itself or the features."""
        if len(set(self.heads)) < len(self.heads) or self.task not in self.heads:
            raise ConfigRejected(
                f"recipe.tasks {list(self.heads)} must name recipe.task {self.task!r}, each task once."
            )
        if (self.model == "module") != bool(self.module):
            raise ConfigRejected(
                f"recipe.model is {self.model!r} and recipe.module {self.module!r}: a module of your own needs both "
                'model="module" and the name of its @model_function, any other model neither.'
            )
        if self.module:
            model_of(self.module, self.module_version)
        if self.calibrate and self.delayed == "fake_negative_calibrated":
            raise ConfigRejected(
                "recipe.calibrate and delayed='fake_negative_calibrated' both change the scores: drop one."
            )
        self._check_objectives()
        if self.calibrate and self.dense_average:
            raise ConfigRejected(
                "recipe.calibrate learns from scores of the newest dense weights, dense_average scores with others: "
                "drop one."
            )
        if self.updates == "sample" and (
            self.model not in ("logistic", "fm")
            or len(self.heads) > 1
            or self.dense_average
            or self.slot_dims
            or self.slot_optimizers
            or self.objectives
            or self.rate_rows
            or self.recent_base
        ):
            raise ConfigRejected(
                "recipe.updates='sample' is for model 'logistic' or 'fm' with one task and without slot_dims, "
                "slot_optimizers, dense_average, objectives, rate_rows and recent_base: drop those, or learn by batch."
            )
        kinds = {self.optimizer, *self.slot_optimizers.values()}
        if self.l1_table and "ftrl" not in kinds:
            raise ConfigRejected(f"recipe.l1_table is {self.l1_table} and no row learns by ftrl, which alone knows it.")
        if self.squares_half_life_ms and not kinds & {"adagrad", "adagrad_row"}:
            raise ConfigRejected(
                "recipe.squares_half_life_ms is of Adagrad's rows, and no row learns by it: leave it 0."
            )
        labels = {label_of(feature) for feature in features.features if feature.slots}
        unknown = (self.slot_dims.keys() | self.slot_optimizers.keys()) - labels
        if unknown:
            raise ConfigRejected(
                f"recipe.slot_dims and slot_optimizers name {listed(unknown)}; slots have {listed(labels)}."
            )
        wide = {name: dim for name, dim in self.slot_dims.items() if dim > self.dim}
        if wide:
            raise ConfigRejected(f"recipe.slot_dims {wide} are above recipe.dim {self.dim}, the widest.")
        if self.slot_dims and self.model == "logistic":
            raise ConfigRejected("recipe.slot_dims are of embeddings, which the model 'logistic' does not have.")
        if labels and all(self.slot_dims.get(label, self.dim) < self.dim for label in labels):
            raise ConfigRejected(f"recipe.slot_dims leave no slot of recipe.dim {self.dim}: lower it to the widest.")
        return self

    def _check_objectives(self) -> None:
        if unknown := self.objectives.keys() - set(self.heads):
            raise ConfigRejected(
                f"recipe.objectives names {sorted(unknown)}, which the recipe does not learn; it learns "
                f"{list(self.heads)}: add them to recipe.tasks."
            )
        if self.values and (self.calibrate or self.delayed.startswith("fake_negative")):
            raise ConfigRejected(
                f"recipe.calibrate and delayed={self.delayed!r} are of log-odds, and {sorted(self.values)} learn "
                'values: drop them, or take delayed="taken_back".'
            )


def label_of(feature: Feature) -> str:
    """Return what `slot_dims` and `slot_optimizers` call a feature: the fields it reads, joined by `*`.

    >>> from headrace.contract.spec import Categorical, Cross
    >>> label_of(Categorical(field="user_id")), label_of(Cross(fields=("user_id", "tab")))
    ('user_id', 'user_id*tab')
    """
    return "*".join(feature.inputs())


def slot_labels(features: FeatureSpec) -> tuple[str, ...]:
    """Return the label of the feature that each slot belongs to: F names."""
    return tuple(label_of(feature) for feature in features.features for _ in range(feature.slots))
