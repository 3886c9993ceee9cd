"""The OpenAPI page of serving, /openapi.json: made from the structs that requests and answers are decoded by.

`OPERATIONS` says which routes there are; a test holds it to the application's own routes. docs/rank-api.md is written
from the same table.
"""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from headrace.contract.config import ServeConfig
from headrace.contract.interfaces.ranking import ModelAnswer, PositionsAnswer, Problem, RankAnswer
from headrace.contract.project import FieldType, Project
from headrace.serving.api.open_inference.inference import ModelMetadata
from headrace.serving.api.open_inference.over_http import (
    InferRequest,
    InferResponse,
    Live,
    ModelReady,
    Ready,
    ServerMetadata,
)
from headrace.serving.api.rank import RankRequest

JSON, TEXT = "application/json", "text/plain"
INT64 = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
SCHEMAS: Mapping[FieldType, dict[str, Any]] = {
    "int64": INT64,
    "float64": {"type": "number"},
    "string": {"type": "string"},
    "bool": {"type": "boolean"},
    "list[string]": {"type": "array", "items": {"type": "string"}},
    "list[int64]": {"type": "array", "items": INT64},
}
REFUSED: Mapping[int, str] = {
    400: "the body is no JSON",
    404: "there is no such path, model or version",
    408: "the body was not whole in 20 s",
    413: "the body is larger than 4 MiB",
    415: "the body says that it is no JSON, or compressed",
    422: "a field is wrong: unknown, of another type, or beyond its bound",
    429: "the wait for a turn is longer than `serve.queue_ms`; `Retry-After` says when to ask again",
    503: "no model is loaded, its counters are not read, or the process ends; `Retry-After` as above",
    504: "it cannot be answered in its `timeout_ms`, and was not computed",
}
"""What each status says that is not 200. The body is a `Problem`."""
_BODY = (400, 408, 413, 415, 422, 429, 503, 504)
_INFER = (400, 404, 408, 413, 415, 429, 503, 504)


class Operation(NamedTuple):
    """One route and method."""

    method: str
    path: str
    summary: str
    answer: type[Struct] | None
    """None: text."""
    body: type[Struct] | None = None
    refused: tuple[int, ...] = ()
    query: tuple[str, ...] = ()
    unready: bool = False
    """True: 503 has the body of 200."""


_MODEL = "/v2/models/{name}"
_VERSION = _MODEL + "/versions/{version}"
OPERATIONS = (
    Operation("post", "/v1/rank", "Score candidates with exactly one version.", RankAnswer, RankRequest, _BODY),
    Operation("get", "/v1/model", "Which version is served.", ModelAnswer, None, (404, 503), ("version",)),
    Operation("get", "/healthz", "200 while the process answers.", None),
    Operation("get", "/readyz", "200 while requests are answered well.", None, unready=True),
    Operation("get", "/metrics", "The process' metrics, in Prometheus' text format.", None),
    Operation("get", "/openapi.json", "This page.", None),
    Operation("get", "/v2", "Open Inference Protocol: what this is.", ServerMetadata),
    Operation("get", "/v2/health/live", "200 while the process answers.", Live),
    Operation("get", "/v2/health/ready", "200 as /readyz.", Ready, unready=True),
    *(
        operation
        for path in (_MODEL, _VERSION)
        for operation in (
            Operation("get", path, "What the model takes and gives.", ModelMetadata, None, (404, 503)),
            Operation("get", path + "/ready", "200 as /readyz.", ModelReady, None, (404,), unready=True),
            Operation("post", path + "/infer", "Scores, as POST /v1/rank.", InferResponse, InferRequest, _INFER),
        )
    ),
)


def page(project: Project, config: ServeConfig, release: str) -> dict[str, Any]:
    """Return the document, with the project's fields as those of contexts and candidates."""
    kinds: list[type[Struct]] = [each for o in OPERATIONS for each in (o.answer, o.body) if each is not None]
    kinds = list(dict.fromkeys([*kinds, Problem, PositionsAnswer]))
    _, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for kind in structs_of(kinds):
        for name, text in field_texts(kind).items():
            components[kind.__name__]["properties"][name].setdefault("description", text)
    rank = components["RankRequest"]["properties"]
    rank["candidates"]["maxItems"] = config.candidates_max
    rank["candidates"]["items"] = rank["context"] | _fields(project)
    rank["context"] = rank["context"] | _fields(project)
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, project)
    return {
        "openapi": "3.1.0",
        "info": {"title": f"Headrace serving: {project.name}", "version": release},
        "paths": paths,
        "components": {"schemas": components},
    }


def field_texts(struct: type[Struct]) -> dict[str, str]:
    """Return the docstring under each field of a struct, on one line; fields without one are left out."""
    (declared,) = (node for node in ast.parse(inspect.getsource(struct)).body if isinstance(node, ast.ClassDef))
    found: dict[str, str] = {}
    for field, after in itertools.pairwise(declared.body):
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, str):
            found[field.target.id] = " ".join(text.split())
    return found


def structs_of(kinds: list[type[Struct]]) -> list[type[Struct]]:
    """Return structs, and those that their fields hold."""
    found: dict[type[Struct], None] = {}
    waiting = list(kinds)
    while waiting:
        kind = waiting.pop(0)
        if kind in found:
            continue
        found[kind] = None
        declared = msgspec.inspect.type_info(kind)
        for field in declared.fields if isinstance(declared, msgspec.inspect.StructType) else ():
            inner = getattr(field.type, "item_type", field.type)
            if isinstance(inner, msgspec.inspect.StructType):
                waiting.append(inner.cls)
    return list(found)


def _fields(project: Project) -> dict[str, Any]:
    impression = project.impression
    return {
        "properties": {name: {"anyOf": [SCHEMAS[kind], {"type": "null"}]} for name, kind in impression.fields.items()},
        "additionalProperties": impression.unknown != "refuse",
    }


def _described(operation: Operation, project: Project) -> dict[str, Any]:
    def content(kind: type[Struct] | None) -> dict[str, Any]:
        if kind is None:
            text = JSON if operation.path.endswith(".json") else TEXT
            return {text: {"schema": {} if text == JSON else {"type": "string"}}}
        schema: dict[str, Any] = {"$ref": f"#/components/schemas/{kind.__name__}"}
        if kind is ModelAnswer:
            schema = {"anyOf": [schema, {"$ref": "#/components/schemas/PositionsAnswer"}]}
        return {JSON: {"schema": schema}}

    answers = {"200": {"description": "the answer", "content": content(operation.answer)}}
    for status in operation.refused:
        answers[str(status)] = {"description": REFUSED[status], "content": content(Problem)}
    if operation.unready:
        answers["503"] = {"description": "not ready", "content": content(operation.answer)}
    known = {"name": project.name}
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        | ({"example": known[name]} if name in known else {})
        for name in ("name", "version")
        if f"{{{name}}}" in operation.path
    ]
    parameters += [{"name": name, "in": "query", "schema": {"type": "string"}} for name in operation.query]
    found: dict[str, Any] = {"summary": operation.summary, "parameters": parameters, "responses": answers}
    if operation.body is not None:
        schema = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
        found["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    return found
