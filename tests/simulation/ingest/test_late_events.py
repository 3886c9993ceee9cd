"""Goal: an outage of a day comes through by itself, each event once, and the watermark does not wait for it.

Method: a seed lets a sender spool for a day; part of what it holds was delivered before, and its acks were lost. It
hands all of it to a gateway that remembers nothing, some of it twice. Settlers are killed at any of their effects. Then
the log is joined from its beginning, in several cuts: every impression is one sample with its right label.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import cast

import pytest
from ingest_world import PROJECT, impression
from late_world import CONFIG, LateWorld, P, outcome, wrong
from letters_world import TOPICS

from headrace.backends.clock import SystemClock
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.dead_letters import TOO_LATE, RetryMark, decode_retry_mark, encode_retry_mark
from headrace.contract.formats.events import PUNCTUATION, decode_batch, decode_punctuation
from headrace.ingest.dead_letters.letters import Filter, read_letters, superseded
from headrace.ingest.dead_letters.look_up import LookUp
from headrace.ingest.dead_letters.mark_leases import LEASE_MS
from headrace.ingest.dead_letters.retry import Decision, Report, Retry
from headrace.ingest.dead_letters.settler import Clients, Settler
from headrace.ingest.gateway.admission import Admission
from headrace.replay.ledger.draw import draw_gateways
from headrace.replay.ledger.ledger import Ledger


def outage(seed: int, kills: int) -> tuple[LateWorld, int]:
    """Live through the outage and its end; return the world and how many events the sender gave twice."""
    world = LateWorld(seed)
    random = world.random
    world.pass_time(1_800)
    spool, delivered = [], 0
    for _ in range(random.randint(20, 40)):
        world.pass_time(random.choice([20.0, 1_800.0, 3_600.0]))
        chunks = world.visit()
        spool += chunks
        # They came through, and the acks did not.
        through = [chunk for chunk in chunks if random.random() < 0.3]
        for chunk in through:
            world.send(chunk)
        delivered += len(through)
        if len(chunks) == 2 and len(through) == 1:
            # The other one is a day late: the click finds no impression that waits.
            world.wanted[chunks[0][2][0]["request_id"]] = False
    world.pass_time(86_400 - 3_600 * 12)
    world.restart()
    world.acked.clear()
    again = [chunk for chunk in spool if random.random() < 0.2]
    for chunk in [*spool, *again]:
        world.send(chunk)
        if random.random() < 0.1:
            # Its acks are lost once more.
            world.restart()
    world.turn()
    while left := [chunk for chunk in spool if chunk[0] not in world.acked]:
        # What a killed gateway had not acked.
        for chunk in left:
            world.send(chunk)
        world.turn()
    world.pass_time(30)
    assert {name for name, _, _ in spool} <= world.acked, "it may forget everything"
    newest = max(decode_punctuation(r.value).time_ms for r in world.records() if r.headers["kind"] == PUNCTUATION)
    assert newest > world.clock.now_ms() - 60_000, "nobody waits for late events"
    world.settle_with_kills(kills)
    for _ in range(2):
        # The last windows end.
        world.clock.advance(30.0)
        world.turn()
    return world, delivered


def check(seed: int, kills: int) -> LateWorld:
    world, delivered = outage(seed, kills)
    states, samples = world.join()
    assert wrong(world, samples) == []
    counts = outcome(states)
    assert counts["impressions"] == len(world.wanted) and counts["feedback"] == world.clicks
    assert counts["too_late"] == counts["bad_records"] == 0
    for cut in (2, 7, 1_000):
        assert world.join(cut)[1] == samples, "replay is equal"
    assert delivered == 0 or world.counts.totals["late_settled_total:repeated"] > 0 or kills
    assert closes(world), "read = appended + dead_lettered + repeated"
    return world


def closes(world: LateWorld) -> bool:
    """Draw the ledger's first part, as `take_stock` does."""
    reader = world.log.reader()
    end = reader.end_offsets(TOPICS.dead_letters)[0]
    letters = list(read_letters(reader, TOPICS.dead_letters, end))
    marks = [decode_retry_mark(value) for _, value in world.clients().writer.read(0)]
    fates: dict[str, int] = {}
    for _, fate in superseded(letters, marks):
        fates[fate] = fates.get(fate, 0) + 1
    rows, said = 0, []
    for record in world.records():
        if record.headers["kind"] == PUNCTUATION:
            said.append(decode_punctuation(record.value or b""))
        else:
            rows += decode_batch(record.value or b"").num_rows
    ledger = Ledger()
    draw_gateways(ledger, rows, len(letters), said, fates)
    assert ledger.dead_lettered == 0 and all(letter.content.reason == TOO_LATE for letter in letters)
    return ledger.read == ledger.appended + ledger.dead_lettered + ledger.repeated


@pytest.mark.parametrize("seed", range(3))
def test_an_outage_of_a_day_comes_through_by_itself(seed: int) -> None:
    world = check(seed, kills=0)
    assert world.counts.totals["late_waiting"] == world.counts.totals["late_unknown"] == 0


@pytest.mark.parametrize("seed", range(3, 9))
def test_a_settler_that_is_killed_loses_nothing_and_doubles_nothing(seed: int) -> None:
    check(seed, kills=3)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(9, 150))
def test_an_outage_of_a_day_comes_through_whoever_is_killed(seed: int) -> None:
    check(seed, kills=seed % 6)


def test_without_looking_up_what_came_through_before_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LookUp, "_look_in_log", lambda *_: None)
    with pytest.raises(AssertionError):
        for seed in range(3):
            check(seed, kills=0)


class Waiting:
    """The gateway as a companion sees it, of which the settler needs the time."""

    def now_ms(self) -> int:
        return SystemClock().now_ms()


def companion(world: LateWorld, clients: Callable[[], Clients]) -> Settler:
    return Settler(
        PROJECT,
        CONFIG,
        TOPICS,
        P,
        open_clients=clients,
        metrics=world.counts,
        clock=SystemClock(),
        late=world.late,
    )


async def run_until(settler: Settler, done: Callable[[], bool]) -> None:
    stopping = asyncio.Event()
    task = asyncio.create_task(settler.run(cast(Admission, Waiting()), stopping))
    while not done() and not task.done():
        await asyncio.sleep(0.01)
    stopping.set()
    await task


def test_a_companion_of_the_gateway_settles_and_ends_with_it() -> None:
    world = LateWorld(1)
    chunk = world.visit()[0]
    world.clock.advance(4 * 3_600.0)
    world.send(chunk)
    world.turn()
    settler = companion(world, world.clients)
    asyncio.run(run_until(settler, lambda: world.counts.totals["late_settled_total:new"] > 0))
    assert [decode_batch(r.value or b"").num_rows for r in world.records() if r.headers["kind"] != PUNCTUATION] == [1]


def test_what_nobody_expected_of_a_settler_ends_its_gateway_and_an_outage_does_not() -> None:
    world, tries = LateWorld(1), []

    def away() -> Clients:
        tries.append(1)
        raise Unavailable("no broker")

    asyncio.run(run_until(companion(world, away), lambda: world.counts.totals["errors_total:settler"] > 0))
    assert tries

    def broken() -> Clients:
        raise ValueError("nobody expected this")

    with pytest.raises(ValueError, match="nobody expected this"):
        asyncio.run(run_until(companion(world, broken), lambda: False))


def test_two_settlers_do_not_take_each_others_place() -> None:
    world = LateWorld(1)
    chunks = [world.visit()[0] for _ in range(3)]
    world.clock.advance(4 * 3_600.0)
    for chunk in chunks:
        world.send(chunk)
    world.turn()
    first, second = world.clients(), world.clients()
    first.writer.open()
    mark = RetryMark(step="retrying", run="settler-other", at_ms=world.clock.now_ms())
    first.writer.append(encode_retry_mark(mark))
    settler = world.settler()
    assert settler.turn(second), "the other one is at work: later"
    world.clock.advance(LEASE_MS / 2000)
    first.writer.append(encode_retry_mark(mark))
    assert settler.turn(second), "it has said so again"
    world.clock.advance(LEASE_MS / 1500)
    assert settler.turn(second) and not world.counts.totals["late_settled_total:new"]
    world.clock.advance(LEASE_MS / 3000)
    settler.turn(second)
    assert world.counts.totals["late_settled_total:new"] == 3
    with pytest.raises(InvariantBroken):
        first.writer.append(encode_retry_mark(mark))


def test_a_long_look_up_says_that_it_goes_on() -> None:
    world = LateWorld(1)
    world.send(world.visit()[0])
    late = world.visit()[0]
    world.pass_time(4 * 3_600.0)
    world.send(late)
    world.turn()
    clients, settler = world.clients(), world.settler()

    def slowly() -> None:
        world.clock.advance(LEASE_MS / 2000)

    settler._pause = slowly  # type: ignore[method-assign]
    settler.turn(clients)
    marks = [decode_retry_mark(value) for _, value in clients.writer.read(0)]
    times = [mark.at_ms for mark in marks]
    assert len([mark for mark in marks if not mark.letters and not mark.outcomes]) > 2
    assert max(later - before for before, later in pairwise(times)) < LEASE_MS


def test_a_late_event_that_was_cut_waits_for_the_user() -> None:
    world = LateWorld(1)
    at_ms = world.clock.now_ms() - 5 * 3_600_000
    world.send(("late", "shop.impression", [impression(99_999, title="x" * 700_000, event_time_ms=at_ms)]))
    world.turn()
    clients, settler = world.clients(), world.settler()
    settler.turn(clients)
    wait = world.counts.totals
    assert wait["late_waiting"] == 0 and wait["late_unknown"] == 1
    assert wait["late_settled_total:unknown"] == 1 and settler.turn(clients) is False

    def decided(decide: Decision) -> Report:
        look_up = LookUp(PROJECT, TOPICS, world.log.reader(), None, skew_ms=60_000)
        retry = Retry(
            PROJECT,
            CONFIG,
            TOPICS,
            P,
            producer=world.log.producer(),
            reader=world.log.reader(),
            writer=world.clients().writer,
            clock=world.clock,
            metrics=world.counts,
            run="user",
            look_up=look_up,
        )
        return retry.retry(Filter(), decide)

    assert decided("take").offered == 0, "not all of it is there"
    assert decided("drop").repeated == 1
    world.settler().turn(world.clients())
    assert world.counts.totals["late_unknown"] == 0
