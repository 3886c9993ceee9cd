"""Goal: clients of the Open Inference Protocol get the scores of POST /v1/rank, bit for bit, or what is wrong.

Method: Triton's own client, HTTP and gRPC, against real sockets; bodies by hand for what that client does not send.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
from serving_thread import Answering, answering
from serving_world import PROJECT, Client, Trainer, World
from triton_process import Triton, triton_client
from tritonclient.grpc import service_pb2

from headrace.serving.api.app import ServingApp, make_app
from headrace.serving.api.open_inference.messages import message_types

INFER = "/v2/models/small/infer"


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    trainer, rng = Trainer(world), Random(1)
    trainer.learn(rng)
    trainer.snapshot()
    trainer.delta(trainer.learn(rng))
    world.follow()
    return world


@pytest.fixture
def served(world: World) -> Iterator[Answering]:
    with answering(world.app) as found:
        yield found


@pytest.fixture(params=["http", "grpc"])
def triton(request: pytest.FixtureRequest, served: Answering) -> Iterator[Triton]:
    """A client of Triton's, of one kind."""
    with triton_client(request.param, served.http_port if request.param == "http" else served.grpc.port) as client:
        yield client


INPUTS = [
    ("user", "INT64", "int64", [3]),
    ("item", "INT32", "int32", [1, 2, 7]),
    ("price", "FP64", "float64", [2.5, None, 0.125]),
]


def ranked(world: World, **changes: Any) -> dict[str, Any]:
    """The same request over POST /v1/rank, of an application of its own: turns are those of one event loop."""
    body = {"request_id": "r", "context": {"user": 3}}
    body["candidates"] = [{"item": 1, "price": 2.5}, {"item": 2, "price": None}, {"item": 7, "price": 0.125}]
    answer = Client(make_app(ServingApp(world.app.deps))).post("/v1/rank", json=body | changes)
    assert answer.status_code == 200
    return answer.json()


def test_tritons_client_gets_the_scores_of_rank_bit_for_bit(world: World, triton: Triton) -> None:
    wanted, found = ranked(world), triton("infer", INPUTS, request_id="r")
    assert found["arrays"] == {"click": wanted["scores"]}
    assert found["id"] == "r" and found["model_version"] == wanted["version"] == world.version
    said = found["parameters"]
    assert said["version"] in (world.version, {"string_param": world.version})
    assert wanted["age_ms"] == 4_000 and said["age_ms"] in (4_000, {"int64_param": "4000"})


def test_tritons_client_learns_what_the_model_takes_and_gives(world: World, triton: Triton) -> None:
    assert triton("is_server_live") and triton("is_server_ready") and triton("is_model_ready", "small")
    assert triton("is_model_ready", "small", world.version)
    assert triton("get_server_metadata")["extensions"] == ["binary_tensor_data"]
    said = triton("get_model_metadata", "small")
    assert said["name"] == "small" and said["versions"] == [world.version]
    kinds = [[(each["name"], each["datatype"]) for each in said[side]] for side in ("inputs", "outputs")]
    assert kinds == [
        [("user", "INT64"), ("item", "INT64"), ("price", "FP64")],
        [("click", "FP64"), ("served", "BYTES")],
    ]
    world.features.is_caught_up = False
    assert not triton("is_server_ready") and not triton("is_model_ready", "small")
    with pytest.raises(ValueError, match="the counters are still being read"):
        triton("infer", INPUTS)


def test_what_an_impression_carries_comes_where_it_is_asked_for(world: World, triton: Triton) -> None:
    found = triton("infer", INPUTS, outputs=["served", "click"])["arrays"]
    assert list(map(msgspec.json.decode, found["served"])) == ranked(world)["served"] and len(found["click"]) == 3


def test_what_triton_asks_for_and_there_is_not_is_told(world: World, triton: Triton) -> None:
    assert len(triton("infer", INPUTS, model_version=world.version)["arrays"]["click"]) == 3
    with pytest.raises(ValueError, match="version 'a-1' is not served; a-2 is"):
        triton("infer", INPUTS, model_version="a-1")
    with pytest.raises(ValueError, match="there is no model 'other'"):
        triton("infer", INPUTS, model="other")
    world.app.turns._admission._costs = dict.fromkeys(range(20), 0.05)
    with pytest.raises(ValueError, match="20 ms of its time are left, and an answer takes 50"):
        triton("infer", INPUTS, timeout=20_000)
    assert world.metrics.counters["requests_refused_total", "too_late"] == 1
    assert world.metrics.counters["requests_refused_total", "unknown_model"] == 2


def test_the_deadline_of_a_call_over_grpc_is_its_time(world: World, served: Answering) -> None:
    world.app.turns._admission._costs = dict.fromkeys(range(20), 5.0)
    types = message_types()
    with grpc.insecure_channel(f"127.0.0.1:{served.grpc.port}") as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=types["ModelInferResponse"].FromString,
        )
        with pytest.raises(grpc.RpcError) as wrong:
            call(types["ModelInferRequest"](model_name="small"), timeout=4.0)
    assert wrong.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "of its time are left" in wrong.value.details(), "the server says it at once"


def test_over_grpc_contents_are_as_good_as_raw_bytes(world: World, served: Answering) -> None:
    types = message_types()
    ask = types["ModelInferRequest"](model_name="small")
    ask.inputs.add(name="user", datatype="INT64", shape=[1]).contents.int64_contents.append(3)
    ask.inputs.add(name="item", datatype="INT16", shape=[3]).contents.int_contents.extend([1, 2, 7])
    price = ask.inputs.add(name="price", datatype="FP64", shape=[3, 1])
    price.contents.fp64_contents.extend([2.5, float("nan"), 0.125])
    ask.inputs.add(name="colour", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"red")
    with grpc.insecure_channel(f"127.0.0.1:{served.grpc.port}") as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=types["ModelInferResponse"].FromString,
        )
        found = call(ask, timeout=10.0)
        assert np.frombuffer(found.raw_output_contents[0], "<f8").tolist() == ranked(world)["scores"]
        assert found.parameters["warnings"].string_param == "$.context.colour is not declared, and no score reads it."
        ask.inputs[0].datatype = "FP16"
        with pytest.raises(grpc.RpcError) as wrong:
            call(ask, timeout=10.0)
        assert wrong.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_json_alone_does_too_with_null_and_columns(world: World) -> None:
    client = Client(make_app(world.app))
    body = {
        "inputs": [
            {"name": "user", "shape": [1, 1], "datatype": "INT64", "data": [[3]]},
            {"name": "item", "shape": [3, 1], "datatype": "INT64", "data": [[1], [2], [7]]},
            {"name": "price", "shape": [3], "datatype": "FP64", "data": [2.5, None, 0.125]},
        ]
    }
    found = client.post(INFER, json=body).json()
    assert found["outputs"] == [{"name": "click", "shape": [3], "datatype": "FP64", "data": ranked(world)["scores"]}]
    logged = client.post(INFER, json=body | {"id": "r9", "parameters": {"log": True}})
    assert logged.status_code == 200 and world.logged.calls[-1]["request_id"] == "r9"


def one(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "item", "shape": [2], "datatype": "INT64", "data": [1, 2]} | changes]}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "missing required field `inputs`"),
        ({"inputs": []}, "there are no inputs"),
        (one(datatype="INT63"), "datatype 'INT63'"),
        (one(shape=[3]), "says 3 elements, and it has 2"),
        (one(shape=[2, 2]), "[N] is wanted"),
        (one(shape=[]), "[N] is wanted"),
        (one(shape=[0], data=[]), "[N] is wanted"),
        (one(shape=[-1]), "[N] is wanted"),
        (one(data=None), "it has no data"),
        (one(data=[[[1]], [[2]]]), "nested deeper"),
        (one(data=["one", "two"]), "field 'item' must be int64 or null; got str"),
        (one(parameters={"binary_data_size": 16}), "and 0 bytes are left"),
        ({"inputs": one()["inputs"] * 2}, "two inputs have one name"),
        (one() | {"outputs": [{"name": "clicks"}]}, "there is no output 'clicks'"),
        (one() | {"parameters": {"log": True}}, "without an id"),
        (one() | {"parameters": {"timeout_ms": -1}}, "parameter timeout_ms is '-1'"),
        (one() | {"id": "x" * 257}, "257 characters"),
        ({"inputs": [*one()["inputs"], {"name": "user", "shape": [3], "datatype": "INT64", "data": [1, 2, 3]}]},
         "where another input has 3 elements"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_the_next_step(world: World, body: Any, said: str) -> None:
    answer = Client(make_app(world.app)).post(INFER, json=body)
    assert answer.status_code == 400 and said in answer.json()["error"] and answer.json()["next"]


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "said"),
    [
        ("INT64", [2], b"\0" * 15, "2 of INT64 take 16"),
        ("FP64", [1], np.array([np.inf]).tobytes(), "a number is infinite"),
        ("BOOL", [1], b"\2", "neither 0 nor 1"),
        ("BYTES", [1], b"\xff\0\0\0a", "beyond the end"),
        ("BYTES", [1], b"\1\0\0\0\xff", "no UTF-8"),
        ("BYTES", [2], b"\1\0\0\0a", "says 2 elements, and it has 1"),
        ("BYTES", [1], b"\1\0\0", "beyond the end"),
        ("UINT64", [1], b"\xff" * 8, "field 'item' must be int64"),
    ],
)
def test_bytes_that_do_not_fit_are_told(world: World, datatype: str, shape: list[int], raw: bytes, said: str) -> None:
    head = {"name": "item", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(raw)}}
    text = msgspec.json.encode({"inputs": [head]})
    client = Client(make_app(world.app))
    headers = {"Inference-Header-Content-Length": str(len(text))}
    answer = client.post(INFER, content=text + raw, headers=headers)
    assert answer.status_code == 400 and said in answer.json()["error"]
    assert client.post(INFER, content=text + raw + b"x", headers=headers).status_code == 400
    for length in ("-1", "x", str(len(text + raw) + 1), "9" * 5_000):
        wrong = client.post(INFER, content=text + raw, headers={"Inference-Header-Content-Length": length})
        assert wrong.status_code == 400 and "send the length of the JSON" in wrong.json()["next"]


def test_texts_flags_and_lists_come_as_declared(world: World) -> None:
    fields = {
        "user": "int64",
        "item": "int64",
        "price": "float64",
        "name": "string",
        "new": "bool",
        "tags": "list[string]",
    }
    impression = msgspec.structs.replace(PROJECT.impression, fields=fields, unknown="refuse")
    project = msgspec.structs.replace(PROJECT, impression=impression)
    app = ServingApp(replace(world.deps, project=project))
    tensors = [
        {"name": "name", "shape": [2], "datatype": "BYTES", "data": ["é", None]},
        {"name": "new", "shape": [2], "datatype": "BOOL", "data": [True, False]},
        {"name": "tags", "shape": [2], "datatype": "BYTES", "data": ['["a","b"]', None]},
    ]
    client = Client(make_app(app))
    answer = client.post(INFER, json={"inputs": tensors, "id": "r", "parameters": {"log": True}})
    assert answer.status_code == 200
    assert world.logged.calls[-1]["candidates"] == [
        {"name": "é", "new": True, "tags": ["a", "b"]},
        {"name": None, "new": False, "tags": None},
    ]
    tensors[2]["data"] = ["a,b", None]
    assert "JSON array" in client.post(INFER, json={"inputs": tensors}).json()["error"]
    wrong = client.post(INFER, json=one(name="itme"))
    assert wrong.status_code == 400 and "Did you mean 'item'?" in wrong.json()["error"]


def test_the_messages_are_those_of_the_public_protocol() -> None:
    """Triton's generated ones, field by field: names, numbers, types."""

    def layout(found: Any) -> list[tuple[Any, ...]]:
        kinds = [field.message_type.full_name if field.message_type else "" for field in found.fields]
        fields = zip(found.fields, kinds, strict=True)
        return [(f.number, f.name, f.type, f.is_repeated, bool(f.containing_oneof), kind) for f, kind in fields]

    for name, kind in message_types().items():
        outer, *inner = name.split(".")
        wanted = service_pb2.DESCRIPTOR.message_types_by_name[outer]
        for each in inner:
            wanted = wanted.nested_types_by_name[each]
        assert layout(kind.DESCRIPTOR) == layout(wanted), name
