"""Lines of an access log become the events that the user's routes say, and nothing else.

Goal: one chunk, one ack, every line counted once. Method: a whole gateway over a log in memory, fed with lines.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from access_log_world import CLF, ITEM, LOG, project
from ingest_world import NOT_LATE, PROJECT, START_MS, Counts, HandClock, ShakyLog, dependencies, message

from headrace.contract.config import SourceConfig
from headrace.contract.errors import ConfigRejected
from headrace.contract.interfaces.group import Claim, Fetched
from headrace.contract.mapping import AccessLog, Route
from headrace.contract.project import Project
from headrace.ingest.decode.message import message_of
from headrace.ingest.gateway.batcher import Outcome
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.sources.access_log_events import Mapper
from headrace.ingest.sources.kafka_source import messages_of

DATA = Path(__file__).parents[2] / "golden" / "data"
BY_TITLE = {"user_id": "=1", "request_id": "query:rid", "title": "path:item_id", "item_id": "=1"}


def line(request: str, status: int = 200, referer: str = "-") -> str:
    """Return a line of the combined format."""
    return f'203.0.113.9 - - [{CLF}] "{request}" {status} 51 "{referer}" "curl/7.88.1"'


class World:
    """A gateway with the mapping."""

    def __init__(self, made: Project | None = None) -> None:
        self.clock, self.counts, self.log = HandClock(), Counts(), ShakyLog(Random(1))
        self.gateway = Gateway(
            dependencies(self.log, self.counts, self.clock, project=made or project(), late=NOT_LATE), "g"
        )
        self.outcomes: list[Outcome] = []

    def offer(self, records: list[Any], chunk: str | None = "c", peer: Peer | None = None) -> None:
        self.gateway.offer(message("nginx.access", records, chunk), 100, peer or Peer("10.0.0.1"), self.outcomes.append)

    def settle(self) -> None:
        for _ in range(5):
            self.clock.ms += 100
            self.gateway.tick()


LINES = [
    {"log": line("GET /item/7?uid=3&rid=r1 HTTP/1.1", referer="https://shop.example/a%20b")},
    {"log": line("POST /click?uid=3&rid=r1&item=7 HTTP/1.1", 302)},
    {"log": line("GET /item/8?uid=4&rid=r2 HTTP/2.0") + "\n"},
    {"log": line("GET /favicon.ico HTTP/1.1")},
    {"log": line("GET /item/9?uid=4&rid=r3 HTTP/1.1", 404)},
    {"log": line("GET /item/9 HTTP/1.1")},
    {"log": line(r"\x16\x03\x01\x02", 400)},
    {"log": "not a line of this log"},
    {"other": 1},
]


def test_a_chunk_becomes_events_of_two_types_and_one_ack() -> None:
    world = World()
    world.offer(LINES)
    assert world.outcomes == []
    world.settle()
    assert world.outcomes == [Outcome(3, 2, 0)]
    impressions, clicks = world.log.rows("impression"), world.log.rows("click")
    assert sorted((r["item_id"], r["user_id"], r["request_id"]) for r in impressions) == [(7, 3, "r1"), (8, 4, "r2")]
    assert {r["title"] for r in impressions} == {"https://shop.example/a%20b", None}
    assert [(r["item_id"], r["key"], r["event_time_ms"]) for r in clicks] == [(7, "3", START_MS)]
    assert world.counts.totals["lines_skipped_total:nginx.access"] == 4
    assert world.counts.totals["events_read_total"] == world.counts.totals["events_appended_total"] == 3
    letters = world.log.letters()
    assert [(x.reason, x.tag) for x in letters] == [("bad_line", "nginx.access")] * 2
    assert {x.detail for x in letters} == {
        "the line is not of this log's format",
        "the record has no field 'log' with the line, nor a request's fields",
    }
    assert world.gateway.buffer_bytes == 0 and world.gateway.open_chunks == 0


def test_a_retry_counts_once_and_an_equal_chunk_counts_twice() -> None:
    world = World()
    world.offer(LINES)
    world.settle()
    world.offer(LINES)
    world.settle()
    assert world.outcomes == [Outcome(3, 2, 0), Outcome(0, 0, 5)]
    same = Peer("10.0.0.2")
    for _ in range(2):
        world.offer(LINES[:2], "AAAAAAAAAAAAAAAAAAAAAA==", same)
    world.settle()
    assert world.outcomes[2:] == [Outcome(2, 0, 0), Outcome(2, 0, 0)]
    ids = [row["event_id"] for row in world.log.rows()]
    assert len(ids) == len(set(ids)) == 7


def test_a_chunk_without_any_event_is_acked_at_once() -> None:
    world = World()
    world.offer(LINES[3:7])
    assert world.outcomes == [Outcome(0, 0, 0)]
    assert world.gateway.open_chunks == 0


def test_an_id_of_the_request_makes_a_line_known_again() -> None:
    log = AccessLog(
        tag="nginx.access",
        format='$remote_addr $msec "$request" $status $request_id',
        routes=(msgspec.structs.replace(ITEM, fields={**ITEM.fields, "event_id": "log:request_id"}),),
    )
    world = World(project(log))
    one = {"log": '203.0.113.9 1700000000.125 "GET /item/7?uid=3&rid=r HTTP/1.1" 200 5f2c'}
    world.offer([one], "c")
    world.offer([one], "another chunk")
    world.settle()
    assert world.outcomes == [Outcome(1, 0, 0), Outcome(0, 0, 1)]
    (row,) = world.log.rows()
    assert row["event_id"] == "5f2c" and row["event_time_ms"] == 1_700_000_000_125


PARSED = [
    # fluentd's nginx parser, fluentd's apache2 parser, fluent-bit's nginx and apache2 parsers, nginx's own JSON.
    {"remote": "203.0.113.9", "host": "-", "user": "-", "method": "GET", "path": "/item/7?uid=3&rid=r", "code": "200",
     "size": "51", "referer": "-", "agent": "curl"},
    {"host": "203.0.113.9", "user": None, "method": "GET", "path": "/item/7?uid=3&rid=r", "code": 200, "size": 51,
     "referer": None, "agent": "curl"},
    {"remote": "203.0.113.9", "host": "-", "user": "-", "method": "GET", "path": "/item/7?uid=3&rid=r", "code": "200"},
    {"request": "GET /item/7?uid=3&rid=r HTTP/1.1", "status": "200"},
    {"request_method": "GET", "uri": "/item/7", "args": "uid=3&rid=r", "status": 200},
    {"method": b"GET", "path": b"/item/7?uid=3&rid=r", "code": b"200", "message": "kept beside"},
]  # fmt: skip


@pytest.mark.parametrize("record", PARSED)
def test_a_record_that_the_shipper_parsed_says_the_same(record: dict[str, Any]) -> None:
    mapped = Mapper(LOG, project()).map_message(message_of("nginx.access", [(5_000_000_000, record)], "c"))
    (made,) = mapped.messages
    assert made.tag == "shop.impression" and made.chunk == "c"
    assert made.entries == [(5_000_000_000, {"item_id": 7, "user_id": 3, "request_id": "r"})]


def test_cookies_headers_constants_and_types() -> None:
    route = Route(
        path="/p/{title}/{item_id}",
        event="shop.impression",
        fields={
            "user_id": "cookie:uid",
            "request_id": "header:X-Request-ID",
            "price": "query:price",
            "new": "=true",
            "version": "log:upstream_http_x_model",
        },
    )
    log = AccessLog(tag="nginx.access", format="json", routes=(route,))
    text = (
        '{"msec":"1700000000.5","request":"GET /p/caf%C3%A9%2Fnoir/7?price=2.50 HTTP/1.1","status":"200",'
        '"http_cookie":"a=1; uid=3","http_x_request_id":"abc","upstream_http_x_model":"7"}'
    )
    (made,) = Mapper(log, project(log)).map_message(message_of("nginx.access", [(1, {"log": text})])).messages
    ((time_ns, record),) = made.entries
    assert time_ns == 1_700_000_000_500_000_000
    assert record == {
        "title": "café/noir",
        "item_id": 7,
        "user_id": 3,
        "request_id": "abc",
        "price": 2.5,
        "new": True,
        "version": "7",
    }


def test_a_value_of_the_wrong_type_is_a_dead_letter_like_any_other() -> None:
    world = World()
    world.offer([{"log": line("GET /item/seven?uid=3&rid=r HTTP/1.1")}])
    world.settle()
    assert [x.reason for x in world.log.letters()] == ["bad_type"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tag": "shop.click"}, "the tag is taken"),
        ({"routes": ()}, "no route"),
        ({"routes": (msgspec.structs.replace(ITEM, event="shop.nothing"),)}, "no declared event"),
        ({"routes": (msgspec.structs.replace(ITEM, fields={"user_id": "query:uid"}),)}, "request_id"),
        ({"routes": (msgspec.structs.replace(ITEM, fields={**ITEM.fields, "colour": "query:c"}),)}, "no field"),
        ({"routes": (msgspec.structs.replace(ITEM, fields={**ITEM.fields, "price": "body:c"}),)}, "comes from"),
        ({"routes": (msgspec.structs.replace(ITEM, path="item"),)}, "begins with /"),
        ({"routes": (msgspec.structs.replace(ITEM, path="/item-{item_id}"),)}, "whole segment"),
        ({"routes": (msgspec.structs.replace(ITEM, skip_without=("price",)),)}, "skip_without"),
    ],
)
def test_a_mapping_that_contradicts_the_events_does_not_start(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigRejected, match=says):
        project(msgspec.structs.replace(LOG, **change))


def test_a_format_that_cuts_no_line_does_not_start() -> None:
    for text in ("$remote_addr$request", "nothing here"):
        with pytest.raises(ConfigRejected, match="format"):
            World(project(msgspec.structs.replace(LOG, format=text)))


def test_a_bad_line_of_a_project_with_private_fields_is_not_kept() -> None:
    made = msgspec.structs.replace(
        project(), impression=msgspec.structs.replace(PROJECT.impression, private={"title": "drop"})
    )
    world = World(made)
    world.offer([{"log": "a name, an address", "host": "web-1"}])
    world.settle()
    (letter,) = world.log.letters()
    assert letter.reason == "bad_line" and b"name" not in letter.raw and b"web-1" in letter.raw


def test_lines_that_come_over_kafka_are_known_by_their_offsets() -> None:
    lines = (DATA / "nginx-combined.log").read_bytes().split(b"\n")[:-1]
    source = SourceConfig(topic="raw", format="raw", tag="nginx.access", text_field="log")
    records = [Fetched(Claim("raw", 0, 1), at, text, START_MS) for at, text in enumerate(lines)]
    world = World(project(msgspec.structs.replace(LOG, routes=(msgspec.structs.replace(ITEM, fields=BY_TITLE),))))
    # 2026 lies ahead of the tests' clock.
    world.clock.ms = 1_795_600_000_000
    for cut in (10, 20):
        # Read twice, cut in other places: each line counts once.
        for part in (records[:cut], records[cut:]):
            for made in messages_of(source, part):
                world.gateway.offer(made, 0, Peer("kafka:raw/0"), world.outcomes.append)
        world.settle()
    rows = world.log.rows("impression")
    assert {row["request_id"]: row["event_id"] for row in rows}["r1"] == f"raw/0/0/{START_MS}"
    assert len(rows) == len({row["event_id"] for row in rows}) == 17
    assert {"café", "日本", 'a/b"?', "7"} <= {row["title"] for row in rows}
    assert world.counts.totals["lines_skipped_total:nginx.access"] == 2 * (33 - 17)
    assert world.log.letters() == [] and sum(outcome.repeated for outcome in world.outcomes) == 17


def test_numbers_are_read_as_the_server_wrote_them() -> None:
    world = World()
    for at, (price, good) in enumerate([("2.50", True), ("1e3", True), (".5", True), ("1_000", False), ("nan", False)]):
        route = msgspec.structs.replace(ITEM, fields={**ITEM.fields, "price": "query:price"})
        mapper = Mapper(AccessLog(tag="t", routes=(route,)), project())
        text = line(f"GET /item/{at}?uid=1&rid=r&price={price} HTTP/1.1")
        (made,) = mapper.map_message(message_of("t", [(START_MS * 1_000_000, {"log": text})])).messages
        world.gateway.offer(made, 0, Peer("p"), None)
        assert isinstance(made.entries[0].record["price"], float) is good
    world.settle()
    assert len(world.log.rows("impression")) == 3 and {x.reason for x in world.log.letters()} == {"bad_type"}


def test_a_line_as_bytes_is_the_same_line() -> None:
    # fluentd's tail without a parser sends bytes; what is no UTF-8 is Latin-1.
    text = line("GET /item/7?uid=3&rid=r HTTP/1.1", referer="caf\xe9").encode("latin-1")
    mapped = Mapper(LOG, project()).map_message(message_of("nginx.access", [(1, {"message": text})]))
    (made,) = mapped.messages
    assert made.entries[0].record == {"item_id": 7, "user_id": 3, "request_id": "r", "title": "café"}


def _timed(**fields: str) -> AccessLog:
    """Return a log whose lines end in the upstreams' status and times, with these fields of its events."""
    route = msgspec.structs.replace(ITEM, fields={"user_id": "query:uid", "request_id": "query:rid", **fields})
    return AccessLog(
        tag="nginx.access",
        format='$remote_addr [$time_local] "$request" $status $upstream_status $upstream_response_time $request_time',
        routes=(route,),
    )


@pytest.mark.parametrize(
    ("status", "times", "price", "title"),
    [
        ("200", "0.001", 0.001, "0.001"),
        ("502, 200", "0.001, 0.002", 0.003, "0.001, 0.002"),
        ("200 : 404", "0.1 : 0.2", 0.3, "0.1 : 0.2"),
        ("502, -", "0.004, -", 0.004, "0.004, -"),
        ("-", "-", None, None),
    ],
)
def test_a_number_of_several_upstreams_is_their_sum(
    status: str, times: str, price: float | None, title: str | None
) -> None:
    log = _timed(price="log:upstream_response_time", title="log:upstream_response_time")
    world = World(project(log))
    world.offer([{"log": f'::1 [{CLF}] "GET /item/7?uid=3&rid=r HTTP/1.1" 200 {status} {times} 0.5'}])
    world.settle()
    (row,) = world.log.rows("impression")
    assert (row["price"], row["title"]) == (price, title)
    assert world.log.letters() == []


def test_a_status_of_several_upstreams_is_that_of_the_last() -> None:
    world = World(project(_timed(price="log:upstream_status")))
    statuses = ("200", "502, 404", "502 : -")
    world.offer([{"log": f'::1 [{CLF}] "GET /item/7?uid=3&rid=r{s} HTTP/1.1" 200 {s} 0.1 0.5'} for s in statuses])
    world.settle()
    assert [row["price"] for row in world.log.rows("impression")] == [200, 404, 502]


def test_a_json_line_nested_too_deeply_costs_itself_and_what_is_behind_it_is_taken() -> None:
    log = AccessLog(tag="nginx.access", format="json", routes=(ITEM,))
    good = '{"request": "GET /item/7?uid=3&rid=%s HTTP/1.1", "status": 200}'
    deep = '{"status": 200, "a": ' + "[" * 1_000 + "]" * 1_000 + "}"
    world = World(project(log))
    world.offer([{"log": good % "a"}, {"log": deep}, {"log": good % "b"}])
    world.offer([{"log": good % "c"}], "behind")
    world.settle()
    assert [row["request_id"] for row in world.log.rows("impression")] == ["a", "b", "c"]
    (letter,) = world.log.letters()
    assert letter.reason == "too_deep"
    assert world.outcomes == [Outcome(2, 1, 0), Outcome(1, 0, 0)]


@pytest.mark.parametrize("status", [200, 200.0, "200"])
def test_whole_numbers_that_came_as_floats_are_whole(status: object) -> None:
    """fluent-bit's Lua filter has no integers: a record that it cut says 200.0, which no route matched."""
    world = World()
    world.offer([{"method": "GET", "path": "/item/7?uid=3&rid=r1", "code": status, "time_local": CLF}])
    world.settle()
    (row,) = world.log.rows("impression")
    assert row["request_id"] == "r1" and not world.counts.totals["lines_skipped_total"]
