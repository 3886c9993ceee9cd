"""What POST /v1/rank and GET /v1/model answer, and what is said of a request that is refused.

Fields are added with a default and never change their type: a client ignores what it does not know.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

Score = Annotated[float, Meta(description="of a candidate, in the order of the request")]


class RankAnswer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The answer of POST /v1/rank, computed by exactly one version of the model."""

    request_id: str
    """That of the request."""
    version: str
    """The model's version, `<run>-<step>`; empty in a fallback."""
    scores: list[Score]
    """What the recipe's main task says of each candidate, in the order of the request: a probability, or a number of
    the task's own kind."""
    served: list[Any]
    """For each candidate, what its impression has to carry beside its fields; log it as it is."""
    tasks: dict[str, list[float]] = {}
    """What the other tasks say, by name, where the recipe has several."""
    age_ms: int = 0
    """Age of the version: since its trainer made it."""
    stale: bool = False
    """True: the version is older than `serve.stale_ms`."""
    fallback: bool = False
    """True: no model scored this; `serve.fallback` did."""
    counters: str = ""
    """Only while no broker answers: `stale`, what is known is used, or `unread`, none is known."""
    warnings: list[str] = []
    """Fields of the request that the project does not declare, 10 at most."""


class Problem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Why a request got no answer."""

    error: str
    """What is wrong."""
    next: str
    """What to do next."""
    retry_ms: int = 0
    """After how long it may be sent again; 0 where that alone does not help. `Retry-After` says it in whole seconds."""


class WorkerAnswer(msgspec.Struct, kw_only=True):
    """How far the counters of one process of serving are."""

    worker: int
    features_offset: int
    """The next record of `features` that it reads."""
    behind_seconds: float
    """Time since it was known to have read all of them."""


class RegionRoom(msgspec.Struct, frozen=True, kw_only=True):
    """What the shared model has room for now; it grows within `serve.memory_bytes`."""

    rows_max: int
    row_values: int


class ModelAnswer(msgspec.Struct, kw_only=True):
    """The answer of GET /v1/model."""

    model: str
    version: str
    run: str
    step: int
    positions: dict[str, list[int]]
    """Partition -> the position of the last sample that the version contains; nothing while it learns the lake."""
    stored_left: int = 0
    """How many rows of the lake are not learnt yet, of all tasks."""
    live: dict[str, list[int]] = {}
    """While some are left: partition -> up to where live samples were learnt beside the lake."""
    generation: int
    age_seconds: float
    snapshot: str
    """The version that the chain of deltas began with."""
    spec: str
    """Digest of the feature specification."""
    digest: str
    """Of the snapshot; replay reaches it."""
    format: int
    rows: str
    """How rows travelled."""
    chain: str
    seq: int
    served_digest: str
    """Of what this replica holds now."""
    room: RegionRoom
    refused: str
    """What the gate refused last, and why; empty where nothing was."""
    counters: str
    """How far the counters are."""
    workers: list[WorkerAnswer]


class PositionsAnswer(msgspec.Struct, kw_only=True):
    """The answer of GET /v1/model?version=X; each field as in `ModelAnswer`."""

    version: str
    positions: dict[str, list[int]]
    stored_left: int = 0
    live: dict[str, list[int]] = {}
