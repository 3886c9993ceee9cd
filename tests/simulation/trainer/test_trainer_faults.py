"""Goal: whatever a call to the outside does after a step was committed, each sample is learnt once, with equal bits.

Method: a matrix. One axis is every method of the contracts that a trainer calls, the other every way to fail. A process
learns the lake and then the topic; once the step that ends the lake is recorded, the first call of the method fails.
Processes that end are started again, as a supervisor does. A call that never returns is one for which time goes on
until the watch of the calls ends the process. Checked from outside: the recorded steps, a replay of them,
and the digest of a run that nothing disturbed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from trainer_world import PARTITIONS, PROJECT, TOPICS, Killed, Lake, World, cut, ended, lake_of, send

from headrace.backends.log.fenced_memory import FencedMemory
from headrace.backends.log.memory import MemoryReader
from headrace.cli.stage_topics import open_topics
from headrace.contract.config import TrainConfig
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.steps import Step, decode_step
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.fenced import FencedWriter
from headrace.contract.interfaces.lake import LakeReader
from headrace.contract.interfaces.log import Admin, Producer, Reader
from headrace.process.call_watch import LAKE_MAX_S, CallWatch
from headrace.replay.as_trained import as_trained
from headrace.replay.recorded import recorded_steps
from headrace.trainer.bounds import WORK_MAX_S
from headrace.trainer.commit.steps_archive import StepsArchive
from headrace.trainer.run import Trainer

SEED, STORED, COUNT = 2, 2, 80
CONTRACTS = {
    "steps_writer": FencedWriter,
    "lake": LakeReader,
    "reader": Reader,
    "blobs": Blobs,
    "producer": Producer,
    "admin": Admin,
}
NOT_AFTER_A_COMMIT = {
    ("steps_writer", "open"): "only before a step, or when an append failed",
    **{("lake", name): "asked when the lake is opened" for name in ("state", "layout", "spans", "hold")},
    ("lake", "read"): "asked to read on in the lake",
    ("lake", "seals"): "asked by the ledger only",
    ("lake", "imported"): "asked by the ledger only",
    ("admin", "ensure_topics"): "asked by the command before the trainer begins",
    ("admin", "topic_id"): "asked by the command before the trainer begins",
    ("admin", "retention_ms"): "asked by the sink only",
    **{(room, "close"): "the process ends" for room in ("steps_writer", "reader", "producer")},
}
FAILURES = ("unavailable", "unexpected", "no memory", "effect, then unavailable", "effect, then unexpected", "dies",
            "effect, then dies", "never returns", "effect, then never returns")  # fmt: skip
USUAL = ("unavailable", "unexpected", "effect, then unexpected", "effect, then dies", "effect, then never returns")
"""In every run; the others go the same ways through the code and belong to the long ones."""
ERRORS: dict[str, type[BaseException]] = {
    "unavailable": Unavailable,
    "unexpected": RuntimeError,
    "no memory": MemoryError,
    "dies": Killed,
}


def methods(contract: type) -> list[str]:
    """Return what can be called through a contract."""
    return sorted(name for name, value in vars(contract).items() if callable(value) and not name.startswith("_"))


CALLS = [(room, name) for room, contract in CONTRACTS.items() for name in methods(contract)]
CELLS = [call for call in CALLS if call not in NOT_AFTER_A_COMMIT]


class Fault:
    """Makes one call fail, the first one after a number of steps is recorded; `done` says that it happened."""

    def __init__(self, world: World, room: str, method: str, failure: str, *, after_steps: int) -> None:
        self.world, self.room, self.method, self.failure, self.after_steps = world, room, method, failure, after_steps
        self.done = False
        self.calls: CallWatch | None = None
        """The watch of the process that runs now."""

    def around(self, room: str, inner: Any) -> Any:
        return Faulty(inner, self) if room == self.room else inner

    def call(self, act: Callable[..., Any], *args: Any, **named: Any) -> Any:
        if self.done or len(recorded(self.world)) < self.after_steps - (self.method == "append"):
            return act(*args, **named)
        self.done = True
        if self.failure.startswith("effect"):
            act(*args, **named)
        failure = self.failure.removeprefix("effect, then ")
        if failure == "never returns":
            assert self.calls is not None
            self.world.clock.advance(LAKE_MAX_S + 1.0)
            self.calls.look()
            raise AssertionError(f"{self.room}.{self.method} does not return and nobody ends the process")
        raise ERRORS[failure](f"{self.room}.{self.method}")


class Faulty:
    """Passes on every call but the one that fails."""

    def __init__(self, inner: Any, fault: Fault) -> None:
        self._inner, self._fault = inner, fault

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name != self._fault.method:
            return found
        return lambda *args, **named: self._fault.call(found, *args, **named)


class Process:
    """Asks its trainer to stop when all is learnt; time moves on whenever it is asked."""

    def __init__(self, world: World) -> None:
        self.world, self.asked, self.idle = world, 0, 0

    def is_set(self) -> bool:
        self.world.clock.advance(0.03)
        self.asked += 1
        assert self.asked < 1_000, "the trainer waits for ever"
        learnt = sum(r.rows for step in recorded(self.world) for r in step.ranges)
        self.idle += learnt == PARTITIONS * COUNT
        return self.idle > 8


def recorded(world: World) -> list[Step]:
    return recorded_steps(world.log.reader(), TOPICS, archive_of(world))


def archive_of(world: World) -> StepsArchive:
    """Return the steps that were moved to the store: the trainer moves all that three checkpoints have passed."""
    return StepsArchive(world.blobs, TOPICS.steps, world.log.ids[TOPICS.steps])


def whole_world() -> World:
    lake = lake_of(SEED, STORED, COUNT)
    world = World(lake=lake)
    for partition in range(PARTITIONS):
        for rows, after in cut(SEED, partition, COUNT):
            send(world.log, rows, after=after)
    return world


def live(world: World, fault: Fault | None = None) -> tuple[Trainer, int]:
    """Run trainers until all is learnt; return the last one and how many died."""
    for deaths in range(4):
        inner: dict[str, Any] = {
            "steps_writer": FencedMemory(world.log, TOPICS.steps, f"steps-{PROJECT.name}", world.epochs),
            "lake": world.lake,
            "reader": world.log.reader(),
            "blobs": world.blobs,
            "producer": world.log.producer(),
            "admin": world.log.admin(),
        }
        changes = {room: fault.around(room, each) if fault else each for room, each in inner.items()}
        config = TrainConfig(
            wait_ms=20, publish_ms=20, snapshot_ms=100, checkpoint_ms=100, lake_bytes=20_000, steps_moved=1
        )
        calls = CallWatch(world.clock.monotonic, ended, by_itself=False)
        if fault:
            fault.calls = calls
        admin = calls.wrap("admin", changes["admin"])
        changes["open_reader"] = lambda: fault.around("reader", world.log.reader()) if fault else world.log.reader()
        try:
            ids = open_topics(admin, TOPICS, PARTITIONS, ids_of=(TOPICS.samples, TOPICS.steps)).ids
            told = {"samples_id": ids[TOPICS.samples], "steps_id": ids[TOPICS.steps]}
            trainer = Trainer(world.deps(config=config, stop=Process(world), calls=calls, **told, **changes))
            trainer.run()
            return trainer, deaths
        except (Exception, Killed) as error:
            assert not isinstance(error, AssertionError), error
    raise AssertionError("a restart does not cure it")


@pytest.fixture(scope="module")
def undisturbed() -> tuple[str, int, int]:
    """Return the digest, the number of steps, and how many of them took the lake."""
    world = whole_world()
    trainer, _ = live(world)
    steps = recorded(world)
    assert world.log.reader().begin_offsets(TOPICS.steps)[0] > 0, "no step was moved"
    return trainer.learner.digest(), len(steps), sum(s.ranges[0].kind == "stored" for s in steps)


def check(world: World, trainer: Trainer, digest: str, steps: int) -> None:
    assert [s.step for s in recorded(world)] == list(range(1, steps + 1))
    result = as_trained(PROJECT, TOPICS, world.log.reader(), world.lake, archive=archive_of(world))
    assert result.equal is True and result.rows == PARTITIONS * COUNT
    assert trainer.learner.digest() == digest
    again = Trainer(world.deps(steps_id=world.log.ids[TOPICS.steps]))
    again.recover()
    assert again.learner.digest() == digest


@pytest.mark.parametrize("failure", [f if f in USUAL else pytest.param(f, marks=pytest.mark.long) for f in FAILURES])
@pytest.mark.parametrize(("room", "method"), CELLS, ids=[f"{room}.{name}" for room, name in CELLS])
def test_a_call_that_fails_after_the_commit_of_the_lakes_last_step(room, method, failure, undisturbed):
    digest, steps, stored = undisturbed
    world = whole_world()
    fault = Fault(world, room, method, failure, after_steps=stored)
    trainer, deaths = live(world, fault)
    assert fault.done, f"{room}.{method} is not called after a commit: say so in NOT_AFTER_A_COMMIT"
    assert deaths <= 1
    check(world, trainer, digest, steps)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_piece_of_the_lake_that_cannot_be_read(failure, undisturbed):
    """The lake is read piece by piece: one comes after every few steps."""
    digest, steps, stored = undisturbed
    world = whole_world()
    fault = Fault(world, "lake", "read", failure, after_steps=stored - 2)
    trainer, deaths = live(world, fault)
    assert fault.done and deaths <= 1
    check(world, trainer, digest, steps)


@pytest.mark.parametrize(("room", "method"), sorted(c for c in NOT_AFTER_A_COMMIT if c[1] != "close"))
def test_what_is_said_not_to_be_called_after_a_commit_is_not(room, method, undisturbed):
    """Among these is the lake: at the hand-over to the topic nobody asks it."""
    world = whole_world()
    fault = Fault(world, room, method, "unexpected", after_steps=undisturbed[2])
    _, deaths = live(world, fault)
    assert not fault.done and deaths == 0


@pytest.mark.parametrize(("room", "method"), CALLS, ids=[f"{room}.{name}" for room, name in CALLS])
def test_a_call_of_the_start_that_never_returns_ends_the_process(room, method, undisturbed):
    """Among these are the claim, the checkpoints, the steps and the lake, and, of `close`, the end."""
    digest, steps, _ = undisturbed
    world = whole_world()
    fault = Fault(world, room, method, "never returns", after_steps=0)
    trainer, deaths = live(world, fault)
    assert deaths == fault.done
    check(world, trainer, digest, steps)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("method", [method for method in methods(Admin) if ("admin", method) in NOT_AFTER_A_COMMIT])
def test_a_call_of_the_admin_at_the_start_that_fails(method, failure, undisturbed):
    digest, steps, _ = undisturbed
    world = whole_world()
    fault = Fault(world, "admin", method, failure, after_steps=0)
    trainer, deaths = live(world, fault)
    assert deaths == fault.done == (("admin", method) != ("admin", "retention_ms"))
    check(world, trainer, digest, steps)


@pytest.mark.long
@pytest.mark.parametrize("after", range(8))
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(("room", "method"), CALLS, ids=[f"{room}.{name}" for room, name in CALLS])
def test_a_call_that_fails_after_any_step(room, method, failure, after, undisturbed):
    digest, steps, _ = undisturbed
    world = whole_world()
    trainer, deaths = live(world, Fault(world, room, method, failure, after_steps=after))
    assert deaths <= 1
    check(world, trainer, digest, steps)


def test_no_call_of_a_contract_is_left_out():
    """A new method has a row without anyone remembering, and an exception that nobody calls any more is noticed."""
    assert set(NOT_AFTER_A_COMMIT) <= set(CALLS)
    assert len(CALLS) == sum(len(methods(contract)) for contract in CONTRACTS.values())
    for contract in CONTRACTS.values():
        assert "__protocol_attrs__" not in vars(contract) or set(methods(contract)) == contract.__protocol_attrs__


def test_no_step_is_applied_before_its_record_was_read_back():
    """Whenever the trainer asks the log for the record that it wrote, the model is still without that step."""
    world = whole_world()
    seen: list[tuple[int, int]] = []

    class Watched(FencedMemory):
        def read(self, offset: int, wait_s: float = 0.0) -> list[tuple[int, bytes]]:
            found = super().read(offset, wait_s)
            if trainer is not None:
                seen.extend((decode_step(value).step, trainer.learner.step) for _, value in found)
            return found

    trainer: Trainer | None = None
    writer = Watched(world.log, TOPICS.steps, f"steps-{PROJECT.name}", world.epochs)
    trainer = Trainer(world.deps(steps_writer=writer))
    trainer.recover()
    world.drain(trainer)
    assert [step for step, _ in seen] == [s.step for s in recorded(world)] and len(seen) > 5
    assert all(applied < step for step, applied in seen)


def test_a_step_that_was_not_learnt_is_followed_by_none():
    """Even where its failure is swallowed, the trainer takes no other step and stores nothing."""
    world = whole_world()
    trainer = Trainer(world.deps())
    trainer.recover()

    def fail(_: object) -> None:
        raise Unavailable("the store is away")

    trainer.source.take = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(InvariantBroken, match="is recorded and was not learnt"):
        trainer.turn()
    before, steps = sorted(world.blobs.objects), recorded(world)
    with pytest.raises(InvariantBroken, match="this process must end"):
        world.drain(trainer)
    trainer.close()
    assert recorded(world) == steps and sorted(world.blobs.objects) == before and trainer.learner.step == 0


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, InvariantBroken])
def test_what_the_snapshot_thread_meets_ends_the_trainer(error):
    """The store raises what nobody expected in the background; the training thread raises it."""
    world = whole_world()

    def put(name: str, data: bytes) -> None:
        raise error("from the thread")

    world.blobs.put = put  # type: ignore[method-assign]
    trainer = Trainer(world.deps(background=True, stop=Process(world)))
    with pytest.raises(error, match="from the thread"):
        trainer.run()


def test_learning_that_stands_still_ends_the_process():
    """Not a call of the outside: the learner itself does not come back."""
    world = whole_world()
    calls = CallWatch(world.clock.monotonic, ended, by_itself=False)
    trainer = Trainer(world.deps(stop=Process(world), calls=calls))

    def learn(_: object) -> None:
        world.clock.advance(WORK_MAX_S + 1.0)
        calls.look()

    trainer.learner.learn = learn  # type: ignore[method-assign, assignment]
    with pytest.raises(Killed, match=r"learning after step 0 has not come back for 1801 s"):
        trainer.run()


def test_a_log_that_answers_and_sends_nothing_of_a_recorded_step_ends_the_process():
    """An open transaction keeps the samples back: the end of what a reader sees lies before them, and nothing fails."""

    class Mute(MemoryReader):
        def poll(self, records_max: int, timeout_s: float) -> list[Any]:
            is_muted = any(topic == TOPICS.samples for topic, _ in self._next)
            return [] if is_muted else super().poll(records_max, timeout_s)

    world = World()
    for rows, after in cut(SEED, 0, COUNT):
        send(world.log, rows, after=after)
    trainer = Trainer(world.deps())
    trainer.recover()
    world.drain(trainer)
    world.blobs.objects.clear()
    again = Trainer(world.deps(reader=Mute(world.log)))
    with pytest.raises(Unavailable, match=r"did not come in 330 s, though the broker answers; .* offsets \{0: 0"):
        again.recover()


def test_a_lake_that_is_away_at_the_hand_over_delays_nothing():
    """The lease is given back when the store is back; learning asks the lake nothing once it is open."""

    class Away(Lake):
        calls = 0

        def let_go(self, holder: str) -> None:
            Away.calls += 1
            if Away.calls < 3:
                raise Unavailable("NameNode restarts")

    world = whole_world()
    lake = world.lake
    assert lake is not None
    world.lake = Away(lake.rows, lake.positions, lake.next_offsets)
    trainer, deaths = live(world)
    assert deaths == 0 and Away.calls == 3 and trainer.learnt == PARTITIONS * COUNT
