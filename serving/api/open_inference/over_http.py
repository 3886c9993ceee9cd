"""The Open Inference Protocol over HTTP, with its extension for binary tensors.

With the header `Inference-Header-Content-Length` a body is so many bytes of JSON, then the bytes of each input that
says `binary_data_size`, in the order of the inputs. An answer is of this form where an output asks for it
(`binary_data`), or the request for all (`binary_data_output`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headrace.contract.errors import BadRequest
from headrace.contract.formats.json_record import decode_json
from headrace.serving.api.answers import REFUSED, answer, check_json, check_plain, refusal_of, refused
from headrace.serving.api.open_inference.inference import (
    EXTENSIONS,
    NAME,
    Answering,
    Inference,
    Output,
    check_model,
    infer,
    metadata,
)
from headrace.serving.api.open_inference.tensors import Tensor, numbers_bytes, texts_bytes

LENGTH = "Inference-Header-Content-Length"
Parameters = dict[str, Any]


class InferInput(msgspec.Struct, kw_only=True):
    """One field of the impression."""

    name: str
    shape: list[int]
    """[N] or [N, 1]: a field of each candidate; [1]: one that all share."""
    datatype: str
    data: list[Any] | None = None
    """N elements; null is null. Absent where the bytes come behind the JSON."""
    parameters: Parameters = {}
    """`binary_data_size`: how many bytes behind the JSON are this tensor's."""


class InferOutput(msgspec.Struct, kw_only=True):
    """An output that is asked for."""

    name: str
    """A task, or `served`."""
    parameters: Parameters = {}
    """`binary_data`: whether it comes as bytes."""


class InferRequest(msgspec.Struct, kw_only=True):
    """The body of POST /v2/models/{name}/infer."""

    inputs: list[InferInput]
    outputs: list[InferOutput] = []
    """None: every task."""
    id: str = ""
    """The request id; feedback names it later."""
    parameters: Parameters = {}
    """`timeout_ms`, or `timeout` in microseconds: as `timeout_ms` of POST /v1/rank. `log`: true, serving logs one
    impression a candidate. `binary_data_output`: all outputs come as bytes."""


class OutputTensor(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The scores of one task, or what was served."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: Parameters = {}


class InferResponse(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The answer of POST /v2/models/{name}/infer."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str = ""
    parameters: Parameters = {}
    """`version`, `age_ms`, and `stale`, `fallback`, `counters`, `warnings` as the answer of POST /v1/rank has them."""


class ServerMetadata(msgspec.Struct, kw_only=True):
    """The answer of GET /v2."""

    name: str
    version: str
    extensions: list[str]


class Live(msgspec.Struct):
    """The answer of GET /v2/health/live."""

    live: bool


class Ready(msgspec.Struct):
    """The answer of GET /v2/health/ready."""

    ready: bool


class ModelReady(msgspec.Struct):
    """The answer of GET /v2/models/{name}/ready."""

    name: str
    ready: bool


class _Hurry(msgspec.Struct):
    parameters: Parameters = {}


def timeout_ms_of(parameters: Parameters) -> float | None:
    """Return how long a request's parameters say that its client waits; None where they do not.

    Raises `BadRequest` where it is no number above 0.
    """
    for name, unit_ms in (("timeout_ms", 1.0), ("timeout", 0.001)):
        value = parameters.get(name)
        if value in (None, 0):  # What clients send that were given none.
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value * unit_ms <= 3_600_000:
            raise BadRequest(422, f"parameter {name} is {str(value)[:50]!r}", "send a number above 0, an hour at most")
        return value * unit_ms
    return None


class AnsweringHttp(Answering, Protocol):
    """What `serving.api.app.ServingApp` has of this."""

    async def answered(
        self,
        request: Request,
        *,
        check: Callable[[Request], None],
        left_ms: Callable[[bytes], float | None],
        work: Callable[[bytes], Response],
        known: Callable[[Exception], BadRequest],
    ) -> Response:
        """Read a body, wait for its turn, and return what `work` makes of it."""


class OpenInferenceHttp:
    """The answers to each route of the protocol."""

    def __init__(self, app: AnsweringHttp, release: str) -> None:
        self._app, self._release = app, release

    def routes(self) -> list[Route]:
        """Return the routes."""
        model = "/v2/models/{name}"
        found = [
            Route("/v2", self.server),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
        ]
        for path in (model, model + "/versions/{version}"):
            found += [
                Route(path, self.model),
                Route(path + "/ready", self.model_ready),
                Route(path + "/infer", self.infer, methods=["POST"]),
            ]
        return found

    async def server(self, request: Request) -> Response:
        """Say what this is."""
        return answer(200, ServerMetadata(name=NAME, version=self._release, extensions=EXTENSIONS))

    async def live(self, request: Request) -> Response:
        """200 while the process answers."""
        return answer(200, Live(True))

    async def ready(self, request: Request) -> Response:
        """200 as /readyz, else 503."""
        is_ready = not self._app.not_ready()
        return answer(200 if is_ready else 503, Ready(is_ready))

    async def model(self, request: Request) -> Response:
        """Say what the model takes and gives."""

        def said() -> Response:
            check_model(self._app, **request.path_params)
            return answer(200, metadata(self._app))

        return self._asked(said)

    async def model_ready(self, request: Request) -> Response:
        """200 as /readyz, else 503; 404 where another model or version is named than the served one."""

        def said() -> Response:
            check_model(self._app, **request.path_params)
            is_ready = not self._app.not_ready()
            return answer(200 if is_ready else 503, ModelReady(request.path_params["name"], is_ready))

        return self._asked(said)

    async def infer(self, request: Request) -> Response:
        """Score the candidates of a request with exactly one version of the model."""
        head = request.headers.get(LENGTH)

        def check(asked: Request) -> None:
            check_model(self._app, **request.path_params)
            (check_json if head is None else check_plain)(asked)

        def left_ms(sent: bytes) -> float | None:
            text = _parts(sent, head)[0]
            if b'"timeout' not in text:
                return None
            try:
                hurry: _Hurry = decode_json(text, _Hurry)
            except msgspec.DecodeError:
                return None  # Decoding all of it says what is wrong.
            return timeout_ms_of(hurry.parameters)

        return await self._app.answered(
            request,
            check=check,
            left_ms=left_ms,
            work=lambda sent: self._inferred(sent, head, **request.path_params),
            known=_refusal,
        )

    def _inferred(self, sent: bytes, head: str | None, name: str, version: str = "") -> Response:
        text, rest = _parts(sent, head)
        ask: InferRequest = decode_json(text, InferRequest)
        tensors, at = list[Tensor](), 0
        for each in ask.inputs:
            size, raw = each.parameters.get("binary_data_size"), None
            if size is not None:
                if type(size) is not int or not 0 <= size <= len(rest) - at:
                    said = f"binary_data_size {str(size)[:20]}, and {len(rest) - at} bytes are left"
                    step = f"send the bytes behind the JSON, whose length {LENGTH} says"
                    raise BadRequest(422, f"input {each.name[:100]!r}: {said}", step)
                raw, at = rest[at : at + size], at + size
            tensors.append(Tensor(name=each.name, datatype=each.datatype, shape=each.shape, data=each.data, raw=raw))
        if at != len(rest):
            raise BadRequest(422, f"{len(rest) - at} bytes behind the JSON are no input's", f"see {LENGTH}")
        found = infer(
            self._app,
            tensors,
            request_id=ask.id,
            version=version,
            wanted=[each.name for each in ask.outputs],
            logs=ask.parameters.get("log") is True,
        )
        all_binary = ask.parameters.get("binary_data_output") is True
        asked = {each.name: each.parameters.get("binary_data", all_binary) is True for each in ask.outputs}
        return _response(found, name, ask.id, lambda output: asked.get(output, all_binary))

    def _asked(self, said: Callable[[], Response]) -> Response:
        try:
            return said()
        except REFUSED as error:
            found = _refusal(error)
            self._app.deps.metrics.add("requests_refused_total", reason=found.reason)
            return refused(found)


def _response(found: Inference, name: str, request_id: str, is_binary: Callable[[str], bool]) -> Response:
    tensors, behind = list[OutputTensor](), list[bytes]()
    for output in found.outputs:
        tensor = OutputTensor(name=output.name, shape=[len(output.values)], datatype=output.datatype)
        if is_binary(output.name):
            behind.append(bytes_of(output))
            tensor.parameters = {"binary_data_size": len(behind[-1])}
        else:
            tensor.data = output.values
        tensors.append(tensor)
    body = InferResponse(
        model_name=name,
        model_version=found.version,
        id=request_id,
        outputs=tensors,
        parameters={"version": found.version, **found.said},
    )
    if not behind:
        return answer(200, body)
    text = msgspec.json.encode(body)
    headers = {LENGTH: str(len(text))}
    return Response(b"".join([text, *behind]), 200, headers, "application/octet-stream")


def bytes_of(output: Output) -> bytes:
    """Return an output's elements as bytes."""
    return texts_bytes(output.values) if output.datatype == "BYTES" else numbers_bytes(output.values)


def _parts(sent: bytes, head: str | None) -> tuple[bytes, bytes]:
    """Return the JSON of a body, and what is behind it. Raises `BadRequest`."""
    if head is None:
        return sent, b""
    if not (head.isascii() and head.isdigit() and int(head[:20]) <= len(sent)):
        raise BadRequest(400, f"{LENGTH} is {head[:50]!r}, of {len(sent)} bytes", "send the length of the JSON there")
    return sent[: int(head)], sent[int(head) :]


def _refusal(error: Exception) -> BadRequest:
    """Return what is refused, as the protocol says it: what is wrong in a request is 400."""
    found = refusal_of(error, InferRequest.__struct_fields__, "POST /v2/models/{name}/infer")
    if found.status == 422:
        found.status = 400
    return found
