"""What a user declares in one Python file: events, tasks, feature spec and recipe. Data only; no I/O.

PROJECT = Project(
    impression=ImpressionType(tag="store.impression", key="user_id", fields={"user_id": "int64", ...}),
    feedback=(FeedbackType(name="click", tag="store.click", fields={"item_id": "int64"}),),
    tasks=(Task(name="click", feedback="click", window_ms=10_000),),
    features=FeatureSpec(...),
    recipe=Recipe(...),
)
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from headrace.contract.checks.declarations import EXTRA as EXTRA
from headrace.contract.checks.declarations import LANES_MAX as LANES_MAX
from headrace.contract.checks.declarations import contradictions
from headrace.contract.checks.types import type_faults
from headrace.contract.crawl import Crawl
from headrace.contract.errors import ConfigRejected, listed, meant
from headrace.contract.mapping import AccessLog
from headrace.contract.recipe import Recipe as Recipe
from headrace.contract.spec import LISTS as LISTS
from headrace.contract.spec import FeatureSpec
from headrace.contract.spec import FieldType as FieldType

Unknown = Literal["drop", "refuse", "keep"]
"""What happens to fields that a type does not declare. `keep`: as JSON in the declared string field `extra`."""
Private = Literal["drop", "hash"]
"""What happens to a personal field at the gateway. `drop`: it is stored nowhere, and not declared among the fields;
`hash`: a declared string field holds its keyed hash; see `headrace.contract.privacy`."""


class ImpressionType(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The event that says what was shown. Every raw field is nullable.

    Fields that every impression record carries besides the raw ones: `event_id` (else derived), `request_id`
    (required), `place` (0-based place in the answer, default 0), `event_time_ms` (else the shipper's time),
    `version` (the model version that scored it), `counter.*` (counters as they were served).
    """

    tag: str
    key: str
    """Raw field that is the partition key; rendered as a string."""
    fields: dict[str, FieldType]
    unknown: Unknown = "drop"
    private: dict[str, Private] = {}


class FeedbackType(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An event that answers an impression, found by (`request_id`, `place`).

    Declare its tag and the key fields of every counter that counts it. The partition key is there without being
    declared; the service must log it. `value` (float, optional) is the dwell or price.
    """

    name: str
    tag: str
    fields: dict[str, FieldType] = {}
    unknown: Unknown = "drop"
    private: dict[str, Private] = {}


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One label: positive (1.0) if `feedback` comes within the window after the impression, else negative (0.0)."""

    name: str
    feedback: str
    window_ms: Annotated[int, Meta(gt=0)]
    policy: Literal["window", "eager"] = "window"
    """`window`: one sample, when the label is known. `eager`: a negative at once, and a positive that corrects it if
    feedback comes within the window. A model then learns b = w q / (1 + w q) of a true rate q and the correction's
    weight w; it ranks the same, and b / (w (1 - b)) is q. Source: fake negative calibration, Ktena et al. 2019."""
    correction_weight: Annotated[float, Meta(gt=0)] = 1.0
    """Weight of the positive that corrects a negative: an eager one, or one that late feedback proved wrong."""
    correct_ms: Annotated[int, Meta(ge=0)] = 0
    """Policy `window`: how long after the window late feedback still makes a positive that corrects the negative. The
    impression is kept for that long. 0: late feedback is counted and stays in `events` alone."""


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """All that the stages need to know about a user's service."""

    impression: ImpressionType
    feedback: tuple[FeedbackType, ...]
    tasks: tuple[Task, ...]
    features: FeatureSpec
    recipe: Recipe = Recipe()
    name: str = "default"
    """Of the model: a-z, 0-9, `_` and `-`. It is part of the names of its blobs, and of its records' keys."""
    variants: dict[str, Recipe] = {}
    """Other recipes, by name (a-z, 0-9 and `-`, 4 at most), that learn beside `recipe` from the same samples, each as a
    model of its own: `headrace train --variant NAME`. `headrace model promote NAME` lets one be served."""
    variant: str = ""
    """Which variant's this is, see `of_variant`; nobody declares it."""
    mappings: tuple[AccessLog, ...] = ()
    """Access logs whose lines are events; see `headrace.contract.mapping`."""
    crawls: tuple[Crawl, ...] = ()
    """What the crawler brings from the web; see `headrace.contract.crawl`."""

    @property
    def model(self) -> str:
        """Return the name of the model that `recipe` makes: the project's, and the variant's behind a dot.

        The names of blobs, the keys of records and the writer of steps have it. No name has a dot of its own.
        """
        return f"{self.name}.{self.variant}" if self.variant else self.name

    @property
    def row_dim(self) -> int:
        """Return the `Recipe.row_dim` of the widest recipe that is declared: what serving makes room for."""
        return max(recipe.row_dim for recipe in (self.recipe, *self.variants.values()))

    def of_variant(self, name: str) -> Project:
        """Return the project as a variant learns it: with its recipe, under its model's name.

        Raises `ConfigRejected` for one that is not declared.
        """
        if name not in self.variants:
            there = f"there are: {listed(self.variants)}.{meant(name, self.variants)}" if self.variants else "none is."
            raise ConfigRejected(
                f"variant {name!r} is not declared; {there} Declare it where the project is made: "
                f"Project(..., variants={{{name!r}: deepfm(...)}})."
            )
        return msgspec.structs.replace(self, recipe=self.variants[name], variants={}, variant=name)

    def faults(self) -> list[ConfigRejected]:
        """Return all that is wrong in what is declared, each with its place; what follows from another one may be
        among them. [] for a sound project."""
        found = list(type_faults(self, Project))
        wrong = tuple(fault.at for fault in found)
        try:
            for fault in contradictions(self):
                if not _follows(fault.at, wrong):
                    found.append(fault)
        except (TypeError, AttributeError, KeyError, ValueError, IndexError):
            # A declaration of another type cannot be read any further, and is told.
            if not found:
                raise
        return found

    def checked(self) -> Project:
        """Return self, its spec's numbers of the declared types, or raise `ConfigRejected` naming the first declaration
        that contradicts its type or another declaration, with the `others` beside it."""
        if found := self.faults():
            raise ConfigRejected(str(found[0]), at=found[0].at, others=found[1:])
        typed = msgspec.convert(msgspec.to_builtins(self), Project)
        # As it comes back from JSON: 1 for 1.0 would give the log's rules another digest than the file's.
        is_plain = typed.features.digest() == self.features.digest()
        # Nor is a list in a tuple's place, which says the same: specifications are looked up by their hash.
        try:
            hash(self.features)
        except TypeError:
            is_plain = False
        return self if is_plain else msgspec.structs.replace(self, features=typed.features)


def _follows(at: str, wrong: tuple[str, ...]) -> bool:
    """Say whether a fault of a whole declaration may come from a value in it that has the wrong type."""
    return at.startswith(("recipe", "variants", "features.", "tasks[")) and any(path.startswith(at) for path in wrong)
