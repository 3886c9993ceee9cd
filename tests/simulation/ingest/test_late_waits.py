"""Goal: no late event waits for what it need not wait for, nor for ever: wrong clocks, a lake away, retention, kills.

Method: late events in the world of `late_world`, its clock turned by hand; each test brings one trouble.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from ingest_world import PROJECT, START_MS, impression, message
from late_world import HOUR_MS, Ids, LateWorld, State, wrong
from letters_world import TOPICS, World

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.clock import VirtualClock
from headrace.backends.log.fenced_memory import FencedMemory
from headrace.cli.stored_ids import JoinedInStore
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.dead_letters import TOO_LATE, RetryMark, encode_retry_mark
from headrace.contract.formats.events import PUNCTUATION
from headrace.ingest.dead_letters import retry as retry_module
from headrace.ingest.dead_letters.letters import Filter, read_letters
from headrace.ingest.dead_letters.mark_leases import LEASE_MS
from headrace.ingest.dead_letters.settler import LEAVE_MS, WAIT_MAX_MS
from headrace.ingest.gateway.admission import Admission
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.stream.join.state import StateWriter

DAY_S = 86_400.0


class Stepped:
    """The world's clock, whose wall clock is off by some time."""

    def __init__(self, clock: VirtualClock, off_ms: int = 0) -> None:
        self.clock, self.off_ms = clock, off_ms

    def now_ms(self) -> int:
        return self.clock.now_ms() + self.off_ms

    def monotonic(self) -> float:
        return self.clock.monotonic()

    def sleep(self, seconds: float) -> None:
        self.clock.sleep(seconds)


def late_by(world: LateWorld, hours: float, count: int = 1) -> None:
    """Hand over impressions of some hours ago, each in a chunk of its own."""
    for _ in range(count):
        world._numbers += 1
        at_ms = world.clock.now_ms() - round(hours * HOUR_MS)
        seen = impression(world._numbers, event_time_ms=at_ms, version="v1")
        world.wanted[f"r{world._numbers}"] = False
        world.send((f"late{world._numbers}", "shop.impression", [seen]))
    world.turn()


def settled(world: LateWorld) -> dict[str, int]:
    return {
        fate: world.counts.totals[f"late_settled_total:{fate}"] for fate in ("new", "repeated", "unknown", "refused")
    }


@pytest.mark.parametrize("off_s", [DAY_S, -DAY_S])
def test_the_clock_of_another_gateway_decides_nothing(off_s: float) -> None:
    world = LateWorld(1)
    late_by(world, 5, 3)
    other = world.clients().writer
    other.open()
    mark = RetryMark(step="retrying", run="settler-other", at_ms=world.clock.now_ms() + round(off_s * 1000))
    other.append(encode_retry_mark(mark))
    settler, clients = world.settler(), world.clients()
    assert settler.turn(clients) and not any(settled(world).values()), "it may be at work"
    world.clock.advance(LEASE_MS / 1000)
    settler.turn(clients)
    assert settled(world)["new"] == 3, "it has said nothing for a lease"


def test_what_a_retry_with_a_clock_behind_has_sent_is_found() -> None:
    class DiesBeforeItSettles(FencedMemory):
        def append(self, value: bytes) -> None:
            if b'"retried"' in value:
                raise KeyboardInterrupt
            super().append(value)

    world = World()
    world.offer("shop.cart", [{"request_id": "r", "user_id": 1}], "c", START_MS // 1000 - 2_400)
    writer = DiesBeforeItSettles(world.log, TOPICS.retries, "retries", world.epochs)
    with pytest.raises(KeyboardInterrupt):
        world.retry(writer=writer, clock=Stepped(world.clock, -HOUR_MS // 2)).retry(Filter())
    rows = len(world.rows())
    assert rows == 1
    assert world.retry().retry(Filter()).found_out == {"appended": 1}
    assert len(world.rows()) == rows


def test_a_mark_of_letters_that_retention_took_is_closed() -> None:
    world = World()
    world.offer("shop.cart", [{"request_id": "r", "user_id": 1}], "c")
    writer = world.writer()
    writer.open()
    writer.append(encode_retry_mark(RetryMark(step="retrying", run="dead", at_ms=0, letters=(0,))))
    world.log.trim(TOPICS.dead_letters, 0, 1)
    assert world.retry().retry(Filter()).found_out == {"open": 1}
    before_s = world.clock.monotonic()
    world.retry().retry(Filter())
    assert world.clock.monotonic() == before_s, "nobody waits for it again"


@pytest.mark.parametrize("step_ms", [24 * HOUR_MS, -24 * HOUR_MS])
def test_a_clock_that_steps_within_a_turn_changes_nothing(step_ms: int) -> None:
    world = LateWorld(1)
    late_by(world, 5, 3)
    clock = Stepped(world.clock)
    settler, clients = world.settler(clock), world.clients()
    settler._hear(cast(Admission, world.gateway))
    pause = settler._pause

    def stepping() -> None:
        clock.off_ms = step_ms
        pause()

    settler._pause = stepping  # type: ignore[method-assign]
    settler.turn(clients)
    assert settled(world) == {"new": 3, "repeated": 0, "unknown": 0, "refused": 0}
    assert world.counts.totals["late_oldest_seconds"] == 0


def test_a_lake_that_is_away_for_a_day_is_waited_for_and_seldom_asked() -> None:
    lake = Ids(set(), None, away=True)
    world = LateWorld(1, stored=lake)
    late_by(world, 5, 3)
    world.forget()
    settler, clients, turns = world.settler(), world.clients(), 0
    reads = []
    clients = clients._replace(writer=Counting(world, reads))
    while world.clock.monotonic() < DAY_S:
        settler.turn(clients)
        turns += 1
        world.clock.advance(60.0)
    assert not any(settled(world).values()) and world.counts.totals["late_waiting"] == 3
    assert world.counts.totals["late_oldest_seconds"] >= DAY_S - 120
    assert turns > 1_400 and 90 < len(reads) < 120, "every 15 minutes after a while"
    lake.away, lake.newest = False, State(10**9)
    for _ in range(16):
        settler.turn(clients)
        world.clock.advance(60.0)
    assert settled(world)["new"] == 3 and world.counts.totals["late_waiting"] == 0


class Counting(FencedMemory):
    """Counts how often it is opened: once a look-up."""

    def __init__(self, world: LateWorld, opened: list[int]) -> None:
        super().__init__(world.log, TOPICS.retries, "retries", world.epochs)
        self.opened = opened

    def open(self) -> None:
        self.opened.append(1)
        super().open()


def test_no_letter_waits_for_the_lake_for_ever() -> None:
    world = LateWorld(1, stored=Ids(set(), None, away=True))
    late_by(world, 5, 2)
    world.forget()
    settler, clients = world.settler(), world.clients()
    settler.turn(clients)
    world.clock.advance(WAIT_MAX_MS / 1000 - 60)
    settler.turn(clients)
    assert not any(settled(world).values())
    world.clock.advance(1_000.0)
    settler.turn(clients)
    assert settled(world)["unknown"] == 2
    assert (world.counts.totals["late_waiting"], world.counts.totals["late_unknown"]) == (0, 2)


def test_what_the_log_can_tell_does_not_wait_behind_what_only_the_lake_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "LOOKED_UP_MAX", 2)
    world = LateWorld(1, stored=Ids(set(), None, away=True))
    late_by(world, 50, 5)
    world.forget()
    world.pass_time(10 * 3_600)
    late_by(world, 5, 1)
    world.settler().turn(world.clients())
    assert settled(world)["new"] == 1 and world.counts.totals["late_waiting"] == 5
    world.settler().turn(world.clients())


def test_letters_that_come_later_do_not_wait_for_the_next_look_at_the_others() -> None:
    lake = Ids(set(), None, away=True)
    world = LateWorld(1, stored=lake)
    late_by(world, 50, 3)
    world.forget()
    world.pass_time(10 * 3_600)
    settler, clients = world.settler(), world.clients()
    for _ in range(40):
        settler.turn(clients)
        world.clock.advance(60.0)
    assert not any(settled(world).values())
    for number in range(1, 4):
        late_by(world, 5, 1)
        settler.turn(clients)
        assert settled(world)["new"] == number
        world.clock.advance(5.0)


def test_what_retention_takes_is_counted_no_longer(caplog: pytest.LogCaptureFixture) -> None:
    lake = Ids(set(), None)
    world = LateWorld(1, stored=lake)
    late_by(world, 5, 2)
    world.forget()
    settler, clients = world.settler(), world.clients()
    settler.turn(clients)
    lake.away = True
    late_by(world, 5, 3)
    settler.turn(clients)
    assert (world.counts.totals["late_waiting"], world.counts.totals["late_unknown"]) == (3, 2)
    world.log.trim(TOPICS.dead_letters, 0, 4)
    world.clock.advance(100.0)
    settler.turn(clients)
    assert (world.counts.totals["late_waiting"], world.counts.totals["late_unknown"]) == (1, 0)
    assert "4 late events" in caplog.text
    world.log.trim(TOPICS.dead_letters, 0, 5)
    settler.turn(clients)
    assert world.counts.totals["late_waiting"] == world.counts.totals["late_oldest_seconds"] == 0


def test_a_decision_that_came_to_nothing_is_no_longer_unknown() -> None:
    world = LateWorld(1, stored=Ids(set(), None))
    late_by(world, 5, 1)
    world.forget()
    settler, clients = world.settler(), world.clients()
    settler.turn(clients)
    assert world.counts.totals["late_unknown"] == 1
    user = world.clients().writer
    user.open()
    for mark in (
        RetryMark(step="retrying", run="user", at_ms=0, letters=(0,)),
        RetryMark(step="retried", run="user-2", at_ms=0, outcomes={0: "open"}),
    ):
        user.append(encode_retry_mark(mark))
    world.clock.advance(100.0)
    settler.turn(clients)
    assert (world.counts.totals["late_waiting"], world.counts.totals["late_unknown"]) == (1, 0)


def test_the_age_of_the_oldest_grows_between_turns() -> None:
    world = LateWorld(1, stored=Ids(set(), None, away=True))
    late_by(world, 5, 1)
    world.forget()
    settler, ahead_ms = world.settler(), 0

    class Later:
        def now_ms(self) -> int:
            return world.clock.now_ms() + ahead_ms

    def seen(seconds: float) -> Callable[[], bool]:
        return lambda: world.counts.totals["late_oldest_seconds"] >= seconds

    settler.turn(world.clients())
    assert not seen(60)()
    ahead_ms = HOUR_MS

    async def main() -> None:
        stopping = asyncio.Event()
        task = asyncio.create_task(settler.run(cast(Admission, Later()), stopping))
        for _ in range(200):
            if seen(3_600)():
                break
            await asyncio.sleep(0.01)
        stopping.set()
        await task

    asyncio.run(main())
    assert seen(3_600)(), "in the gateway's time"


@pytest.mark.parametrize("plain", [False, True])
def test_where_no_more_may_wait_a_chunk_with_a_late_event_anywhere_is_not_taken(plain: bool) -> None:
    world = LateWorld(1)
    world.late.wait(10**9, 0)
    now_ms = world.clock.now_ms()

    def offered(hours_ago: tuple[int, ...]) -> bool:
        records: list[dict[str, Any]] = []
        for hours in hours_ago:
            world._numbers += 1
            records.append(impression(world._numbers, event_time_ms=now_ms - hours * HOUR_MS))
            if plain:
                # A value of another type that means the same: the compiled decoder leaves it to the plain one.
                records[-1]["item_id"] = float(records[-1]["item_id"])
        made = message("shop.impression", records, f"n{world._numbers}", now_ms // 1000)
        return world.gateway.offer(made, 100, Peer("10.0.0.1"), None, refusable=True)

    assert not offered((0, 0, 5)) and not offered((5, 0))
    assert offered((0, 0, 0))


def test_a_settler_that_stands_still_within_its_turn_is_replaced_and_doubles_nothing() -> None:
    for at in range(1, 14):
        world = LateWorld(at)
        chunks = [chunk for _ in range(6) for chunk in world.visit()]
        for chunk in chunks[::2]:
            world.send(chunk)
        # A click whose impression comes late finds nobody that waits, and the other way round.
        through = {chunk[0] for chunk in chunks[::2]}
        for name, tag, records in chunks:
            if tag == "shop.click" and (name in through) != (f"c{name[1:]}" in through):
                world.wanted[records[0]["request_id"]] = False
        world.turn()
        world.pass_time(5 * 3_600)
        world.restart()
        for chunk in chunks:
            world.send(chunk)
        world.turn()
        stands_still(world, at)
        for _ in range(2):
            world.clock.advance(30.0)
            world.turn()
        assert wrong(world, world.join()[1]) == []
        assert world.counts.totals["late_waiting"] == 0


def stands_still(world: LateWorld, at: int) -> None:
    """Let a settler be stopped at its effect `at` until another one has settled everything; then it goes on."""
    first, second, left = world.settler(), world.settler(), at

    class Stops(FencedMemory):
        def append(self, value: bytes) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                clients = world.clients()
                while second.turn(clients):
                    world.clock.advance(5.0)
            super().append(value)

    clients = world.clients()._replace(writer=Stops(world.log, TOPICS.retries, "retries", world.epochs))
    try:
        while first.turn(clients):
            world.clock.advance(5.0)
    except (InvariantBroken, Unavailable):
        pass
    for _ in range(3):
        world.clock.advance(60.0)
        second.turn(world.clients())


def test_a_letter_whose_tag_is_declared_no_longer_is_left_to_others_for_a_while() -> None:
    other = msgspec.structs.replace(
        PROJECT, impression=msgspec.structs.replace(PROJECT.impression, tag="shop.seen")
    ).checked()
    world = LateWorld(1)
    late_by(world, 5, 1)
    settler, clients = world.settler(project=other), world.clients()
    settler.turn(clients)
    assert not any(settled(world).values()), "in a rolling deploy another gateway has the other project"
    world.settler().turn(world.clients())
    assert settled(world)["new"] == 1
    late_by(world, 5, 2)
    world.clock.advance(LEAVE_MS / 1000 + 1)
    while settler.turn(clients):
        world.clock.advance(5.0)
    assert settled(world)["refused"] == 2 and world.counts.totals["late_waiting"] == 0
    reader = world.log.reader()
    letters = list(read_letters(reader, TOPICS.dead_letters, reader.end_offsets(TOPICS.dead_letters)[0]))
    newer = [letter.content for letter in letters[3:]]
    assert [(told.reason, told.retry_of) for told in newer] == [("undeclared", 1), ("undeclared", 2)]


def test_a_retry_on_a_host_whose_clock_is_behind_takes_nothing_old_for_new() -> None:
    world = World()
    world.offer("shop.cart", [{"request_id": "r", "user_id": 1}], "c")
    world.clock.advance(3 * 3_600.0)
    for partition in range(3):
        world.log.append(TOPICS.events, partition, b"{}", None, {"kind": PUNCTUATION})
    behind = Stepped(world.clock, -3 * HOUR_MS)
    assert world.retry(clock=behind).retry(Filter()).refused == {TOO_LATE: 1}, "it is looked up first"


def test_where_only_punctuation_is_left_the_stored_state_of_the_join_settles_it(tmp_path: Path) -> None:
    lake, blobs = Ids({"e1"}, State(0)), FileBlobs(tmp_path)
    world = LateWorld(1, stored=lake)
    clients = world.clients()._replace(joined=JoinedInStore(lambda: blobs, 1))
    late_by(world, 5, 2)
    world.forget()
    settler = world.settler()
    settler.turn(clients)
    assert world.counts.totals["late_waiting"] == 1, "the join has stored nothing yet"
    for hours, waiting in ((0, 1), (3, 0)):
        for _ in range(hours * 60 * 2):
            world.clock.advance(30.0)
            world.turn()
        for partition, state in enumerate(world.join()[0]):
            snapshot = StateWriter(state).take()
            folder = f"state/stream/g1/{partition}"
            blobs.put(f"{folder}/{snapshot.offset:020d}", snapshot.manifest())
            # What cannot be read is passed over, as the join does.
            blobs.put(f"{folder}/{snapshot.offset + 1:020d}", b"torn")
        world.clock.advance(1_000.0)
        settler.turn(clients)
        assert world.counts.totals["late_waiting"] == waiting
    assert settled(world) == {"new": 1, "repeated": 1, "unknown": 0, "refused": 0}


@pytest.mark.parametrize("at", range(1, 12, 2))
def test_retention_within_a_turn_makes_nothing_new_of_what_was_taken(at: int) -> None:
    world = LateWorld(at, stored=Ids({"e1", "e2"}, State(10**9)))
    chunks = [world.visit()[0] for _ in range(4)]
    for chunk in chunks[:2]:
        world.send(chunk)
    world.turn()
    world.pass_time(5 * 3_600)
    world.restart()
    for chunk in chunks:
        world.send(chunk)
    world.turn()
    settler, clients, left = world.settler(), world.clients(), at
    pause = settler._pause

    def deleting() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            world.forget()
            world.log.trim(TOPICS.dead_letters, 0, 1)
        pause()

    settler._pause = deleting  # type: ignore[method-assign]
    for _ in range(4):
        with suppress(InvariantBroken, Unavailable):
            settler.turn(clients)
        world.clock.advance(60.0)
    told = settled(world)
    assert told["new"] == 2 and told["repeated"] in (1, 2) and told["unknown"] == told["refused"] == 0
    assert world.counts.totals["late_waiting"] == 0
