"""Goal: what a project declares private is in no topic, and what it keeps is there. Method: a gateway over a log in
memory, whose every byte is searched."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import msgpack
import pytest
from ingest_world import Counts, HandClock, ShakyLog, dependencies, message

from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.events import decode_batch
from headrace.contract.privacy import Privacy
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import FeatureSpec
from headrace.ingest.compile_decoders import compile_decoders
from headrace.ingest.decode.message import Message
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.gateway import Gateway
from headrace.serving.model.scorer import merge

KEY = "sixteen bytes or more"
SECRET = "ann@example.org"
PROJECT = Project(
    impression=ImpressionType(
        tag="shop.impression",
        key="user",
        fields={"user": "string", "item": "int64", "tags": "list[string]", "extra": "string"},
        unknown="keep",
        private={"user": "hash", "email": "drop"},
    ),
    feedback=(FeedbackType(name="click", tag="shop.click", fields={"user": "string"}, private={"user": "hash"}),),
    tasks=(Task(name="click", feedback="click", window_ms=10_000),),
    features=FeatureSpec(),
).checked()


def _run(*messages: Message) -> ShakyLog:
    log, clock = ShakyLog(Random(1)), HandClock()
    gateway = Gateway(dependencies(log, Counts(), clock, project=PROJECT, privacy=Privacy(PROJECT, KEY)), "g")
    for one in messages:
        gateway.offer(one, 100, Peer("a"), None)
    for _ in range(5):
        clock.ms += 20
        gateway.tick()
    return log


def _written(log: ShakyLog) -> bytes:
    events = [repr(decode_batch(value).to_pylist()).encode() for _, value, h in log.records["events"] if "type" in h]
    letters = [letter.raw + repr(letter).encode() for letter in log.letters()]
    return b"".join(events + letters + [value for _, value, _ in log.records["events"]])


def test_a_private_field_is_hashed_or_dropped_and_the_join_still_finds_its_partner() -> None:
    shown = {"event_id": "e", "request_id": "r", "user": SECRET, "email": SECRET, "item": 1, "tags": ["a", "b"]}
    click = {"event_id": "c", "request_id": "r", "user": SECRET}
    log = _run(message("shop.impression", [shown], "1"), message("shop.click", [click], "2"))
    impression, clicked = log.rows()
    assert impression["user"] == impression["key"] == clicked["key"] == Privacy(PROJECT, KEY).hash(SECRET)
    assert impression["_partition"] == clicked["_partition"]
    assert impression["tags"] == ["a", "b"]
    assert impression["extra"] is None
    assert SECRET.encode() not in _written(log)


@pytest.mark.parametrize("tag", ["shop.impression", "shop.click", "undeclared"])
def test_a_dead_letter_shows_nothing_private_and_can_be_offered_again(tag: str) -> None:
    bad: dict[str, Any] = {"event_id": "e", "user": SECRET, "email": SECRET, "item": 1}
    log = _run(message(tag, [bad], "1"), Message(tag, b"", "2", problem="cut off", raw=SECRET.encode()))
    assert SECRET.encode() not in _written(log)
    (letter,) = (letter for letter in log.letters() if letter.reason != "bad_chunk")
    again = msgpack.unpackb(letter.raw) | {"request_id": "r"}
    (row,) = _run(message("shop.impression", [again], "3")).rows()
    assert row["user"] == Privacy(PROJECT, KEY).hash(SECRET)


def test_a_number_and_its_text_are_one_user() -> None:
    rows = _run(message("shop.impression", [{"request_id": "r", "user": user} for user in (7, "7")], "1")).rows()
    assert len({row["user"] for row in rows}) == 1


def test_unknown_fields_are_kept_as_json() -> None:
    record = {"request_id": "r", "user": "u", "new": {"b": [1, b"\xff", float("nan")]}, "extra": 2, "email": SECRET}
    (row,) = _run(message("shop.impression", [record], "1")).rows()
    assert json.loads(row["extra"]) == {"extra": 2, "new": {"b": [1, "\ufffd", "nan"]}}


def test_hashing_needs_a_key_and_declarations_must_agree() -> None:
    with pytest.raises(ConfigRejected, match="HEADRACE_PRIVACY_KEY has 5 bytes"):
        Privacy(PROJECT, "short")
    for change in ({"private": {"item": "hash"}}, {"private": {"user": "drop"}}, {"fields": {"user": "string"}}):
        kind = {"tag": "t", "key": "user", "fields": PROJECT.impression.fields, "unknown": "keep"} | change
        with pytest.raises(ConfigRejected):
            Project(impression=ImpressionType(**kind), feedback=(), tasks=(), features=FeatureSpec()).checked()


def test_serving_sees_the_same_user_as_the_log() -> None:
    (row,) = _run(message("shop.impression", [{"request_id": "r", "user": SECRET}], "1")).rows()
    raw = merge(PROJECT, {"user": SECRET}, [{"item": 1}, {"user": None}], Privacy(PROJECT, KEY))
    assert raw["user"].to_pylist() == [row["user"], None]


def test_decoders_compile_for_a_project_that_hashes(caplog: pytest.LogCaptureFixture) -> None:
    log = ShakyLog(Random(1))
    compile_decoders(dependencies(log, Counts(), HandClock(), project=PROJECT, privacy=Privacy(PROJECT, KEY)))
    assert log.rows() == [] and not caplog.records, "its events are not a user's to be told of"
