"""What a project's `traffic.py` yields: visits whose true probabilities are known.

    def visits(project: Project, seed: int) -> Iterator[Visit]: ...

Same project and seed, same visits. `headrace traffic` plays them to a running stack; nothing else reads the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from headrace.contract.project import Project


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """One feedback of a visitor."""

    feedback: str
    """Name of a declared `FeedbackType`."""
    delay_ms: int
    """From the answer to the feedback."""
    place: int = 0
    """Which candidate of the visit is meant."""
    fields: dict[str, Any] = {}
    """What it says beside the impression's fields that its type declares too."""


class Visit(msgspec.Struct, frozen=True, kw_only=True):
    """One request: what is asked and shown, and what the visitor does then."""

    context: dict[str, Any]
    candidates: list[dict[str, Any]]
    given: list[Given] = []
    chances: dict[str, list[float]] = {}
    """Task -> for each candidate, the probability that it is positive: what the best model would say."""
    logs_answer: bool = True
    """Whether the service logs the answer's version and served values with its impressions."""


Visits = Callable[[Project, int], Iterator[Visit]]


def chance(logit: float) -> float:
    """Return the probability of log-odds.

    >>> chance(0.0)
    0.5
    """
    return 1.0 / (1.0 + math.exp(-logit))
