"""Goal: steps that are recorded as a group while others are learnt are learnt once, in order, wherever a process ends.

Method: a backlog, a small batch and a checkpoint every few steps, so that groups are recorded, learnt and checkpointed
in the middle. The thread that records a group is one whose time comes from a seed: at once, late, or when it is waited
for. Every call of the log's writer and of the store is numbered; one of them fails or is the last that the process
makes, before or after it took effect. Checked from outside after every turn: no step is learnt that is not recorded, no
step is recorded twice, and no checkpoint's `steps_offset` lies behind a step that it does not contain. At the end each
sample was taken once, and a replay of the recorded steps has the digest.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import pytest
from trainer_world import PARTITIONS, PROJECT, TOPICS, Killed, World, cut, lake_of, send

from headrace.backends.log.fenced_memory import FencedMemory
from headrace.contract.config import TrainConfig
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.steps import Step, decode_step
from headrace.replay.as_trained import as_trained
from headrace.trainer.bounds import Stopped
from headrace.trainer.commit.ahead import StepsAhead
from headrace.trainer.commit.checkpoint import stored_checkpoints
from headrace.trainer.commit.steps import StepsLog
from headrace.trainer.run import Trainer

MODEL, COUNT, STORED = PROJECT.name, 70, 2
SHORT = msgspec.structs.replace(PROJECT, recipe=msgspec.structs.replace(PROJECT.recipe, batch_rows=8))
CONFIG = TrainConfig(wait_ms=20, publish_ms=60, snapshot_ms=900, checkpoint_ms=100, group_steps=5, lake_bytes=1 << 20)
WAYS = ("dies before", "dies after", "fails", "fails after")
CALLS = 50
"""How many numbered calls an undisturbed run makes, at least; a test counts them."""


class Later:
    """A thread that does its work when the seed says so, or when it is waited for."""

    def __init__(self, work: Callable[[], None], rng: Random) -> None:
        self._work, self._rng, self._is_done = work, rng, False

    def is_alive(self) -> bool:
        if not self._is_done and self._rng.random() < 0.4:
            self.join()
        return not self._is_done

    def join(self, timeout_s: float | None = None) -> None:
        if not self._is_done:
            self._work()
            self._is_done = True


class Numbered:
    """Passes calls on and counts them, those of all that share `calls`; one ends as it is told."""

    def __init__(self, inner: Any, counted: tuple[str, ...], calls: list[int], at: int, way: str) -> None:
        self._inner, self._counted, self._calls, self._at, self._way = inner, counted, calls, at, way

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._counted:
            return found

        def call(*args: Any, **named: Any) -> Any:
            self._calls[0] += 1
            if self._calls[0] != self._at:
                return found(*args, **named)
            if self._way.endswith("after"):
                found(*args, **named)
            raise Killed if self._way.startswith("dies") else Unavailable(name)

        return call


def trainer_of(world: World, seed: int, at: int = 0, way: str = "", room: str = "writers") -> tuple[Trainer, list[int]]:
    """Return a trainer whose call of that number ends so, and how many calls it has made."""
    calls, rng = [0], Random(seed)

    def numbered(inner: Any, counted: str, of: str) -> Any:
        return Numbered(inner, tuple(counted.split()), calls, at, way) if of == room else inner

    writer = FencedMemory(world.log, TOPICS.steps, f"steps-{MODEL}", world.epochs)
    changes: dict[str, Any] = {
        "steps_writer": numbered(writer, "open append read", "writers"),
        "blobs": numbered(world.blobs, "put", "writers"),
        "reader": numbered(world.log.reader(), "poll", "readers"),
        "lake": world.lake and numbered(world.lake, "read spans", "readers"),
    }
    trainer = Trainer(world.deps(project=SHORT, config=CONFIG, **changes))
    trainer.ahead._background = True
    trainer.ahead._threads.thread = lambda _, work: Later(work, rng)  # type: ignore[method-assign, assignment, return-value]
    return trainer, calls


def world_of(seed: int, *, stored: bool) -> World:
    world = World(lake=lake_of(seed, STORED, COUNT) if stored else None)
    for partition in range(PARTITIONS):
        for rows, after in cut(seed, partition, COUNT):
            send(world.log, rows, after=after)
    return world


def recorded(world: World) -> list[tuple[int, Step]]:
    return [(r.offset, decode_step(r.value)) for r in world.log.partitions(TOPICS.steps)[0] if r.value]


def look(world: World, trainer: Trainer) -> None:
    """Raise `AssertionError` where what the log and the store hold is not what a trainer may do."""
    steps = recorded(world)
    assert [s.step for _, s in steps] == list(range(1, len(steps) + 1)), "a step is recorded twice, or one is missing"
    assert trainer.learner.step <= len(steps), "a step is learnt that is not recorded"
    for each in stored_checkpoints(world.blobs, MODEL):
        before = [s.step for offset, s in steps if offset < each.steps_offset]
        assert before == list(range(1, each.step + 1)), "a checkpoint's offset is not behind its last step"


def live(world: World, seed: int, at: int = 0, way: str = "", room: str = "writers") -> tuple[Trainer, int, int]:
    """Run trainers until all is learnt; return the last one, how many calls the first one made, and how many died."""
    first_calls = 0
    for deaths in range(3):
        trainer, calls = trainer_of(world, seed + deaths, 0 if deaths else at, way, room)
        try:
            trainer.recover()
            idle = 0
            while idle < 4:
                try:
                    idle = 0 if trainer.turn() else idle + 1
                except Unavailable:
                    idle = 0
                world.clock.advance(0.03)
                look(world, trainer)
            trainer.close()
        except Killed:
            first_calls = first_calls or calls[0]
            continue
        return trainer, first_calls or calls[0], deaths
    raise AssertionError("a restart does not cure it")


def check(world: World, trainer: Trainer) -> None:
    look(world, trainer)
    assert trainer.learner.step == len(recorded(world))
    replayed = as_trained(SHORT, TOPICS, world.log.reader(), world.lake)
    assert replayed.equal is True and replayed.rows == PARTITIONS * COUNT
    again = Trainer(world.deps(project=SHORT, config=CONFIG))
    again.recover()
    assert again.learner.digest() == trainer.learner.digest() == replayed.digest


@pytest.mark.parametrize("stored", [False, True])
def test_groups_are_recorded_while_others_are_learnt(stored):
    """And a checkpoint lies between the steps of a group."""
    world, groups = world_of(1, stored=stored), list[int]()
    append = FencedMemory.append
    trainer, calls = trainer_of(world, 1)
    writer = trainer.deps.steps_writer._inner._inner  # type: ignore[attr-defined]
    writer.append = lambda *values: (groups.append(len(values)), append(writer, *values))
    ahead = 0
    trainer.recover()
    while trainer.turn() or trainer.source.waiting_rows():
        world.clock.advance(0.03)
        look(world, trainer)
        ahead += len(recorded(world)) - trainer.learner.step > 1
    trainer.close()
    assert calls[0] >= CALLS and max(groups) == CONFIG.group_steps and groups[0] == 1 and ahead > 5
    check(world, trainer)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("at", [n if n % 6 == 2 else pytest.param(n, marks=pytest.mark.long) for n in range(1, CALLS)])
def test_a_call_that_fails_or_is_the_last_changes_nothing(at, stored, way):
    world = world_of(at, stored=stored)
    trainer, _, deaths = live(world, at, at, way)
    assert deaths == way.startswith("dies")
    check(world, trainer)


READS = 16
"""How many calls of reader and lake there are at least."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("at", [n if n % 5 == 3 else pytest.param(n, marks=pytest.mark.long) for n in range(1, READS)])
def test_a_reading_that_fails_or_is_the_last_changes_nothing(at, stored, way):
    """Among these are those that read on behind a recorded step, for the group behind it."""
    world = world_of(2, stored=stored)
    trainer, _, deaths = live(world, at, at, way, "readers")
    assert deaths == way.startswith("dies")
    check(world, trainer)


@pytest.mark.parametrize("seed", [n if n < 6 else pytest.param(n, marks=pytest.mark.long) for n in range(300)])
def test_any_number_of_deaths_changes_nothing(seed):
    """Samples come while trainers learn, stop and die, whatever the group's thread is at."""
    rng = Random(seed)
    world = World(lake=lake_of(seed, STORED, COUNT) if seed % 2 else None)
    todo = [r for p in range(PARTITIONS) for r in cut(seed, p, COUNT)]
    todo.sort(key=lambda r: r[0]["event_time_ms"][0].as_py())
    trainer = None
    while todo or trainer is None:
        for rows, after in todo[:4]:
            send(world.log, rows, after=after)
        del todo[:4]
        try:
            if trainer is None:
                trainer, _ = trainer_of(world, rng.randrange(1 << 30), rng.randrange(5, 80), rng.choice(WAYS))
                trainer.recover()
            for _ in range(rng.randint(1, 6)):
                trainer.turn()
                world.clock.advance(rng.choice((0.0, 0.03, 0.2)))
                look(world, trainer)
            if rng.random() < 0.3:
                if rng.random() < 0.5:
                    trainer.close()
                    look(world, trainer)
                trainer = None
        except Killed:
            trainer = None
    last, _, _ = live(world, seed)
    check(world, last)


def test_a_batch_that_is_not_full_waits_for_no_group_and_joins_none():
    """It is recorded alone, in the turn in which it has waited, and only when all before it is learnt."""
    world, begun = World(), list[int]()
    trainer, _ = trainer_of(world, 1)
    begin = trainer.ahead.begin
    trainer.ahead.begin = lambda steps: (begun.append(len(steps)), begin(steps))[1]  # type: ignore[method-assign]
    trainer.recover()
    after = (-1, -1)
    rows, _ = cut(5, 0, COUNT)[0]
    for at in range(4):
        after = send(world.log, rows.slice(at, 1), after=after)
        assert not trainer.turn()
        world.clock.advance(0.025)
        assert trainer.turn() and trainer.learner.step == len(recorded(world)) == at + 1
    assert begun == [0] * 4
    send(world.log, rows.slice(4, 20), after=after)
    full, partial = divmod(min(20, rows.num_rows - 4), 8)
    assert partial
    for done in range(full):
        assert trainer.turn() and trainer.learner.step == 5 + done
    assert len(recorded(world)) == 4 + full


def test_what_is_proposed_and_not_recorded_is_proposed_again_by_the_next_process():
    world = world_of(3, stored=False)
    trainer, _ = trainer_of(world, 3)
    trainer.recover()
    append = trainer.deps.steps_writer.append

    def dies(*values: bytes) -> None:
        if len(values) > 1:
            raise Killed
        append(*values)

    trainer.deps.steps_writer._inner.append = dies  # type: ignore[attr-defined]
    with pytest.raises(Killed):
        world.drain(trainer)
    assert len(recorded(world)) < 9
    last, _, _ = live(world, 3)
    check(world, last)


def test_a_second_trainer_is_noticed_by_the_thread_and_ends_the_process():
    world = world_of(4, stored=True)
    zombie, _ = trainer_of(world, 4)
    zombie.recover()
    zombie.turn()
    heir, _ = trainer_of(world, 5)
    heir.recover()
    with pytest.raises(InvariantBroken, match="another process became the writer"):
        world.drain(zombie)
    with pytest.raises(InvariantBroken, match=r"another process|this process must end"):
        zombie.turn()
    while heir.turn() or heir.source.waiting_rows():
        world.clock.advance(0.03)
    heir.close()
    check(world, heir)


@pytest.mark.parametrize("stored", [False, True])
def test_real_threads_record_and_what_they_meet_ends_the_trainer(stored):
    world = world_of(6, stored=stored)
    trainer = Trainer(world.deps(project=SHORT, config=CONFIG))
    trainer.ahead._background = True
    trainer.recover()
    while trainer.turn() or trainer.source.waiting_rows():
        world.clock.advance(0.03)
        look(world, trainer)
    trainer.close()
    check(world, trainer)
    broken = Trainer(world_of(7, stored=stored).deps(project=SHORT, config=CONFIG))
    broken.ahead._background = True
    broken.recover()
    plain = broken.steps.commit
    broken.steps.commit = lambda *steps: plain(*steps) if len(steps) == 1 else 1 / 0  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        for _ in range(50):
            broken.turn()
    with pytest.raises(ZeroDivisionError):
        broken.turn()


def test_a_stop_ends_the_wait_for_a_group_that_cannot_be_recorded():
    world = world_of(8, stored=True)
    trainer = Trainer(world.deps(project=SHORT, config=CONFIG))
    trainer.ahead._background = True
    trainer.recover()
    trainer.turn()
    trainer.ahead.close(5.0)

    def away(*values: bytes) -> None:
        raise Unavailable("no broker")

    trainer.deps.steps_writer._inner.append = away  # type: ignore[attr-defined]
    while len(recorded(world)) - trainer.learner.step > 1:
        trainer.turn()
    trainer.turn()
    world.stopped = True
    with pytest.raises(Stopped):
        for _ in range(5):
            trainer.turn()
    trainer.close()
    world.stopped = False
    last, _, _ = live(world, 8)
    check(world, last)


def test_an_offset_past_unapplied_steps_is_seen(monkeypatch):
    """Planted: the checkpoint says what was read of the log, not what was learnt of it."""
    plain = Trainer._learn

    def learn(self: Trainer, offset: int, step: Step) -> None:
        plain(self, self.steps.offset - 1, step)

    monkeypatch.setattr(Trainer, "_learn", learn)
    world = world_of(1, stored=True)
    with pytest.raises(AssertionError, match="offset is not behind its last step"):
        live(world, 1)


def test_a_step_that_is_learnt_before_its_record_is_seen(monkeypatch):
    """Planted: a group is given out when its recording begins."""
    plain = StepsAhead.begin

    def begin(self: StepsAhead, steps: list[Step]) -> None:
        plain(self, steps)
        self._recorded.extend((0, step) for step in steps)

    monkeypatch.setattr(StepsAhead, "begin", begin)
    broken = 0
    for seed in range(5):
        with pytest.raises((AssertionError, InvariantBroken)) as caught:
            live(world_of(seed, stored=True), seed)
        broken += "is learnt that is not recorded" in str(caught.value)
    assert broken


def test_a_suffix_that_is_appended_twice_is_seen(monkeypatch):
    """Planted: after an unknown outcome nobody looks what the log holds."""
    plain, opened = StepsLog._note, list[str]()

    def note(self: StepsLog, read: list[Any], steps: Any, found: list[Any]) -> None:
        if not (read and opened):
            plain(self, read, steps, found)
        opened.clear()

    monkeypatch.setattr(StepsLog, "_note", note)
    seen = 0
    for at in range(10, 40):
        world = world_of(1, stored=True)
        trainer, _ = trainer_of(world, 1, at, "fails after")
        writer = trainer.deps.steps_writer._inner  # type: ignore[attr-defined]
        plain_open = writer.open
        writer_open = lambda plain_open=plain_open: (opened.append("open"), plain_open())  # noqa: E731
        trainer.recover()
        writer._inner.open = writer_open
        try:
            while trainer.turn():
                world.clock.advance(0.03)
                look(world, trainer)
        except Unavailable:
            pass  # A look at the log while nothing was learnt.
        except (AssertionError, InvariantBroken) as error:
            seen += "recorded twice" in str(error) or "steps log holds step" in str(error)
        opened.clear()
    assert seen
