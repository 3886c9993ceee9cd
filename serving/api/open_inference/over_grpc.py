"""The Open Inference Protocol over gRPC: another way in to the same answers, in the same event loop.

Each process has a server of its own; all of them share the port (SO_REUSEPORT). A call's deadline is its `timeout_ms`.
Calls wait for their turn with the requests of HTTP. What is refused has the code below, the same words, and
`retry-after-ms` in the trailing metadata where it may come again.

| HTTP | gRPC |
|---|---|
| 400, 413, 422 | INVALID_ARGUMENT |
| 404 | NOT_FOUND |
| 429 | RESOURCE_EXHAUSTED |
| 503 | UNAVAILABLE |
| 504 | DEADLINE_EXCEEDED |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import grpc.aio

from headrace.contract.errors import BadRequest, ConfigRejected
from headrace.serving.api.answers import REFUSED, refusal_of
from headrace.serving.api.open_inference import inference
from headrace.serving.api.open_inference.inference import Answering, check_model, infer, metadata
from headrace.serving.api.open_inference.messages import CALLS, SERVICE, message_types
from headrace.serving.api.open_inference.over_http import bytes_of, timeout_ms_of
from headrace.serving.api.open_inference.tensors import Tensor, text_of

END_S = 1.0
"""Longest time for the answers that were begun, at the end."""
_CODES = {
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
Message = Any


class OpenInferenceGrpc:
    """The server of one process; `serving.draining.Beside`."""

    def __init__(self, app: Answering, release: str, *, host: str, port: int, bytes_max: int, calls_max: int) -> None:
        """Listen on the port, of the running process alone; `begin` answers.

        Args:
            bytes_max: most bytes of one request.
            calls_max: most calls at once; one more is refused.
        """
        self._app, self._release, self._types = app, release, message_types()
        self._host, self._port, self._bytes_max, self._calls_max = host, port, bytes_max, calls_max
        self._server: grpc.aio.Server | None = None

    async def begin(self) -> None:
        """Accept calls. Raises `ConfigRejected` where the port is taken."""
        server = grpc.aio.server(
            maximum_concurrent_rpcs=self._calls_max,
            options=[("grpc.max_receive_message_length", self._bytes_max), ("grpc.so_reuseport", 1)],
        )
        handlers = {name: self._handler(name) for name in CALLS}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            self._port = server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError as error:
            raise ConfigRejected(f"{self._host}:{self._port} is taken ({error}); choose another PORT_BASE.") from error
        await server.start()
        self._server = server

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._port

    async def end(self) -> None:
        """Refuse further calls, and answer those that were begun."""
        if self._server is not None:
            await self._server.stop(END_S)

    def _handler(self, name: str) -> grpc.RpcMethodHandler:
        work = {
            "ServerLive": lambda ask: {"live": True},
            "ServerReady": lambda ask: {"ready": not self._app.not_ready()},
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
        }
        kind = self._types[f"{name}Request"]
        return grpc.unary_unary_rpc_method_handler(
            self._infer if name == "ModelInfer" else self._call(name, work[name]),
            request_deserializer=kind.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )

    def _call(self, name: str, work: Callable[[Message], Mapping[str, Any]]) -> Callable[..., Any]:
        async def call(ask: Message, context: grpc.aio.ServicerContext[Any, Any]) -> Message:
            try:
                return self._types[f"{name}Response"](**work(ask))
            except REFUSED as error:
                return await self._refuse(refusal_of(error), context)

        return call

    def _server_metadata(self, ask: Message) -> Mapping[str, Any]:
        return {"name": inference.NAME, "version": self._release, "extensions": inference.EXTENSIONS}

    def _model_ready(self, ask: Message) -> Mapping[str, Any]:
        check_model(self._app, ask.name, ask.version)
        return {"ready": not self._app.not_ready()}

    def _model_metadata(self, ask: Message) -> Mapping[str, Any]:
        check_model(self._app, ask.name, ask.version)
        said = metadata(self._app)
        kind = self._types["ModelMetadataResponse.TensorMetadata"]
        told: dict[str, Any] = {"name": said.name, "versions": said.versions, "platform": said.platform}
        for side in ("inputs", "outputs"):
            told[side] = [kind(name=t.name, datatype=t.datatype, shape=t.shape) for t in getattr(said, side)]
        return told

    async def _infer(self, ask: Message, context: grpc.aio.ServicerContext[Any, Any]) -> Message:
        clock, metrics = self._app.deps.clock, self._app.deps.metrics
        began_s, status = clock.monotonic(), "200"
        try:
            check_model(self._app, ask.model_name, ask.model_version)
            parameters = {name: _value(value) for name, value in ask.parameters.items()}
            left_s, said_ms = context.time_remaining(), timeout_ms_of(parameters)
            until_s = began_s + min(left_s or math.inf, said_ms / 1_000 if said_ms else math.inf)
            async with self._app.turns.turn(ask.ByteSize(), since_s=began_s, until_s=until_s):
                return self._response(ask, parameters)
        except REFUSED as error:
            found = refusal_of(error, page="ModelInfer")
            status = str(found.status)
            return await self._refuse(found, context)
        finally:
            metrics.add("requests_total", status=status)
            metrics.observe("request_seconds", clock.monotonic() - began_s)

    async def _refuse(self, found: BadRequest, context: grpc.aio.ServicerContext[Any, Any]) -> Message:
        self._app.deps.metrics.add("requests_refused_total", reason=found.reason)
        told = (("retry-after-ms", str(found.retry_ms)),) if found.retry_ms else ()
        await context.abort(_CODES.get(found.status, grpc.StatusCode.INVALID_ARGUMENT), str(found), told)

    def _response(self, ask: Message, parameters: Mapping[str, Any]) -> Message:
        raw = ask.raw_input_contents
        if raw and len(raw) != len(ask.inputs):
            raise BadRequest(422, f"{len(raw)} raw_input_contents for {len(ask.inputs)} inputs", "send one an input")
        found = infer(
            self._app,
            [_tensor(each, raw[place] if raw else None) for place, each in enumerate(ask.inputs)],
            request_id=ask.id,
            version=ask.model_version,
            wanted=[each.name for each in ask.outputs],
            logs=parameters.get("log") is True,
        )
        response = self._types["ModelInferResponse"](model_name=ask.model_name, model_version=found.version, id=ask.id)
        for name, value in {"version": found.version, **found.said}.items():
            _put(response.parameters[name], value)
        for output in found.outputs:
            response.outputs.add(name=output.name, datatype=output.datatype, shape=[len(output.values)])
            response.raw_output_contents.append(bytes_of(output))
        return response


def _tensor(each: Message, raw: bytes | None) -> Tensor:
    tensor = Tensor(name=each.name, datatype=each.datatype, shape=list(each.shape), raw=raw)
    if raw is None:
        name = _CONTENTS.get(each.datatype)
        if name is None:
            raise tensor.wrong(f"datatype {each.datatype[:20]!r} comes in raw_input_contents alone")
        values = list(getattr(each.contents, name))
        tensor.data = [text_of(tensor, value) for value in values] if name == "bytes_contents" else values
        if each.datatype in ("FP32", "FP64"):
            # Null and the infinite, as in bytes.
            if any(map(math.isinf, tensor.data)):
                raise tensor.wrong("a number is infinite")
            tensor.data = [None if math.isnan(value) else value for value in tensor.data]
    return tensor


def _value(parameter: Message) -> Any:
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)


def _put(parameter: Message, value: Any) -> None:
    """Set a parameter; a list is a text with one item a line."""
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    else:
        parameter.string_param = value if isinstance(value, str) else "\n".join(value)
