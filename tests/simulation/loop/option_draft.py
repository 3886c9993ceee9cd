"""A project of the matrix of options in the making, changed by each level of a row.

It imports no more than a project does: the stages of a real stack load it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headrace.contract.crawl import Crawl
from headrace.contract.mapping import AccessLog
from headrace.contract.project import FeedbackType, FieldType, ImpressionType, Project, Recipe, Task
from headrace.contract.spec import Categorical, Counter, Cross, Feature, FeatureSpec

if TYPE_CHECKING:
    from option_world import Outcome

WINDOW_MS = CORRECT_MS = 2_000
SHOWN_TAG = "matrix.impression"


@dataclass
class Draft:
    """A project in the making; each level of a row changes it."""

    pace: int = 1
    """How many times longer windows and delays are: time for a stack that is real."""
    key: str = "user"
    fields: dict[str, FieldType] = field(
        default_factory=lambda: {"user": "string", "item": "int64", "page": "string", "price": "float64"}
    )
    told: dict[str, FieldType] = field(default_factory=lambda: {"user": "string", "item": "int64", "page": "string"})
    """Fields of feedback, which says them again."""
    private: dict[str, Any] = field(default_factory=dict)
    unknown: Any = "drop"
    tasks: tuple[Task, ...] = ()
    counters: list[Counter] = field(default_factory=list)
    features: list[Feature] = field(default_factory=lambda: [Categorical(field="item"), Cross(fields=("user", "page"))])
    last: list[Feature] = field(default_factory=list)
    """Features that come after all others."""
    crawls: list[Crawl] = field(default_factory=list)
    page: tuple[bytes, str] = (b"", "")
    mappings: list[AccessLog] = field(default_factory=list)
    recipe: Callable[[Draft], Recipe] = lambda draft: Recipe(dim=4, hidden=(8,), **heads(draft))
    shown: list[Callable[[int, dict[str, Any]], None]] = field(default_factory=list)
    """Each adds to what the n-th impression says."""
    before: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Events, by tag, that are sent before all others and refused."""
    refused: dict[str, int] = field(default_factory=dict)
    """Reason -> how many dead letters must come, besides those of every row."""
    checks: list[Callable[[Outcome], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tasks = (Task(name="click", feedback="click", window_ms=self.window_ms),)

    @property
    def window_ms(self) -> int:
        """How long a task waits for feedback."""
        return WINDOW_MS * self.pace

    @property
    def correct_ms(self) -> int:
        """How long after that feedback still corrects."""
        return CORRECT_MS * self.pace

    def project(self) -> Project:
        """Return the checked project."""
        hashed = {name: "string" for name, how in self.private.items() if how == "hash"}
        extra: dict[str, FieldType] = {"extra": "string"} if self.unknown == "keep" else {}
        told = {"fields": {**self.told, **hashed, **extra}, "unknown": self.unknown, "private": self.private}
        return Project(
            name="matrix",
            impression=ImpressionType(
                tag=SHOWN_TAG,
                key=self.key,
                fields={**self.fields, **extra},
                unknown=self.unknown,
                private=self.private,
            ),
            feedback=tuple(FeedbackType(name=name, tag=f"matrix.{name}", **told) for name in ("click", "order")),
            tasks=self.tasks,
            features=FeatureSpec(counters=tuple(self.counters), features=(*self.features, *self.last)),
            recipe=self.recipe(self),
            mappings=tuple(self.mappings),
            crawls=tuple(self.crawls),
        ).checked()


def heads(draft: Draft) -> dict[str, Any]:
    """Return the recipe's tasks: all that are declared, the last one the main one."""
    names = tuple(task.name for task in draft.tasks)
    return {"task": names[-1], "tasks": names if len(names) > 1 else ()}
