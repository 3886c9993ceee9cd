"""Goal: how deep a record may be nested is the same at every door; what is deeper is one dead letter, `too_deep`, and
costs neither its neighbours nor its connection. Method: bytes as clients send them, through each door's reader into a
gateway; no record is made in Python first, which has limits of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import msgpack
import pytest
from access_log_world import ITEM, project
from ingest_world import NOT_LATE, START_MS, Counts, HandClock, ShakyLog, dependencies, impression

from headrace.contract.config import SourceConfig
from headrace.contract.errors import EventRejected
from headrace.contract.formats.nesting import LEVELS_MAX, TOO_DEEP
from headrace.contract.interfaces.group import Claim, Fetched
from headrace.contract.mapping import AccessLog
from headrace.ingest.decode.message import Message
from headrace.ingest.decode.shallow import shallow_json, shallow_msgpack
from headrace.ingest.forward.protocol import Decoder
from headrace.ingest.gateway.batcher import Outcome
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.http.body import messages_of as http_messages
from headrace.ingest.http.body import read_events
from headrace.ingest.sources.kafka_source import messages_of as kafka_messages
from headrace.sender.entry import pack_entry

TAG, HOLE = "shop.impression", "@@"
NOW_S = START_MS // 1_000

Texts = Callable[[Any, int], bytes]
"""Writes a value with `HOLE` in it, in whose place so many lists lie in each other."""


def _json(value: Any, lists: int) -> bytes:
    return json.dumps(value).encode().replace(b'"@@"', b"[" * lists + b"]" * lists)


def _maps(value: Any, lists: int) -> bytes:
    return json.dumps(value).encode().replace(b'"@@"', b'{"a":' * lists + b"1" + b"}" * lists)


def _msgpack(value: Any, lists: int) -> bytes:
    return bytes(msgpack.packb(value)).replace(b"\xa2@@", b"\x91" * (lists - 1) + b"\x90")


def _forward(write: Texts) -> Callable[[list[Any], int], list[Message]]:
    def read(records: list[Any], lists: int) -> list[Message]:
        data = write([TAG, [[NOW_S, record] for record in records], {"chunk": "c"}], lists)
        return [message for message, _ in Decoder(1 << 24).feed(data) if isinstance(message, Message)]

    return read


def _http(write: Texts, kind: str) -> Callable[[list[Any], int], list[Message]]:
    def read(records: list[Any], lists: int) -> list[Message]:
        body = write([{"tag": TAG, **record} for record in records], lists)
        return http_messages(read_events(body, kind, "", 1 << 24), "", START_MS)

    return read


def _kafka(write: Texts, form: str) -> Callable[[list[Any], int], list[Message]]:
    def read(records: list[Any], lists: int) -> list[Message]:
        source = SourceConfig(topic="t", tag=TAG, format=form)  # type: ignore[arg-type]
        extra = {"version": "1.1"} if form == "gelf" else {}
        values = [write(extra | record, lists) for record in records]
        claim = Claim("t", 0, 0)
        return kafka_messages(source, [Fetched(claim, at, value, START_MS) for at, value in enumerate(values)])

    return read


def _otlp(records: list[Any], lists: int) -> list[Message]:
    def any_value(value: Any) -> str:
        if value == HOLE:
            return '{"arrayValue":{"values":[' * lists + "]}}" * lists
        return json.dumps({"intValue": str(value)} if isinstance(value, int) else {"stringValue": value})

    texts = [
        ",".join(f'{{"key":"{name}","value":{any_value(value)}}}' for name, value in record.items())
        for record in records
    ]
    logs = ",".join(f'{{"attributes":[{text}]}}' for text in texts)
    value = f'{{"resourceLogs":[{{"scopeLogs":[{{"logRecords":[{logs}]}}]}}]}}'.encode()
    source = SourceConfig(topic="t", tag=TAG, format="otlp_json")
    return kafka_messages(source, [Fetched(Claim("t", 0, 0), 0, value, START_MS)])


DOORS: dict[str, Callable[[list[Any], int], list[Message]]] = {
    "forward, MessagePack": _forward(_msgpack),
    "forward, JSON": _forward(_json),
    "forward, JSON of maps": _forward(_maps),
    "HTTP, JSON": _http(_json, "application/json"),
    "HTTP, maps": _http(_maps, "text/plain"),
    "HTTP, MessagePack": _http(_msgpack, "application/msgpack"),
    "Kafka, JSON": _kafka(_json, "json"),
    "Kafka, MessagePack": _kafka(_msgpack, "msgpack"),
    "Kafka, GELF": _kafka(_json, "gelf"),
    "Kafka, OTLP": _otlp,
}


class World:
    """A gateway on a log in memory."""

    def __init__(self, **more: Any) -> None:
        self.clock, self.log = HandClock(), ShakyLog(Random(1))
        self.gateway = Gateway(dependencies(self.log, Counts(), self.clock, late=NOT_LATE, **more), "g")
        self.outcomes: list[Outcome] = []

    def take(self, messages: list[Message]) -> None:
        for message in messages:
            self.gateway.offer(message, 1, Peer("10.0.0.1"), self.outcomes.append)
        for _ in range(5):
            self.clock.ms += 100
            self.gateway.tick()

    def ids(self) -> list[str]:
        return sorted(row["event_id"] for row in self.log.rows())


@pytest.mark.parametrize("lists", [1, LEVELS_MAX - 1, LEVELS_MAX, 600, 1_022, 5_000, 100_000])
@pytest.mark.parametrize("door", DOORS)
def test_each_door_takes_as_many_levels(door: str, lists: int) -> None:
    world = World()
    world.take(DOORS[door]([impression(1), impression(2, n=HOLE), impression(3)], lists))
    # The record itself is the first level.
    fits = lists + 1 <= LEVELS_MAX
    assert world.ids() == (["e1", "e2", "e3"] if fits else ["e1", "e3"])
    assert [(letter.reason, letter.tag) for letter in world.log.letters()] == ([] if fits else [(TOO_DEEP, TAG)])
    assert sum(outcome.appended + outcome.dead_lettered for outcome in world.outcomes) == 3, "all of it is acked"


@pytest.mark.parametrize("door", ["forward, MessagePack", "forward, JSON"])
def test_a_tag_that_nobody_declares_may_bring_any_depth(door: str) -> None:
    world = World()
    messages = DOORS[door]([impression(1, n=HOLE)], 5_000)
    world.take([Message("a.b", one.body, one.chunk) for one in messages])
    assert [letter.reason for letter in world.log.letters()] == ["undeclared"] and len(world.outcomes) == 1


def test_options_of_any_depth_cost_nothing() -> None:
    frame = b"\x93" + msgpack.packb(TAG) + b"\x91" + msgpack.packb([NOW_S, impression(1)])
    frame += b"\x82\xa1o" + b"\x91" * 5_000 + b"\x90" + msgpack.packb("chunk") + msgpack.packb("c")
    ((message, _),) = Decoder(1 << 20).feed(frame)
    assert isinstance(message, Message) and message.chunk == "c"


def test_lines_of_access_logs_have_the_same_bound() -> None:
    made = project(AccessLog(tag="nginx.access", format="json", routes=(ITEM,)))
    good = {"request": "GET /item/7?uid=3&rid=r HTTP/1.1", "status": 200}
    for levels, reasons in ((LEVELS_MAX, []), (LEVELS_MAX + 1, [TOO_DEEP]), (5_000, [TOO_DEEP])):
        world = World(project=made)
        line = _json(good | {"n": HOLE}, levels - 1).decode()
        world.take([Message("nginx.access", msgpack.packb([NOW_S, {"log": line}]))])
        parsed = msgpack.packb([NOW_S, good | {"n": HOLE}])
        nested = parsed.replace(b"\xa2@@", b"\x91" * (levels - 2) + b"\x90")
        world.take([Message("nginx.access", nested)])
        assert [letter.reason for letter in world.log.letters()] == reasons * 2
        assert len(world.log.rows("impression")) == 2 - 2 * len(reasons)


def test_the_sender_refuses_what_no_door_takes() -> None:
    value: Any = []
    for _ in range(LEVELS_MAX - 2):
        value = [value]
    pack_entry(TAG, 0, {"n": value})
    for more in (1, 5_000):
        deeper = value
        for _ in range(more):
            deeper = {"a": deeper}
        with pytest.raises(EventRejected, match="100 levels") as caught:
            pack_entry(TAG, 0, {"n": deeper})
        assert caught.value.reason == TOO_DEEP


@pytest.mark.parametrize("seed", range(30))
def test_a_cut_leaves_a_value_that_is_otherwise_the_same(seed: int) -> None:
    random = Random(seed)

    def made(levels: int) -> Any:
        kind = random.randrange(6 if levels else 4)
        if kind > 3:
            inner = [made(levels - 1) for _ in range(random.randrange(4))]
            return inner if kind == 4 else {f"k]{at}": each for at, each in enumerate(inner)}
        return [random.randrange(-(2**40), 2**40), 'a"[{\\', 1.5, None][kind]

    def cut(value: Any, levels: int) -> Any:
        if not isinstance(value, list | dict):
            return value
        if levels == 0:
            return type(value)()
        if isinstance(value, list):
            return [cut(each, levels - 1) for each in value]
        return {name: cut(each, levels - 1) for name, each in value.items()}

    for _ in range(50):
        value, levels = [made(8), made(8), made(8)], random.randrange(1, 6)
        assert json.loads(shallow_json(json.dumps(value).encode(), levels)) == cut(value, levels)
        packed = msgpack.packb(value)
        assert msgpack.unpackb(shallow_msgpack(packed, levels)) == cut(value, levels)
        torn = packed[: random.randrange(len(packed))]
        assert len(shallow_msgpack(torn, levels)) <= len(torn)
