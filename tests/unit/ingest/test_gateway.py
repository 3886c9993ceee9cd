"""Goal: each event has one outcome with the right words, and an ack means Kafka has it. Method: the gateway without
sockets on a log and a clock in memory."""

from __future__ import annotations

import base64
import hashlib
from random import Random
from typing import Any

import msgpack
import numpy as np
import pytest
from ingest_world import START_MS, Counts, HandClock, ShakyLog, dependencies, impression, message

from headrace.contract.config import IngestConfig
from headrace.contract.errors import Overloaded, Unavailable
from headrace.contract.hashing import partition_of
from headrace.ingest.decode.message import Message
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.counts import FeedbackDelay
from headrace.ingest.gateway.gateway import Gateway

P = 4


def content_hash(content: list[dict[str, object]]) -> str:
    """Return the chunk id that fluent-bit gives to these records."""
    data = message("any", content).body
    return base64.b64encode(hashlib.sha512(data).digest()[:16]).decode()


class World:
    def __init__(self, **config: Any) -> None:
        self.log, self.clock, self.counts = ShakyLog(Random(1)), HandClock(), Counts()
        settings = IngestConfig(**{"grace_ms": 0, **config})
        self.gateway = Gateway(dependencies(self.log, self.counts, self.clock, config=settings, partitions=P), "g1")
        self.acks: list[str] = []

    def offer(self, what: Message, peer: Peer | None = None) -> None:
        name = str(what.chunk)
        self.gateway.offer(what, 100, peer or Peer("10.0.0.1"), lambda _outcome: self.acks.append(name))

    def settle(self, ticks: int = 12) -> None:
        for _ in range(ticks):
            self.clock.ms += 5
            self.gateway.tick()


def test_events_land_in_the_partition_of_their_key_with_their_fields() -> None:
    world = World()
    world.offer(message("shop.impression", [impression(n, price=n, title=f"t{n}", new=True) for n in range(20)], "c"))
    world.settle()
    rows = world.log.rows("impression")
    assert sorted(r["item_id"] for r in rows) == list(range(20))
    assert all(r["_partition"] == partition_of(r["key"], P) and r["key"] == str(r["user_id"]) for r in rows)
    assert {(r["place"], r["event_time_ms"], r["version"], r["new"]) for r in rows} == {(0, START_MS, None, True)}
    assert world.acks == ["c"]
    assert world.gateway.counts == {"read": 20, "appended": 20, "dead_lettered": 0, "repeated": 0}
    assert world.gateway.buffer_bytes == 0


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"user_id": None}, "no_partition_key"),
        ({"request_id": ""}, "no_request_id"),
        ({"item_id": "seven"}, "bad_type"),
        ({"item_id": True}, "bad_type"),
        ({"item_id": 1.5}, "bad_type"),
        ({"item_id": 2**63}, "bad_type"),
        ({"price": float("nan")}, "bad_type"),
        ({"title": 5}, "bad_type"),
        ({"place": -1}, "bad_type"),
        ({"event_id": [1]}, "bad_type"),
        ({"event_time_ms": START_MS + 3_600_000}, "future"),
        ({"event_time_ms": "now"}, "bad_type"),
        ({"counter.user.click": "many"}, "bad_type"),
        ({"title": "x" * 2_000_000}, "bad_type"),
    ],
)
def test_a_bad_event_is_a_dead_letter_and_its_neighbours_go_on(record: dict[str, Any], reason: str) -> None:
    world = World()
    big = "title" in record and isinstance(record["title"], str)
    world.offer(message("shop.impression", [impression(1), impression(2, **record), impression(3)], "c"))
    if big:
        world = World(batch_bytes=10_000)
        text = "".join(chr(33 + (i * i) % 9_000) for i in range(40_000))
        world.offer(message("shop.impression", [impression(1), impression(2, title=text), impression(3)], "c"))
        reason = "too_large"
    world.settle()
    assert sorted(r["event_id"] for r in world.log.rows()) == ["e1", "e3"]
    (letter,) = world.log.letters()
    assert (letter.reason, letter.tag, letter.origin) == (reason, "shop.impression", "10.0.0.1")
    assert letter.raw_truncated or msgpack.unpackb(letter.raw)["item_id"] in (2, record.get("item_id"))
    assert world.acks == ["c"]
    assert world.gateway.counts == {"read": 3, "appended": 2, "dead_lettered": 1, "repeated": 0}


def test_other_refusals_have_their_own_reasons() -> None:
    world = World()
    world.offer(message("shop.cart", [{"a": 1}], "c1"))
    world.offer(message("shop.order", [{"request_id": "r", "user_id": 1, "extra": 1}], "c2"))
    world.offer(message("shop.impression", ["text", impression(1)], "c3"))
    world.offer(Message("shop.impression", b"", "c4", problem="cut off", raw=b"\xff" * 99_999))
    world.settle()
    letters = {letter.reason: letter for letter in world.log.letters()}
    assert sorted(letters) == ["bad_chunk", "bad_type", "undeclared", "unknown_field"]
    assert letters["undeclared"].time_ns == START_MS * 10**6
    assert letters["undeclared"].detail == (
        "no declared event has this tag; there are 'shop.click', 'shop.impression', 'shop.order'."
    )
    assert letters["bad_chunk"].raw_truncated
    assert len(letters["bad_chunk"].raw) == IngestConfig().dead_letter_bytes
    assert sorted(world.acks) == ["c1", "c2", "c3", "c4"]
    assert world.counts.totals["events_dead_lettered_total:undeclared"] == 1
    assert world.gateway.counts["read"] == 4  # The undeclared one is nobody's.


def test_a_misspelt_tag_and_a_refused_field_name_what_is_meant() -> None:
    world = World()
    world.offer(message("shop.imprssion", [impression(1)], "c1"))
    world.offer(message("shop.order", [{"request_id": "r", "user_id": 1, "ser_id": 1}], "c2"))
    world.settle()
    details = {letter.reason: letter.detail for letter in world.log.letters()}
    assert details["undeclared"].endswith(" Did you mean 'shop.impression'?")
    assert details["unknown_field"] == (
        "undeclared fields ['ser_id']; declare them, or set unknown='drop' or 'keep'. Did you mean 'user_id'?"
    )


def test_a_dropped_field_is_told_once_with_the_one_that_is_meant(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    for second in range(3):
        records = [impression(10 * second + n, time=START_MS, itemid=7, **{"counter.old.click": 1.0}) for n in range(2)]
        world.offer(message("shop.impression", records, f"c{second}"))
        world.settle()
        world.clock.ms += 2_000
    assert len(world.log.rows()) == 6 and not world.log.letters()
    assert [r.getMessage() for r in caplog.records if "field of event" in r.getMessage()] == [
        "field of event 'shop.impression': 'itemid' is not declared. Did you mean 'item_id'? It is left out "
        "(unknown='drop', docs/events.md).",
        "field of event 'shop.impression': 'time' is not declared. Did you mean 'event_time_ms', Unix time in "
        "milliseconds? It is left out (unknown='drop', docs/events.md).",
    ]
    assert world.counts.totals["unknown_fields_total:impression:time"] == 3


def test_text_that_is_not_utf8_is_kept_but_decides_nothing() -> None:
    world = World()
    records = [impression(1, title=b"caf\xe9"), impression(2, request_id=b"\xff"), impression(3, title=b"bin")]
    world.offer(message("shop.impression", records, "c"))
    world.settle()
    assert [(r["event_id"], r["title"]) for r in sorted(world.log.rows(), key=lambda r: r["event_id"])] == [
        ("e1", "caf\ufffd"),
        ("e3", "bin"),
    ]
    assert [letter.reason for letter in world.log.letters()] == ["bad_type"]


def test_no_ack_before_the_receipt_and_a_broker_away_loses_nothing() -> None:
    world = World()
    world.log.away = True
    world.offer(message("shop.impression", [impression(1)], "c1"))
    world.settle(1_000)
    assert world.acks == []
    assert world.gateway.buffer_bytes > 0
    world.log.away = False
    world.settle()
    assert world.acks == ["c1"]
    assert len(world.log.rows()) == 1
    assert len(world.log.promises()) < 10 * P, "a broker that is away is not flooded with punctuation"


def test_a_chunk_again_on_a_new_connection_counts_once_and_on_the_same_one_twice() -> None:
    world = World()
    content = [{"request_id": "r", "user_id": 1, "item_id": 1}]
    same = message("shop.impression", content, content_hash(content))
    first, second = Peer("10.0.0.1"), Peer("10.0.0.1")
    world.offer(same, first)
    world.offer(same, second)
    assert world.acks == [], "a repeat of what is still on its way waits for it"
    world.settle()
    world.offer(same, Peer("10.0.0.1"))
    assert world.acks == [same.chunk] * 3
    assert len(world.log.rows()) == 1
    world.offer(same, first)
    world.offer(same, Peer("10.0.0.2"))
    world.settle()
    assert len({r["event_id"] for r in world.log.rows()}) == 3
    assert world.gateway.counts == {"read": 5, "appended": 3, "dead_lettered": 0, "repeated": 2}


@pytest.mark.parametrize("chunk", ["chunk-A", "Zg+vYFXGZf9M/05Q4Ck/4A==\n", "AAAAAAAAAAAAAAAAAAAAAA=="])
def test_a_chunk_again_from_a_new_address_counts_once(chunk: str) -> None:
    world = World()
    content = [{"request_id": "r", "user_id": 1, "item_id": 1}]
    for origin in ("10.0.0.1", "10.0.0.2"):
        world.offer(message("shop.impression", content, chunk), Peer(origin))
        world.settle()
    # A client that only counts its chunks: the same id, and other events.
    world.offer(message("shop.impression", [*content, *content], chunk), Peer("10.0.0.3"))
    world.settle()
    assert world.acks == [chunk] * 3
    assert world.gateway.counts == {"read": 4, "appended": 3, "dead_lettered": 0, "repeated": 1}
    assert len({r["event_id"] for r in world.log.rows()}) == 3


def test_events_of_several_types_may_have_one_id() -> None:
    world = World()
    one = {"event_id": 17, "request_id": "r", "user_id": 7}
    for tag in ("shop.impression", "shop.click", "shop.order") * 2:
        world.offer(message(tag, [one]))
        world.settle()
    assert [(r["_type"] or r["_kind"], r["event_id"]) for r in world.log.rows()] == [
        ("impression", "17"),
        ("click", "17"),
        ("order", "17"),
    ]
    assert world.gateway.counts["repeated"] == 3


def test_the_same_chunk_id_under_another_tag_is_another_chunk() -> None:
    world = World()
    content = [{"request_id": "r", "user_id": 1, "item_id": 1}]
    world.offer(message("shop.impression", content, "hash"))
    world.offer(message("shop.click", content, "hash"))
    world.settle()
    assert [r["_kind"] for r in world.log.rows()] == ["impression", "feedback"]


def test_an_event_id_again_in_another_chunk_is_repeated_and_acked_after_the_first() -> None:
    world = World()
    world.log.away = True
    world.offer(message("shop.impression", [impression(1)], "c1"))
    world.offer(message("shop.impression", [impression(1), impression(2)], "c2"))
    world.settle()
    assert world.acks == []
    world.log.away = False
    world.settle()
    assert sorted(world.acks) == ["c1", "c2"]
    assert world.gateway.counts == {"read": 3, "appended": 2, "dead_lettered": 0, "repeated": 1}


def test_a_refused_event_may_be_offered_again_under_its_id() -> None:
    world = World()
    world.offer(message("shop.impression", [impression(1, item_id="x")], "c1"))
    world.settle()
    world.offer(message("shop.impression", [impression(1)], "c2"))
    world.settle()
    assert [r["event_id"] for r in world.log.rows()] == ["e1"]


def test_signals_that_are_no_logs_are_acked_and_skipped() -> None:
    world = World()
    world.offer(Message("m", b"", "c", signal=1))
    assert world.acks == ["c"]
    world.settle()
    assert world.log.rows() == world.log.letters() == []


def test_batches_keep_their_bounds() -> None:
    world = World(batch_rows=10, batch_bytes=4_000)
    world.offer(message("shop.impression", [impression(n, title=f"{n * 7919}" * 40) for n in range(95)], "c"))
    world.settle()
    records = [(value, headers) for _, value, headers in world.log.records["events"] if headers["kind"] == "impression"]
    assert len(world.log.rows()) == 95
    assert max(len(value) for value, _ in records) <= 4_000
    numbers = [(p, int(h["seq"])) for p, _, h in world.log.records["events"]]
    assert all([s for q, s in numbers if q == p] == sorted({s for q, s in numbers if q == p}) for p in range(P))


def test_nothing_is_promised_until_shippers_had_time_to_reconnect() -> None:
    world = World(grace_ms=500)
    world.settle(2)
    begin_ms = world.clock.ms
    while not world.log.promises():
        world.settle(1)
        assert world.clock.ms - begin_ms < 60_000
    assert world.clock.ms - begin_ms >= 400


def test_punctuation_waits_for_the_oldest_event_and_ends_with_a_goodbye() -> None:
    world = World(batch_ms=1_000)
    old = START_MS - 5_000
    world.log.away = True
    world.offer(message("shop.impression", [impression(1, event_time_ms=old)], "c"))
    world.settle(60)
    world.log.away = False
    world.settle(1)
    (event,) = world.log.rows()
    at, _, promise = next(found for found in world.log.promises() if found[1] == event["_partition"])
    assert promise.time_ms == old, "an event that Kafka has not confirmed holds the promise to its partition"
    kinds = [
        headers["kind"] for partition, _, headers in world.log.records["events"] if partition == event["_partition"]
    ]
    assert kinds.index("impression") < kinds.index("punctuation"), at
    while not world.gateway.drained():
        world.settle(1)
    world.gateway.goodbye()
    world.log.poll(0)
    last = {partition: promise for _, partition, promise in world.log.promises()}
    assert sorted(last) == list(range(P))
    assert all(p.bye and p.time_ms == world.clock.ms for p in last.values())
    assert last[0].counts == {"read": 1, "appended": 1, "dead_lettered": 0, "repeated": 0}


def test_a_shut_tag_stays_shut_for_http_while_another_anonymous_chunk_is_open() -> None:
    world = World(dead_letter_events_min=10, dead_letter_probe_ms=60_000)
    world.offer(message("shop.click", [{"request_id": "r", "user_id": "x"}] * 20))
    world.settle()
    world.log.away = True
    world.offer(message("shop.impression", [impression(1)]))
    without_key = message("shop.click", [{"request_id": "r", "user_id": 1}])
    assert not world.gateway.offer(without_key, 100, Peer("10.0.0.1"), None, refusable=True)
    assert world.gateway.offer(without_key, 100, Peer("10.0.0.2"), None, refusable=True), "another origin passes"


def test_a_chunk_in_which_a_fault_of_ours_was_met_is_taken_when_it_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    told = world.gateway._dead_letter

    def fails(*what: Any, **how: Any) -> None:
        if how["event_id"].endswith("/1"):
            raise MemoryError
        told(*what, **how)

    chunk = message("nobody.declares", [{"n": 0}, {"n": 1}], "c")
    with monkeypatch.context() as patch:
        patch.setattr(world.gateway, "_dead_letter", fails)
        with pytest.raises(MemoryError):
            world.offer(chunk)
    assert world.gateway.buffer_bytes == 0 and world.gateway.open_chunks == 0
    world.settle()
    assert world.acks == [], "half of it is no ack"
    world.offer(chunk)
    world.settle()
    assert world.acks == ["c"] and len({letter.event_id for letter in world.log.letters()}) == 2


def test_a_client_that_gives_no_receipt_stops_the_gateway_and_a_pause_of_the_process_does_not() -> None:
    world = World()
    world.log.away = True
    world.offer(message("shop.impression", [impression(1)], "c"))
    world.settle()
    world.clock.ms += 3_600_000
    world.settle()
    with pytest.raises(Unavailable, match=r"a receipt of Kafka's client.* has not come for 33\d s"):
        for _ in range(400):
            world.clock.ms += 1_000
            world.gateway.tick()
    assert world.acks == []


def test_a_queue_that_stays_full_stops_the_gateway() -> None:
    world = World()
    world.log.send = full  # type: ignore[method-assign]
    world.offer(message("shop.impression", [impression(1)], "c"))
    with pytest.raises(Unavailable, match="room in the producer's queue has not come"):
        for _ in range(400):
            world.clock.ms += 1_000
            world.gateway.tick()


def full(*_what: Any, **_how: Any) -> None:
    raise Overloaded("full")


def test_the_median_delay_of_each_type_of_feedback_is_told() -> None:
    world = World()
    shown: dict[str, float] = {}
    world.counts.set = lambda name, value, **labels: shown.__setitem__(  # type: ignore[method-assign]
        f"{name}:{labels.get('type')}", value
    )
    world.offer(message("shop.impression", [impression(n, event_time_ms=START_MS - 3_600_000) for n in range(3)], "i"))
    world.settle()
    assert not [name for name in shown if name.startswith("feedback_delay_seconds")], "impressions are none"
    for nth, late_ms in enumerate((1_000, 6_000_000, 7_000_000, 6_000_000, 6_000_000)):
        click = {"request_id": "r", "user_id": 1, "event_time_ms": world.clock.ms - late_ms}
        world.offer(message("shop.click", [click], f"c{nth}"))
        world.settle()
    assert shown["feedback_delay_seconds:click"] == pytest.approx(6_000, abs=1)


def test_the_delay_is_that_of_the_newest_and_never_below_zero() -> None:
    delay = FeedbackDelay()
    assert delay.note("click", np.full(1_024, 0), 60_000) == 60
    assert delay.note("click", np.full(700, 70_000), 60_000) == 0, "dated ahead"
    assert delay.note("like", np.array([59_000]), 60_000) == 1
