"""Goal: every request gets JSON that says what is wrong and what to do, and each refusal is counted by its reason.

Method: the application without a socket, under a virtual clock.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from serving_world import PROJECT, Client, Trainer, World

from headrace.contract.config import ServeConfig
from headrace.contract.interfaces.ranking import ModelAnswer, Problem, RankAnswer
from headrace.contract.project import Project
from headrace.serving.api.app import ServingApp, make_app

BODY = {"request_id": "r1", "context": {"user": 3}, "candidates": [{"item": 1}, {"item": 2}, {"item": 3}, {"item": 4}]}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def client(world: World) -> Client:
    return Client(make_app(world.app))


def publish(world: World) -> Trainer:
    trainer = Trainer(world)
    trainer.learn(Random(1))
    trainer.snapshot()
    world.follow()
    return trainer


def refused(world: World, reason: str) -> float:
    return world.metrics.counters["requests_refused_total", reason]


@pytest.mark.parametrize(
    ("method", "path", "status", "reason", "words"),
    [
        ("GET", "/v1/rnk", 404, "unknown_path", "Did you mean '/v1/rank'?"),
        ("GET", "/", 404, "unknown_path", "GET /openapi.json lists"),
        ("GET", "/v1/rank", 405, "wrong_method", "use one of OPTIONS, POST"),
        ("DELETE", "/v1/model", 405, "wrong_method", "use one of GET, HEAD, OPTIONS"),
        ("PUT", "/v2/models/small/infer", 405, "wrong_method", "use one of OPTIONS, POST"),
        ("GET", "/v2/models/other", 404, "unknown_model", "ask for 'small'"),
        ("GET", "/v2/models/small/versions/x", 404, "unknown_model", "leave the version out"),
        ("GET", "/v2/models/small", 503, "unavailable", "ask again in a second"),
    ],
)
def test_a_path_or_method_that_is_not_there_is_told_in_json(
    world: World, client: Client, method: str, path: str, status: int, reason: str, words: str
) -> None:
    answer = client._ask(method, path)
    assert answer.status_code == status and refused(world, reason) == 1
    said = msgspec.json.decode(answer.content, type=Problem)
    assert words in f"{said.error} {said.next}"
    assert (answer.headers.get("Allow") is not None) == (status == 405)


def test_head_and_options_are_answered(client: Client) -> None:
    head, options = client._ask("HEAD", "/healthz"), client._ask("OPTIONS", "/v1/rank")
    assert head.status_code == 200 and head.content == b""
    assert options.status_code == 204 and options.headers["Allow"] == "OPTIONS, POST"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": "Application/vnd.x+json"}, 200),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 200),
        ({"Content-Type": "application/json", "Content-Encoding": "identity"}, 200),
        ({"Content-Type": "application/msgpack"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": "application/jsonp"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
    ],
)
def test_a_body_that_says_it_is_no_json_is_refused(
    world: World, client: Client, headers: dict[str, str], status: int
) -> None:
    publish(world)
    answer = client.post("/v1/rank", content=msgspec.json.encode(BODY), headers=headers)
    assert answer.status_code == status and refused(world, "content_type") == (status == 415)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"{", "bad_request"),
        (b"{}", "bad_field"),
        (b'{"request_id": "r", "candidates": [{"item": "x"}]}', "bad_field"),
        (b" " * 5_000_000, "too_large"),
        (msgspec.json.encode(BODY), "unavailable"),
    ],
)
def test_each_refusal_is_counted_by_its_reason(world: World, client: Client, sent: bytes, reason: str) -> None:
    answer = client.post("/v1/rank", content=sent)
    assert answer.status_code >= 400 and refused(world, reason) == 1
    assert world.metrics.counters["requests_total", str(answer.status_code)] == 1


def test_answers_are_as_the_structs_say(world: World, client: Client) -> None:
    publish(world)
    for kind, answer in ((RankAnswer, client.post("/v1/rank", json=BODY)), (ModelAnswer, client.get("/v1/model"))):
        msgspec.json.decode(answer.content, type=kind)
        assert answer.json().keys() <= set(kind.__struct_fields__)


def test_an_answer_says_how_old_its_version_is_and_when_it_is_stale(world: World, client: Client) -> None:
    publish(world)  # Made at 1 s; now is 5 s.
    said = client.post("/v1/rank", json=BODY).json()
    assert said["age_ms"] == 4_000 and "stale" not in said and "fallback" not in said
    world.clock.advance(596.0)
    assert "stale" not in client.post("/v1/rank", json=BODY).json(), "600 s are allowed"
    world.clock.advance(0.001)
    said = client.post("/v1/rank", json=BODY).json()
    assert said["age_ms"] == 600_001 and said["stale"] is True


@pytest.mark.parametrize(("kind", "scores"), [("constant", [0.8] * 4), ("order", [0.8, 0.6, 0.4, 0.2])])
def test_a_declared_fallback_answers_until_a_model_does(world: World, kind: Any, scores: list[float]) -> None:
    config = ServeConfig(fallback=kind, fallback_score=0.8)
    client = Client(make_app(ServingApp(replace(world.deps, config=config))))
    said = client.post("/v1/rank", json=BODY | {"log": True}).json()
    assert said["scores"] == scores and said["fallback"] is True and said["version"] == ""
    assert said["served"] == [{}] * 4 and "age_ms" not in said
    assert world.logged.calls[-1]["version"] == "" and world.metrics.counters["fallback_answers_total", ""] == 1
    assert client.get("/readyz").status_code == 503, "it is told, not hidden"
    tensors = [{"name": "item", "shape": [4], "datatype": "INT64", "data": [1, 2, 3, 4]}]
    infer = client.post("/v2/models/small/infer", json={"inputs": tensors}).json()
    assert infer["outputs"][0]["data"] == scores and infer["parameters"]["fallback"] is True
    assert client.post("/v1/rank", json=BODY | {"candidates": [{"item": "x"}]}).status_code == 422
    publish(world)
    world.features.is_caught_up = False
    assert client.post("/v1/rank", json=BODY).json()["fallback"] is True, "zeros that nobody counted score nothing"
    world.features.is_caught_up = True
    said = client.post("/v1/rank", json=BODY).json()
    assert said["version"] == "a-1" and "fallback" not in said


def test_a_fallback_has_a_score_of_every_task(world: World) -> None:
    project = several(PROJECT)
    config = ServeConfig(fallback="constant")
    client = Client(make_app(ServingApp(replace(world.deps, project=project, config=config))))
    said = client.post("/v1/rank", json=BODY).json()
    assert said["tasks"] == {"later": [0.5] * 4} and said["scores"] == [0.5] * 4


def several(project: Project) -> Project:
    recipe = msgspec.structs.replace(project.recipe, tasks=("later", "click"), task="click")
    return msgspec.structs.replace(project, recipe=recipe)


def test_a_request_that_cannot_be_answered_in_its_time_is_not_computed(world: World, client: Client) -> None:
    publish(world)
    assert client.post("/v1/rank", json=BODY | {"timeout_ms": 50}).status_code == 200
    world.app.turns._admission._costs = dict.fromkeys(range(20), 0.06)
    late = client.post("/v1/rank", json=BODY | {"timeout_ms": 50, "log": True})
    assert late.status_code == 504 and not world.logged.calls and refused(world, "too_late") == 1
    assert late.json()["error"] == "50 ms of its time are left, and an answer takes 60.0 ms, 0.0 of them waiting"
    for wrong in (0, -1, "50", 10_000_000):
        assert client.post("/v1/rank", json=BODY | {"timeout_ms": wrong}).status_code == 422
    # A field of that name is the project's own affair.
    own = BODY | {"context": {"user": 3, "timeout_ms": 1}}
    assert client.post("/v1/rank", json=own).status_code == 200


def test_too_many_requests_are_told_when_to_come_again(world: World, client: Client) -> None:
    publish(world)
    admission = world.app.turns._admission
    admission._costs = dict.fromkeys(range(20), 0.15)
    admission.offer(100, world.clock.monotonic())
    answer = client.post("/v1/rank", json=BODY)
    assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"
    assert answer.json()["retry_ms"] == 150 and "serve.queue_ms" in answer.json()["error"]
    assert refused(world, "queue_full") == 1


def test_a_process_that_was_told_to_end_is_not_ready_and_answers(world: World, client: Client) -> None:
    publish(world)
    world.app.is_draining = True
    assert client.get("/readyz").status_code == 503 and "told to end" in client.get("/readyz").text
    assert client.get("/v2/health/ready").status_code == 503 and client.get("/v2/health/live").status_code == 200
    assert client.post("/v1/rank", json=BODY).status_code == 200


def test_a_failure_is_told_in_json_and_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def broken(sent: bytes) -> None:
        raise ZeroDivisionError("told to fail")

    world.app.ranker.respond = broken  # type: ignore[method-assign,assignment]
    with pytest.raises(ZeroDivisionError):
        Client(make_app(world.app)).post("/v1/rank", json=BODY)
    assert "told to fail" in caplog.text and world.metrics.counters["requests_total", "500"] == 1
