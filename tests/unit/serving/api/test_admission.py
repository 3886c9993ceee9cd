"""Goal: beyond its capacity serving refuses at once what it cannot answer in time, and no kind of request is starved.

Method: one server under virtual time, with arrivals and costs from a seed; and the turns of a real event loop.
"""

from __future__ import annotations

import asyncio
import math
import socket
from random import Random

import pytest

from headrace.backends.clock import VirtualClock
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.errors import BadRequest
from headrace.serving.api.admission import SHORT_BYTES, Admission, Ticket
from headrace.serving.api.turns import Turns

BOUND_S = 0.1
SHORT, LONG = 500, 50_000


class Load:
    """What happened to the requests of one run, by size: seconds from offer to answer, and how many were refused."""

    def __init__(self) -> None:
        self.answered: dict[int, list[float]] = {SHORT: [], LONG: []}
        self.refused: dict[int, int] = {SHORT: 0, LONG: 0}
        self.busy_s = self.ended_s = 0.0

    def share(self, size: int) -> float:
        return len(self.answered[size]) / (len(self.answered[size]) + self.refused[size])

    def p99(self, size: int) -> float:
        times = sorted(self.answered[size])
        return times[math.ceil(0.99 * len(times)) - 1]


def play(
    rate: dict[int, float], cost_s: dict[int, float], *, seed: int, seconds: float = 20.0, slower_at: float = math.inf
) -> Load:
    """Offer requests at `rate` a second by size; from `slower_at` on an answer takes ten times as long."""
    rng, admission, load, now_s = Random(seed), Admission(BOUND_S), Load(), 0.0
    arrivals: list[tuple[float, int]] = []
    for size, each in rate.items():
        at_s = 0.0
        while each and at_s < seconds:
            at_s += rng.expovariate(each)
            arrivals.append((at_s, size))
    arrivals.sort(reverse=True)

    def come(until_s: float) -> None:
        while arrivals and arrivals[-1][0] <= until_s:
            at_s, size = arrivals.pop()
            try:
                admission.offer(size, at_s)
            except BadRequest as error:
                assert error.status == 429 and error.retry_ms >= 1
                load.refused[size] += 1

    while arrivals or len(admission):
        come(now_s)
        ticket: Ticket | None = admission.take(now_s)
        if ticket is None:
            now_s = arrivals[-1][0]
            continue
        try:
            admission.check(ticket, now_s)
        except BadRequest:
            load.refused[ticket.size] += 1
            admission.done(now_s, computed=False)
            continue
        took_s = cost_s[ticket.size] * rng.uniform(0.8, 1.2) * (10.0 if now_s > slower_at else 1.0)
        come(now_s + took_s)
        now_s += took_s
        load.busy_s, load.ended_s = load.busy_s + took_s, now_s
        admission.done(now_s)
        load.answered[ticket.size].append(now_s - ticket.offered_s)
    return load


@pytest.mark.parametrize("seed", range(3))
def test_at_three_times_the_capacity_the_answered_come_within_the_bound_and_no_time_is_idle(seed: int) -> None:
    load = play({SHORT: 0.0, LONG: 300.0}, {LONG: 0.01}, seed=seed)
    assert load.p99(LONG) <= 1.3 * BOUND_S + 0.01
    assert load.busy_s > 0.97 * load.ended_s and 0.30 < load.share(LONG) < 0.37


def test_below_the_capacity_nothing_is_refused() -> None:
    load = play({SHORT: 100.0, LONG: 20.0}, {SHORT: 0.001, LONG: 0.01}, seed=1)
    assert not any(load.refused.values())


@pytest.mark.parametrize("seed", range(3))
def test_short_requests_are_answered_beside_a_flood_of_long_ones(seed: int) -> None:
    """Half of the time would do for 500 short ones a second; there are 100."""
    load = play({SHORT: 100.0, LONG: 90.0}, {SHORT: 0.001, LONG: 0.03}, seed=seed)
    assert load.share(SHORT) > 0.99 and load.p99(SHORT) < BOUND_S
    assert load.share(LONG) > 0.25 and load.p99(LONG) <= 2 * BOUND_S + 0.04


@pytest.mark.parametrize("seed", range(3))
def test_long_requests_are_answered_beside_a_flood_of_short_ones(seed: int) -> None:
    load = play({SHORT: 3_000.0, LONG: 10.0}, {SHORT: 0.001, LONG: 0.03}, seed=seed)
    assert load.share(LONG) > 0.94 and load.share(SHORT) > 0.15
    assert max(load.p99(SHORT), load.p99(LONG)) <= 2 * BOUND_S + 0.04


def test_whatever_an_answer_takes_none_waits_for_more_than_twice_the_bound() -> None:
    load = play({SHORT: 100.0, LONG: 60.0}, {SHORT: 0.001, LONG: 0.01}, seed=1, slower_at=5.0)
    assert max(load.answered[LONG] + load.answered[SHORT]) <= 2 * BOUND_S + 0.12, "0.12 s is what one takes then"
    assert load.refused[LONG]


def test_one_answer_that_stood_still_is_forgotten_within_some_turns() -> None:
    """Compiling takes seconds. Two requests at once are no overload afterwards."""
    admission, now_s, refused = Admission(BOUND_S), 0.0, 0
    for turn in range(40):
        for _ in range(2):
            try:
                admission.offer(LONG, now_s)
            except BadRequest:
                refused += 1
        while admission.take(now_s) is not None:
            now_s += 5.0 if turn == 0 else 0.005
            admission.done(now_s)
        now_s += 0.01
    assert refused <= 20
    admission.offer(LONG, now_s)
    assert admission.wait_s(1, now_s) < 0.02


def test_a_request_whose_time_would_be_over_is_refused_before_it_waits() -> None:
    admission = Admission(BOUND_S)
    admission.offer(LONG, 0.0)
    admission.take(0.0)
    admission.done(0.02)  # An answer takes 20 ms.
    admission.offer(LONG, 1.0, until_s=1.021)
    with pytest.raises(
        BadRequest, match=r"20 ms of its time are left, and an answer takes 40\.0 ms, 20\.0 of them"
    ) as wrong:
        admission.offer(LONG, 1.0, until_s=1.02)
    assert wrong.value.status == 504 and wrong.value.reason == "too_late"
    ticket = admission.take(1.0)
    assert ticket is not None
    admission.check(ticket, 1.0)
    with pytest.raises(BadRequest, match="its time is over"):
        admission.check(ticket, 1.03)


def test_a_size_that_was_not_seen_is_estimated_by_the_nearest_one() -> None:
    admission = Admission(BOUND_S)
    admission.offer(1_000, 0.0)
    admission.take(0.0)
    admission.done(0.001)
    assert admission.offer(8_000, 1.0).cost_s == pytest.approx(0.008)
    assert admission.offer(10, 1.0).cost_s == pytest.approx(0.001)


def turns_of(clock: VirtualClock) -> Turns:
    return Turns(BOUND_S, clock.monotonic, MemoryMetrics())


def test_between_two_answers_the_loop_looks_at_its_sockets() -> None:
    clock, seen = VirtualClock(0), list[str]()
    read_by, writing = socket.socketpair()

    async def ask(name: str, turns: Turns) -> None:
        async with turns.turn(SHORT, since_s=clock.monotonic()):
            seen.append(name)

    async def main() -> None:
        turns, loop = turns_of(clock), asyncio.get_running_loop()
        reading = await asyncio.open_connection(sock=read_by)
        asked = [loop.create_task(ask(str(number), turns)) for number in range(4)]

        async def read() -> None:
            await reading[0].readexactly(1)
            seen.append("socket")

        reader = loop.create_task(read())
        await asyncio.sleep(0)
        writing.send(b"x")
        await asyncio.gather(*asked, reader)
        reading[1].close()

    asyncio.run(main())
    writing.close()
    assert seen[-1] != "socket" and sorted(seen) == ["0", "1", "2", "3", "socket"]


def test_a_client_that_leaves_while_it_waits_holds_nobody_up() -> None:
    clock, seen = VirtualClock(0), list[str]()

    async def ask(name: str, turns: Turns) -> None:
        async with turns.turn(SHORT, since_s=clock.monotonic()):
            seen.append(name)

    async def main() -> None:
        turns, loop = turns_of(clock), asyncio.get_running_loop()
        asked = [loop.create_task(ask(str(number), turns)) for number in range(5)]
        await asyncio.sleep(0)
        asked[1].cancel()
        asked[2].cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await ask("last", turns)

    asyncio.run(main())
    assert seen == ["0", "3", "4", "last"]


def test_one_that_fails_gives_its_turn_on() -> None:
    clock = VirtualClock(0)

    async def main() -> None:
        turns = turns_of(clock)
        with pytest.raises(ValueError, match="told to fail"):
            async with turns.turn(SHORT, since_s=0.0):
                raise ValueError("told to fail")
        async with turns.turn(SHORT, since_s=0.0):
            pass

    asyncio.run(main())


def test_lanes_part_at_some_fifty_candidates() -> None:
    admission = Admission(BOUND_S)
    assert not admission.offer(SHORT_BYTES, 0.0).is_long and admission.offer(SHORT_BYTES + 1, 0.0).is_long
