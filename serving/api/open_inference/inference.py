"""The Open Inference Protocol's requests as those of POST /v1/rank, whatever they travel by. One model, the project's.

Inputs are the impression's fields: a tensor of N elements is a field of each candidate, one of a single element a field
of the context, which all share; a field without a tensor is null. Outputs are one FP64 tensor a task; `served` (BYTES,
a JSON text a candidate) comes where it is asked for by name. The scores are those of POST /v1/rank, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from headrace.contract.errors import BadRequest, Unavailable
from headrace.contract.project import Project
from headrace.serving.api.dependencies import ServingDependencies
from headrace.serving.api.open_inference.tensors import DATATYPE_OF, Tensor, values_of
from headrace.serving.api.rank import Ranked, Ranker, RankRequest
from headrace.serving.api.turns import Turns

NAME, PLATFORM = "headrace", "headrace"
EXTENSIONS = ["binary_tensor_data"]
SERVED = "served"
"""Output with what each candidate's impression has to carry beside its fields, as `served` of POST /v1/rank."""
NO_ID = "-"
"""The request id of one that has none: nothing is logged under it."""


class Answering(Protocol):
    """What `serving.api.app.ServingApp` has of this."""

    deps: ServingDependencies
    ranker: Ranker
    turns: Turns

    def not_ready(self) -> str:
        """Return why requests cannot be answered well; empty when they can."""


class TensorMetadata(msgspec.Struct, kw_only=True):
    """One input or output of the model."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct, kw_only=True):
    """What the model takes and gives."""

    name: str
    versions: list[str]
    """The one that is served; it changes several times a second."""
    platform: str = PLATFORM
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Output(NamedTuple):
    """One tensor of an answer."""

    name: str
    datatype: str
    values: list[Any]


class Inference(NamedTuple):
    """An answer: the version, what is said beside the scores (`age_ms` and the like), and the tensors."""

    version: str
    said: dict[str, Any]
    outputs: list[Output]


def metadata(app: Answering) -> ModelMetadata:
    """Return the model's inputs and outputs. Raises `Unavailable` where no model is loaded."""
    project = app.deps.project
    return ModelMetadata(
        name=project.name,
        versions=[app.deps.shared.meta().manifest.version],
        inputs=[
            TensorMetadata(name=name, datatype=DATATYPE_OF[kind], shape=[-1])
            for name, kind in project.impression.fields.items()
        ],
        outputs=[
            *(TensorMetadata(name=task, datatype="FP64", shape=[-1]) for task in tasks_of(project)),
            TensorMetadata(name=SERVED, datatype="BYTES", shape=[-1]),
        ],
    )


def tasks_of(project: Project) -> list[str]:
    """Return the names of the tasks, the main one first."""
    main = project.recipe.task
    return [main, *(task for task in project.recipe.heads if task != main)]


def check_model(app: Answering, name: str, version: str = "") -> None:
    """Raise `BadRequest` (404) where a model or a version is not the served one; `version` "" is any."""
    own = app.deps.project.name
    if name != own:
        raise BadRequest(404, f"there is no model {name[:100]!r}", f"ask for {own!r}", reason="unknown_model")
    if version:
        try:
            served = app.deps.shared.meta().manifest.version
        except Unavailable:
            served = "none"
        if version != served:
            raise _other(version, served)


def infer(
    app: Answering,
    tensors: Sequence[Tensor],
    *,
    request_id: str = "",
    version: str = "",
    wanted: Sequence[str] = (),
    logs: bool = False,
) -> Inference:
    """Score the candidates of one request.

    Args:
        wanted: names of the outputs; none: every task.
        logs: whether serving logs an impression for each candidate; it takes a request id.

    Raises as `Ranker.ranked`, and `BadRequest` for what is wrong with the tensors.
    """
    known = [*tasks_of(app.deps.project), SERVED]
    for name in wanted:
        if name not in known:
            raise BadRequest(422, f"there is no output {name[:100]!r}", f"ask for some of {', '.join(known)}")
    if logs and not request_id:
        raise BadRequest(422, "log is asked for a request without an id", "send an id: feedback names it later")
    ranked = app.ranker.ranked(_asked(app.deps.project, tensors, request_id or NO_ID, logs))
    if version and ranked.version != version:
        raise _other(version, ranked.version)
    outputs = [_output(name, ranked) for name in (wanted or known[:-1])]
    return Inference(ranked.version, app.ranker.said(ranked), outputs)


def _asked(project: Project, tensors: Sequence[Tensor], request_id: str, logs: bool) -> RankRequest:
    if not tensors:
        raise BadRequest(422, "there are no inputs", "send one tensor a field of the impression")
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise BadRequest(422, "two inputs have one name", "send one tensor a field")
    if len(request_id) > 256:
        raise BadRequest(422, f"the id has {len(request_id)} characters", "send 256 at most")
    rows = max(tensor.rows for tensor in tensors)
    for tensor in tensors:
        if tensor.rows not in (1, rows):
            raise tensor.wrong(f"shape {tensor.shape}, where another input has {rows} elements")
    fields = project.impression.fields
    columns = {tensor.name: values_of(tensor, fields.get(tensor.name)) for tensor in tensors}
    each = {name: values for name, values in columns.items() if len(values) == rows}
    candidates = [dict(zip(each, row, strict=True)) for row in zip(*each.values(), strict=True)]
    context = {name: values[0] for name, values in columns.items() if name not in each}
    return RankRequest(request_id=request_id, candidates=candidates, context=context, log=logs)


def _output(name: str, ranked: Ranked) -> Output:
    if name == SERVED:
        return Output(name, "BYTES", [msgspec.json.encode(each).decode() for each in ranked.served])
    if name not in ranked.scores:
        raise BadRequest(404, f"version {ranked.version} has no task {name!r}", "leave the output out, or wait for it")
    return Output(name, "FP64", ranked.scores[name])


def _other(version: str, served: str) -> BadRequest:
    return BadRequest(
        404,
        f"version {version[:100]!r} is not served; {served} is",
        "leave the version out: it changes several times a second, and the answer names it",
        reason="unknown_model",
    )
