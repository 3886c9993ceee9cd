"""Goal: answers are those of the same model elsewhere, and errors tell the next step. Method: an ASGI client."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from serving_world import PROJECT, RECIPE, SPEC, TOPICS, Client, Trainer, World

from headrace.contract.interfaces.log import Record
from headrace.ingest.decode.served import served_tokens
from headrace.kernels.served_tokens import Opened
from headrace.serving.api.app import ServingApp, make_app
from headrace.serving.features import FeatureMemory
from headrace.serving.impression_log import ImpressionLog
from headrace.serving.model.shared_region import SharedModel
from headrace.stream.features.featurize import featurize
from headrace.trainer.model.scoring import score
from headrace.trainer.model.tables.table import initial_values


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def client(world: World) -> Client:
    return Client(make_app(world.app))


@pytest.fixture
def served(world: World) -> Trainer:
    trainer, rng = Trainer(world), Random(1)
    trainer.learn(rng)
    trainer.snapshot()
    for _ in range(3):
        trainer.delta(trainer.learn(rng))
    world.follow()
    return trainer


def counter(world: World, key: str, as_of_ms: int, buckets: dict[str, list[int]], epoch: int = 1) -> None:
    value = msgspec.json.encode(
        {"counter": "item", "key": key, "as_of_ms": as_of_ms, "epoch": epoch, "bucket_ms": 1_000, "buckets": buckets}
    )
    world.features.take(Record(TOPICS.features, 0, 0, f"item/{key}".encode(), value, {}, 0))


def ask(client: Client, **changes: Any) -> Any:
    body = {"request_id": "r1", "context": {"user": 3, "price": 2.0}, "candidates": [{"item": 1}, {"item": 2}]}
    return client.post("/v1/rank", json=body | {"open": True} | changes)


def opened(tokens: list[str]) -> Opened:
    """Open tokens as the gateway does."""
    return served_tokens(PROJECT).open(pa.array(tokens, pa.string()))


def expected(world: World, version: str, rows: list[dict[str, Any]]) -> np.ndarray:
    """Score as the trainer would: its featurizer, its forward pass, its rows."""
    types = {"user": pa.int64(), "item": pa.int64(), "price": pa.float64()}
    types |= dict.fromkeys(SPEC.counter_columns(), pa.float32())
    columns = {n: pa.array([r.get(n) for r in rows], t) for n, t in types.items()}
    columns["event_time_ms"] = pa.array([world.clock.now_ms()] * len(rows), pa.int64())
    slots, numeric = featurize(columns, SPEC)
    table, dense = world.models[version]

    def lookup(keys: np.ndarray) -> np.ndarray:
        first = initial_values(keys, dim=RECIPE.dim, seed=RECIPE.seed, scale=RECIPE.init_scale)
        return np.array([table.get(k, first[i]) for i, k in enumerate(keys.tolist())], np.float32)

    return score(RECIPE, SPEC, slots, numeric, lookup=lookup, dense=dense)[:, 0]


def test_scores_are_those_of_the_trainers_model(world: World, client: Client, served: Trainer):
    counter(world, "2", 9_000, {"8": [5, 2], "7": [1, 0], "1": [9, 9]})
    response = ask(client)
    answer = response.json()
    assert response.status_code == 200 and answer["request_id"] == "r1" and answer["version"] == served.version
    assert answer["served"] == [
        {"counter.item.impression": 0.0, "counter.item.click": 0.0},
        {"counter.item.impression": 6.0, "counter.item.click": 2.0},
    ]
    rows = [{"user": 3, "price": 2.0, "item": i, **s} for i, s in zip((1, 2), answer["served"], strict=True)]
    np.testing.assert_allclose(answer["scores"], expected(world, served.version, rows), rtol=1e-6)


def test_the_next_answer_names_the_next_version(world: World, client: Client, served: Trainer):
    first = ask(client).json()
    served.delta(served.learn(Random(9)))
    world.follow()
    second = ask(client).json()
    assert (first["version"], second["version"]) == ("a-4", "a-5") and first["scores"] != second["scores"]


def test_a_candidates_field_wins_and_missing_ones_are_null(world: World, client: Client, served: Trainer):
    answer = ask(client, context={"user": 3.0, "item": 7}, candidates=[{"item": 1, "price": None}, {}]).json()
    rows = [{"user": 3, "item": i, **s} for i, s in zip((1, 7), answer["served"], strict=True)]
    np.testing.assert_allclose(answer["scores"], expected(world, served.version, rows), rtol=1e-6)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b"{"),
        (400, b"\xff"),
        (400, b'{"request_id": "r", "context": {"a": ' + b"[" * 20_000),
        (422, b"[]"),
        (422, b'{"request_id": "r"}'),
        (422, b'{"request_id": "r", "candidates": []}'),
        (422, b'{"request_id": "", "candidates": [{}]}'),
        (422, b'{"request_id": "r", "candidates": [1]}'),
        (422, b'{"request_id": "r", "candidates": [{}], "contexts": {}}'),
        (422, b'{"request_id": "r", "candidates": [{"item": "seven"}]}'),
        (422, b'{"request_id": "r", "candidates": [{"item": 99999999999999999999999}]}'),
        (422, b'{"request_id": "r", "candidates": [{"item": [1]}]}'),
        (422, b'{"request_id": "r", "candidates": [{"item": 1.5}]}'),
        (422, b'{"request_id": "r", "candidates": [{"item": true}]}'),
        (422, b'{"request_id": "r", "candidates": [{"price": 1e999}]}'),
        (422, b'{"request_id": "r", "candidates": [' + b",".join([b"{}"] * 51) + b"]}"),
        (413, b" " * 5_000_000),
    ],
)
def test_what_is_wrong_is_told_with_the_next_step(client: Client, served: Trainer, status: int, body: bytes):
    response = client.post("/v1/rank", content=body)
    assert response.status_code == status
    assert sorted(response.json()) == ["error", "next"] and all(response.json().values())


def test_a_field_of_another_type_is_told_with_the_declared_one(client: Client, served: Trainer):
    said = client.post("/v1/rank", content=b'{"request_id": "r", "candidates": [{"item": "seven"}]}').json()
    assert said == {
        "error": "field 'item' must be int64 or null; got str.",
        "next": "bad_type: send a value of the declared type, or null",
    }


def test_an_undeclared_field_is_told_in_the_answer_and_once_in_the_log(
    world: World, client: Client, served: Trainer, caplog: pytest.LogCaptureFixture
):
    wanted = ask(client).json()
    changes = {
        "context": {"user": 3, "price": 2.0, "usr": 1},
        "candidates": [{"item": 1, "colour": 2}, {"item": 2, "colour": 3, "counter.old.click": 1.0}],
    }
    first, second = (ask(client, **changes).json() for _ in range(2))
    assert first["scores"] == wanted["scores"] and "warnings" not in wanted
    assert first["warnings"] == second["warnings"] == [
        "$.context.usr is not declared, and no score reads it. Did you mean 'user'?",
        "$.candidates[0].colour is not declared, and no score reads it.",
    ]  # fmt: skip
    assert [record.getMessage() for record in caplog.records if "field of a request" in record.getMessage()] == [
        "field of a request: 'usr' is not declared. Did you mean 'user'? No score reads it.",
        "field of a request: 'colour' is not declared. No score reads it.",
    ]
    assert world.metrics.counters["unknown_fields_total", "impression usr"] == 2


def test_undeclared_fields_of_strangers_are_bounded_in_the_answer_the_log_and_the_metric(
    world: World, client: Client, served: Trainer, caplog: pytest.LogCaptureFixture
):
    for request in range(5):
        body = ask(client, candidates=[{"item": 1, **{f"{request}-{n}{'x' * 300}": n for n in range(500)}}])
        assert body.status_code == 200 and len(body.json()["warnings"]) == 10
        assert all(len(text) < 200 for text in body.json()["warnings"])
    assert len([r for r in caplog.records if "field of a request" in r.getMessage()]) == 20
    assert len([labels for name, labels in world.metrics.counters if name == "unknown_fields_total"]) <= 21


def test_a_misspelt_field_is_refused_with_the_one_that_is_meant_where_the_project_refuses(world: World):
    impression = msgspec.structs.replace(PROJECT.impression, unknown="refuse")
    project = msgspec.structs.replace(PROJECT, impression=impression)
    client = Client(make_app(ServingApp(replace(world.app.deps, project=project))))
    said = client.post("/v1/rank", json={"request_id": "r", "candidates": [{"itm": 1}]})
    assert said.status_code == 422
    assert said.json()["error"] == (
        "$.candidates[0].itm is not declared; declared are 'item', 'price', 'user'. Did you mean 'item'?"
    )


def test_a_misspelt_field_of_the_request_itself_names_the_one_that_is_meant(client: Client, served: Trainer):
    said = client.post("/v1/rank", json={"request_id": "r", "candidate": [{"item": 1}]}).json()
    assert said["error"] == "Object contains unknown field `candidate`. Did you mean 'candidates'?"


def test_a_stage_that_begins_anew_waits_for_a_model_too(world: World):
    """As with wider rows: the region of before is not taken over, and its port has connections that wait."""
    assert world.app.is_reading() and world.features.is_caught_up
    trainer = Trainer(world)
    trainer.learn(Random(1))
    trainer.snapshot()
    world.follow()
    assert not world.app.is_reading()


def test_without_a_model_it_is_not_ready(world: World, client: Client):
    assert ask(client).status_code == 503 and client.get("/v1/model").status_code == 503
    assert client.get("/readyz").status_code == 503 and client.get("/healthz").status_code == 200


def test_ready_needs_model_and_counters(world: World, client: Client, served: Trainer):
    world.features.is_caught_up = False
    assert client.get("/readyz").status_code == 503
    world.features.is_caught_up = True
    assert client.get("/readyz").status_code == 200
    assert client.get("/metrics").text.startswith("headrace_serve_")


def test_model_tells_what_is_served_and_what_was_refused(world: World, client: Client, served: Trainer):
    said = client.get("/v1/model").json()
    assert said["version"] == "a-4" and said["step"] == 4 and said["positions"] == {"0": [4, 0]}
    assert said["spec"] == SPEC.digest() and said["snapshot"] == "a-1" and said["age_seconds"] == 4.0
    assert said["refused"] == "" and said["digest"] == "d" * 8, "a delta has none: it is that of the snapshot"
    served.delta(served.learn(Random(2)), base="elsewhere")
    world.log.append(TOPICS.deltas, 0, b"x", b"small", {"version": "a-6", "base": "a-4"})
    world.follow()
    assert client.get("/v1/model").json()["refused"].startswith("damaged: ")
    told = {"version": "a-3", "positions": {"0": [3, 0]}, "stored_left": 0, "live": {}}
    assert client.get("/v1/model", params={"version": "a-3"}).json() == told
    assert said["stored_left"] == 0 and said["live"] == {}
    assert client.get("/v1/model", params={"version": "a-9"}).status_code == 404


def test_log_true_logs_one_impression_a_candidate(world: World, client: Client, served: Trainer):
    ask(client)
    assert not world.logged.calls
    answer = ask(client, log=True).json()
    (call,) = world.logged.calls
    assert call["version"] == answer["version"] and len(call["served"]) == len(answer["served"]) == 2
    told = ask(client, log=True, open=False).json()
    assert told["served"] == world.logged.calls[1]["served"] == call["served"]


def test_a_token_says_what_the_open_form_does_and_who_scored_it(world: World, client: Client, served: Trainer):
    counter(world, "2", 9_000, {"8": [5, 2], "7": [1, 0]})
    open_form, told = ask(client).json(), ask(client, open=False).json()
    assert told | {"served": []} == open_form | {"served": []} and all(isinstance(t, str) for t in told["served"])
    found = opened(told["served"])
    assert found.reasons == {} and found.version == [served.version] * 2 and found.has_NK.all()
    rows = [dict(zip(SPEC.counter_columns(), row, strict=True)) for row in found.values_NC.tolist()]
    assert rows == open_form["served"]
    assert found.scores_NT[:, 0].tolist() == told["scores"], "the score to the bit"


def test_impressions_carry_declared_fields_counters_and_version(tmp_path: Path):
    sent: list[tuple[str, dict[str, Any]]] = []
    log = ImpressionLog(PROJECT, port=1, spool_dir=tmp_path)
    log._sender.emit = lambda label, record: sent.append((label, record))  # type: ignore[method-assign]
    log.log(
        request_id="r",
        version="a-1",
        context={"user": 3, "secret": 1},
        candidates=[{"item": 1}, {"item": 2, "user": 4}],
        served=["one", "two"],
        event_time_ms=77,
    )
    assert [label for label, _ in sent] == ["impression", "impression"]
    assert sent[1][1] == {
        "user": 4, "item": 2, "price": None, "served": "two", "event_id": "r#1", "request_id": "r",
        "place": 1, "event_time_ms": 77, "version": "a-1",
    }  # fmt: skip
    log.close()


def test_counters_of_a_fenced_off_aggregator_are_dropped(world: World, client: Client, served: Trainer):
    counter(world, "1", 9_000, {"8": [5, 2]}, epoch=2)
    counter(world, "1", 9_500, {"8": [50, 20]}, epoch=1)
    assert ask(client).json()["served"][0]["counter.item.impression"] == 5.0
    counter(world, "2", 20_000, {"19": [1, 0]}, epoch=2)
    assert ask(client).json()["served"][0]["counter.item.impression"] == 0.0, "the window went on"
    world.features.take(Record(TOPICS.features, 0, 0, b"item/2", None, {}, 0))
    assert ask(client).json()["served"][1]["counter.item.impression"] == 0.0


def test_until_the_counters_are_read_nothing_is_scored_and_nothing_logged(
    world: World, client: Client, served: Trainer
):
    world.features.is_caught_up = False
    refused = ask(client, log=True)
    assert refused.status_code == 503 and refused.headers["Retry-After"] == "1" and not world.logged.calls
    assert "counters" in refused.json()["error"] and client.get("/readyz").status_code == 503
    world.features.is_caught_up = True
    assert ask(client, log=True).status_code == 200 and len(world.logged.calls) == 1


def test_a_process_that_began_without_a_broker_serves_after_the_bound_and_logs_no_counters(
    world: World, client: Client, served: Trainer
):
    world.features.is_caught_up, world.features.away_since_s = False, 0.0
    world.clock.advance(9.0)
    assert ask(client).status_code == 503
    world.clock.advance(2.0)
    said = ask(client, log=True).json()
    assert said["counters"] == "unread" and said["served"] == [{}, {}] and len(said["scores"]) == 2
    assert not opened(world.logged.calls[0]["served"]).has_NK.any(), "the join takes its own counters"
    ready = client.get("/readyz")
    assert (
        ready.status_code == 200 and "unread" in ready.text and client.get("/v1/model").json()["counters"] == "unread"
    )


def test_a_broker_that_stays_away_leaves_the_last_known_counters_and_the_answer_says_so(
    world: World, client: Client, served: Trainer
):
    counter(world, "2", 9_000, {"8": [5, 2]})
    assert "counters" not in ask(client).json()
    world.features.away_since_s = 0.0
    world.clock.advance(11.0)
    said = ask(client).json()
    assert said["counters"] == "stale" and said["served"][1]["counter.item.impression"] == 5.0
    assert client.get("/readyz").status_code == 200 and "stale" in client.get("/readyz").text
    world.features.away_since_s = None
    red = client.get("/readyz")
    assert red.status_code == 503 and "10000 ms" in red.text, "the broker answers, and this process is behind"
    world.features.current_s = world.clock.monotonic()
    assert client.get("/readyz").status_code == 200 and "counters" not in ask(client).json()


def test_each_workers_place_is_told_and_one_that_is_behind_makes_all_of_them_not_ready(
    world: World, client: Client, served: Trainer
):
    slow = SharedModel(world.shared.path, dim=RECIPE.dim, rows_max=1_000, reader=3)
    other = ServingApp(replace(world.deps, shared=slow, features=FeatureMemory()))
    assert client.get("/readyz").status_code == 200, "a worker that has told nothing answers nothing either"
    for seconds in (8.0, 4.0):  # The other one is caught up, and then stands still.
        world.clock.advance(seconds)
        world.features.offset, world.features.current_s = 70, world.clock.monotonic()
        world.app.tell()
        if seconds == 8.0:
            other.deps.features.offset, other.deps.features.is_caught_up = 50, True
            other.deps.features.current_s = 1.0
        other.tell()
        assert client.get("/readyz").status_code == (200 if seconds == 8.0 else 503)
    assert "worker 3" in client.get("/readyz").text
    assert client.get("/v1/model").json()["workers"] == [
        {"worker": 0, "features_offset": 70, "behind_seconds": 0.0},
        {"worker": 3, "features_offset": 50, "behind_seconds": 11.0},
    ]
    world.app.measure_workers()
    assert world.metrics.gauges["features_offset", "3"] == 50
    assert world.metrics.gauges["counters_behind_seconds", "3"] == 11.0
    world.features.away_since_s = 0.0
    assert client.get("/readyz").status_code == 200 and "stale" in client.get("/readyz").text
