"""Goal: dead letters offered again after a fix are in the log once each, none lost, wherever the retry is killed.

Method: a seed makes letters (with and without ids, some there twice, some still bad after the fix) and a moment; the
retry dies at that effect, before or after it, with any part of its queue in the broker's hands, again and again, then
one runs to its end. Planted bugs (marks after the offer, no marks, no finding out) must be caught too.
"""

from __future__ import annotations

from contextlib import suppress
from random import Random

import pytest
from ingest_world import START_MS
from letters_world import TOPICS, Dying, DyingProducer, DyingWriter, Killed, World, fill, found

from headrace.contract.errors import InvariantBroken, Overloaded, Unavailable
from headrace.contract.formats.dead_letters import RetryMark, encode_retry_mark
from headrace.ingest.dead_letters.letters import Filter, Letter
from headrace.ingest.dead_letters.mark_leases import LEASE_MS
from headrace.ingest.dead_letters.retry import Report, Retry

ALL = Filter()
EVENT_MS = START_MS - 50_000


def drained(seed: int, kind: type[Retry] = Retry) -> tuple[World, dict[str, int]]:
    """Run retries that die, then one that does not."""
    random = Random(seed)
    world = World()
    wanted = fill(world, random)
    for _ in range(random.randint(1, 4)):
        dying = Dying(random.randint(1, 40), random)
        producer = DyingProducer(world.log.producer(), dying)
        retry = world.retry(kind=kind, producer=producer, writer=DyingWriter(world.log, world.epochs, dying))
        try:
            retry.retry(ALL)
        except Killed:
            world.clock.advance(random.choice([0.0, 3.0, 40.0]))
    world.retry(kind=kind).retry(ALL)
    return world, wanted


def wrong(world: World, wanted: dict[str, int]) -> list[str]:
    """Return what is lost, twice, or in the log though it is bad."""
    have = found(world, wanted)
    return [f"{name}: {have[name]} times, {times} wanted" for name, times in wanted.items() if have[name] != times]


@pytest.mark.parametrize("seed", [*range(75), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(75, 150))])
def test_a_killed_retry_loses_nothing_and_doubles_nothing(seed: int) -> None:
    world, wanted = drained(seed)
    assert wrong(world, wanted) == []
    assert {row["event_time_ms"] for row in world.rows()} == {EVENT_MS}, "the original time, not the retry's"
    states = world.states()
    letters = {letter.offset: letter.content for letter in world.letters()}
    assert set(states.values()) <= {"retried", "refused", "open"}
    for offset, state in states.items():
        newer = [o for o, told in letters.items() if told.retry_of == offset]
        assert bool(newer) == (state == "refused"), "a refused letter is told by a newer one"
        for told in (letters[o] for o in newer):
            assert told.attempts == letters[offset].attempts + 1
            assert (told.raw, told.origin, told.time_ns) == (
                letters[offset].raw,
                letters[offset].origin,
                letters[offset].time_ns,
            )
        if state == "open":
            assert letters[offset].reason in ("bad_type", "no_partition_key")


class MarksAfterOnly(Retry):
    """Planted: steps 3 and 4 the wrong way round."""

    def _take(self, batch: list[Letter], report: Report) -> None:
        fates, reasons = self._offer(batch, self._producer, self._clock.monotonic() + 1_000)
        self._append(RetryMark(step="retried", run=self._run, at_ms=self._clock.now_ms(), outcomes=fates))
        self._tell(batch, fates, reasons, report)


class MarksNothing(Retry):
    """Planted: no marks at all."""

    def _append(self, mark: RetryMark) -> None:
        pass


class FindsNothing(Retry):
    """Planted: step 2 takes the log's word for nothing."""

    def _in_log(self, mark: RetryMark, wanted: set[str]) -> set[str] | None:
        return set()


class TrustsTheMark(Retry):
    """Planted: what a mark names counts as done."""

    def _in_log(self, mark: RetryMark, wanted: set[str]) -> set[str] | None:
        return wanted


@pytest.mark.parametrize("bug", [MarksAfterOnly, MarksNothing, FindsNothing, TrustsTheMark])
def test_planted_bugs_are_caught(bug: type[Retry]) -> None:
    assert any(wrong(*drained(seed, bug)) for seed in range(40))


class TakenOver(Dying):
    """Instead of dying, is paused for a minute at its turn, while another retry runs to its end."""

    def __init__(self, turn: int, random: Random, world: World) -> None:
        super().__init__(turn, random)
        self.world = world

    def step(self, do: object) -> None:
        self.turn -= 1
        if self.turn == 0:
            self.world.retry().retry(ALL)
        assert callable(do)
        do()


@pytest.mark.parametrize("seed", [*range(50), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(50, 100))])
def test_two_retries_at_once_offer_a_letter_once(seed: int) -> None:
    random = Random(seed)
    world = World()
    wanted = fill(world, random)
    paused = TakenOver(random.randint(1, 25), random, world)
    producer = DyingProducer(world.log.producer(), paused)
    with suppress(InvariantBroken, Unavailable):
        world.retry(producer=producer, writer=DyingWriter(world.log, world.epochs, paused)).retry(ALL)
    # What the paused one had in its client's queue may land late: under the same ids, so that the stream counts one.
    producer.die()
    world.retry().retry(ALL)
    once = {row["event_id"]: row["request_id"] for row in world.rows()}
    have = list(once.values())
    assert {name: have.count(name) for name in wanted} == wanted
    assert set(world.states().values()) <= {"retried", "refused", "open"}


def test_a_retry_at_work_is_left_alone() -> None:
    world = World()
    world.offer("shop.cart", [{"request_id": "r", "user_id": 1}], "c")
    first = world.writer()
    first.open()

    class Busy:
        """The world's clock; whenever somebody sleeps, the other retry begins its next batch."""

        def __init__(self) -> None:
            self.number = 0

        def now_ms(self) -> int:
            return world.clock.now_ms()

        def monotonic(self) -> float:
            return world.clock.monotonic()

        def sleep(self, seconds: float) -> None:
            world.clock.sleep(seconds)
            self.mark()

        def mark(self) -> None:
            self.number += 1
            mark = RetryMark(step="retrying", run=f"busy{self.number}", at_ms=world.clock.now_ms(), letters=(0,))
            first.append(encode_retry_mark(mark))

    clock = Busy()
    clock.mark()
    with pytest.raises(Overloaded, match="another retry is at work"):
        world.retry(clock=clock).retry(ALL)
    assert world.rows() == []
    world.clock.advance(LEASE_MS / 1000)
    assert world.retry().retry(ALL).appended == 1
    with pytest.raises(InvariantBroken):
        clock.mark()


def test_a_log_that_no_longer_reaches_back_leaves_the_letter_alone() -> None:
    world = World()
    world.offer("shop.cart", [{"request_id": "r", "user_id": 1}], "c")
    dying = Dying(3, Random(4))
    with pytest.raises(Killed):
        world.retry(
            producer=DyingProducer(world.log.producer(), dying), writer=DyingWriter(world.log, world.epochs, dying)
        ).retry(ALL)
    assert world.states() == {0: "retrying"}
    for _ in range(9):
        for partition in range(3):
            world.log.append(TOPICS.events, partition, b"{}", None, {"kind": "punctuation"})
            world.log.trim(TOPICS.events, partition, 8)
    report = world.retry().retry(ALL)
    assert (report.offered, report.found_out) == (0, {"unknown": 1})
    assert world.states() == {0: "unknown"}
