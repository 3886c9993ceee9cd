"""Goal: a state is stored only after what was sent with it has arrived, and is acknowledged only after it is stored.

Method: the four steps, by hand, with a producer whose receipts the test gives and a store that may be away.

1. Snapshot: take the state at its offsets, and count the records that were sent up to then.
2. Deliver: wait until all of these records have their receipts.
3. Store: put the snapshot's new parts, then its manifest, which makes it whole.
4. Acknowledge: let Faust commit up to the snapshot's offsets. Then delete the manifests that are too many, and the
   parts that only they needed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from join_world import PROJECT
from stream_world import CONFIG, Blobs, QuickStore

from headrace.backends.clock import VirtualClock
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.errors import InvariantBroken, Overloaded, Unavailable
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Pieces
from headrace.process.waits import RECEIPT_MAX_S, Waits
from headrace.stream.join.state import Damaged
from headrace.stream.shell.dependencies import StageDependencies
from headrace.stream.shell.durable_state import DurableState, Outgoing, StateSnapshot, await_stored


class Producer:
    """Takes records while it has room; the test gives the receipts."""

    def __init__(self) -> None:
        self.sent: list[Outgoing] = []
        self.receipts: list[Callable[[Exception | None, int], None]] = []
        self.room = 100
        self.ends: Counter[tuple[str, int]] = Counter()

    def send(self, topic, partition, value, *, key=None, headers=None, delivered=None) -> None:
        if len(self.sent) >= self.room:
            raise Overloaded("full")
        self.sent.append(Outgoing(topic, partition, value, key, headers))
        offset = self.ends[topic, partition]
        self.ends[topic, partition] += 1
        self.receipts.append(lambda error, _: delivered(error, offset))

    def poll(self, timeout_s: float) -> None:
        """Nothing comes by itself."""

    def deliver(self, error: Exception | None = None) -> None:
        """Give every record that waits its receipt."""
        while self.receipts:
            self.receipts.pop(0)(error, 0)


class FailingBlobs(Blobs):
    """A store that can fail, and remembers what was put in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: Exception | None = None
        self.puts: list[str] = []

    def put(self, name: str, data: bytes | Pieces) -> None:
        if self.fault is not None:
            raise self.fault
        self.puts.append(name)
        super().put(name, data)


class Owner:
    """A stage that remembers what it is told."""

    name = "stream"

    def __init__(self) -> None:
        self.acknowledged: list[Mapping[int, int]] = []
        self.failures: list[Exception] = []

    def acknowledge(self, offsets: Mapping[int, int]) -> None:
        self.acknowledged.append(offsets)

    def fail(self, error: Exception) -> None:
        self.failures.append(error)


class World:
    """A state of one partition, with all that it depends on."""

    def __init__(self, *, begin_afresh: bool = False) -> None:
        self.producer, self.blobs, self.owner = Producer(), FailingBlobs(), Owner()
        self.metrics, self.clock = MemoryMetrics(), VirtualClock()
        self.deps = StageDependencies(
            project=PROJECT,
            config=CONFIG,
            topics=Topics(),
            producer=self.producer,
            blobs=self.blobs,
            metrics=self.metrics,
            clock=self.clock,
            begin_afresh=begin_afresh,
        )
        self.waits = Waits(self.clock)
        self.durable = self.new_durable()

    def new_durable(self) -> DurableState:
        """Return the state as a new worker knows it."""
        store = QuickStore(self.blobs, self.waits)
        return DurableState(
            *(self.deps, store, self.owner), folder="state", parts_folder="parts", every_ms=1_000, first_ms=500
        )

    def begin(self, offset: int, *parts: str, needed: tuple[str, ...] = ()) -> None:
        """Begin a snapshot at an offset, with new parts and those needed besides."""
        encoders = {name: name.encode for name in parts}
        snapshot = StateSnapshot({0: offset}, f"{offset:020d}", b"manifest".upper, encoders, (*parts, *needed))
        self.durable.begin({0: offset}, lambda: snapshot)

    async def stored(self, offset: int, *parts: str, needed: tuple[str, ...] = ()) -> None:
        """Store a snapshot, to its end."""
        self.begin(offset, *parts, needed=needed)
        self.producer.deliver()
        await await_stored([self.durable], self.producer)


async def turns() -> None:
    """Let everything happen that can."""
    for _ in range(5):
        await asyncio.sleep(0.006)


def records(count: int) -> list[Outgoing]:
    return [Outgoing("samples", 0, str(number).encode()) for number in range(count)]


def test_deliver_then_store_then_acknowledge() -> None:
    async def run() -> None:
        world = World()
        await world.durable.send(2, records(2))
        world.begin(7, "a")
        await world.durable.send(1, records(1))
        await turns()
        assert (world.blobs.puts, world.owner.acknowledged) == ([], [])
        world.producer.receipts.pop(0)(None, 0)
        await turns()
        assert world.blobs.puts == [], "one of the two has no receipt yet"
        world.producer.receipts.pop(0)(None, 1)
        await turns()
        assert world.blobs.puts == ["parts/a", f"state/{7:020d}"], "the third was sent after the snapshot"
        assert world.owner.acknowledged == [{0: 7}]
        assert world.metrics.total("state_snapshots_total") == 1

    asyncio.run(run())


def test_a_record_that_waits_for_room_holds_the_snapshot_back() -> None:
    async def run() -> None:
        world = World()
        world.producer.room = 1
        sending = asyncio.ensure_future(world.durable.send(3, records(3)))
        await asyncio.sleep(0)
        world.begin(7)
        for room in (1, 2):
            world.producer.room = room
            await turns()
            world.producer.deliver()
            await turns()
            assert (len(world.producer.sent), world.blobs.puts) == (room, [])
        world.producer.room = 3
        await sending
        world.producer.deliver()
        await turns()
        assert world.owner.acknowledged == [{0: 7}]

    asyncio.run(run())


def test_old_manifests_go_with_the_parts_that_only_they_needed() -> None:
    async def run() -> None:
        world = World()
        world.durable._stored_count = 1
        await world.stored(1, "a", "b")
        await world.stored(2, "c", needed=("b",))
        await world.stored(3, needed=("b", "c"))
        await world.stored(4, needed=("c",))
        left = {name.removeprefix("state/").lstrip("0") for name in world.blobs.items}
        assert left == {"2", "3", "4", "parts/b", "parts/c"}
        await world.stored(5, needed=("c",))
        assert world.blobs.list("parts") == ["parts/b", "parts/c"], "3 needs b"
        await world.stored(6, needed=("c",))
        assert world.blobs.list("parts") == ["parts/c"]

    asyncio.run(run())


def test_a_few_states_that_lie_further_apart_are_kept_and_a_new_worker_keeps_them() -> None:
    def kept(world: World) -> list[int]:
        return [int(name.removeprefix("state/")) for name in world.blobs.list("state")]

    async def run() -> None:
        world = World()
        for offset in range(1, 60):
            await world.stored(offset)
        assert kept(world) == [25, 37, 49, 57, 58, 59]
        world.durable = world.new_durable()
        await world.durable.restore(lambda data: {}, lambda plain, part: plain, lambda plain: ())
        for offset in range(60, 64):
            await world.stored(offset)
        assert kept(world) == [25, 37, 49, 61, 62, 63]

    asyncio.run(run())


def test_a_snapshot_that_takes_long_is_taken_seldom() -> None:
    async def run() -> None:
        world = World()

        def take() -> StateSnapshot:
            world.clock.advance(0.7)
            return StateSnapshot({0: 1}, f"{1:020d}", b"manifest".upper)

        world.clock.advance(0.5)
        assert world.durable.is_due()
        world.durable.begin({0: 1}, take)
        await await_stored([world.durable], world.producer)
        world.clock.advance(13.9)
        assert not world.durable.is_due(), "20 times as long as it took"
        world.clock.advance(0.2)
        assert world.durable.is_due()

    asyncio.run(run())


def test_what_did_not_change_is_not_stored_again() -> None:
    async def run() -> None:
        world = World()
        await world.stored(1)
        await world.stored(1)
        assert len(world.blobs.puts) == 1

    asyncio.run(run())


def test_a_snapshot_is_due_at_its_time_and_not_while_one_is_under_way() -> None:
    async def run() -> None:
        world = World()
        assert not world.durable.is_due()
        world.clock.advance(0.5)
        assert world.durable.is_due() and not world.durable.is_due()
        await world.durable.send(1, records(1))
        world.begin(1)
        world.clock.advance(5.0)
        assert not world.durable.is_due()
        world.producer.deliver()
        await turns()
        assert world.durable.is_due()

    asyncio.run(run())


@pytest.mark.parametrize("fault", [Unavailable("away"), RuntimeError("odd"), MemoryError("malloc"), Exception("bare")])
def test_whatever_the_store_raises_stops_the_stage_for_good(fault: Exception) -> None:
    async def run() -> None:
        world = World()
        world.blobs.fault = fault
        await world.stored(1)
        assert world.owner.failures == [fault]
        world.blobs.fault = None
        await world.stored(2)
        world.clock.advance(5.0)
        assert not world.durable.is_due()
        assert (world.blobs.puts, world.owner.acknowledged, world.durable.stored) == ([], [], {})

    asyncio.run(run())


def test_a_refused_record_is_never_counted_as_delivered() -> None:
    async def run() -> None:
        world = World()
        await world.durable.send(2, records(2))
        world.begin(7)
        await turns()
        refused = Unavailable("refused")
        world.producer.receipts.pop(0)(refused, -1)
        world.producer.deliver()
        await turns()
        assert (world.blobs.puts, world.owner.acknowledged) == ([], [])
        assert set(world.owner.failures) == {refused}

    asyncio.run(run())


def test_a_later_records_receipt_is_not_taken_for_an_earlier_ones() -> None:
    async def run() -> None:
        world = World()
        await world.durable.send(2, [Outgoing("samples", 0, b"first"), Outgoing("samples", 1, b"second")])
        world.begin(7)
        await world.durable.send(2, [Outgoing("samples", 1, b"other"), Outgoing("samples", 1, b"another")])
        first = world.producer.receipts.pop(0)
        world.producer.deliver()
        await turns()
        assert world.blobs.puts == [], "three receipts came, and one of the two from before the snapshot is missing"
        first(None, 0)
        await turns()
        assert world.owner.acknowledged == [{0: 7}]

    asyncio.run(run())


def test_receipts_and_room_that_never_come_end_the_wait_by_name() -> None:
    async def run() -> None:
        world = World()
        await world.durable.send(1, records(1))
        world.begin(7)
        world.producer.room = 0
        sending = asyncio.ensure_future(world.durable.send(1, records(1)))
        await turns()
        for _ in range(int(RECEIPT_MAX_S)):
            world.clock.advance(1.0)
            world.waits.check()
        world.clock.advance(0.1)
        with pytest.raises(Unavailable, match="receipts of the records before state's snapshot: no answer in 330 s"):
            world.waits.check()
        world.producer.deliver()
        await turns()
        with pytest.raises(Unavailable, match="room in the producer's queue"):
            world.waits.check()
        world.producer.room = 9
        await sending
        world.waits.check()

    asyncio.run(run())


def test_the_newest_readable_state_is_restored(caplog: pytest.LogCaptureFixture) -> None:
    def read(data: bytes) -> Any:
        if data == b"BROKEN":
            raise Damaged("no manifest")
        return data.decode()

    def load(plain: str, part: Callable[[str], bytes | None]) -> str:
        if part(plain) is None:
            raise Damaged(f"part {plain} is missing")
        return f"state of {plain}"

    async def run() -> None:
        world = World()
        assert await world.durable.restore(read, load) is None
        whole = {
            f"state/{1:020d}": b"a",
            f"state/{2:020d}": b"b",
            f"state/{3:020d}": b"c",
            f"state/{10:020d}": b"BROKEN",
        }
        world.blobs.items |= {**whole, "parts/a": b"", "parts/b": b""}
        with caplog.at_level(logging.ERROR):
            assert await world.durable.restore(read, load, lambda plain: [plain]) == "state of b"
        assert [message.split(" is damaged")[0] for message in caplog.messages] == [
            f"state/{10:020d}",
            f"state/{3:020d}",
        ]
        assert list(world.durable.kept.values()) == [["a"], ["b"], ["c"]]
        del world.blobs.items[f"state/{3:020d}"], world.blobs.items[f"state/{10:020d}"]
        assert await world.durable.restore(read, load) == "state of b"
        assert list(world.durable.kept) == [f"{1:020d}", f"{2:020d}"], "without parts older ones stay unread"

    asyncio.run(run())


@pytest.mark.parametrize("broken", ["manifests", "parts"])
def test_states_that_none_can_read_are_refused_and_only_a_person_begins_afresh(
    broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    def read(data: bytes) -> Any:
        if broken == "manifests":
            raise Damaged("no manifest")
        return data.decode()

    def load(plain: str, part: Callable[[str], bytes | None]) -> str:
        raise Damaged("a part is missing")

    async def run() -> None:
        stored = {f"state/{number:020d}": b"a" for number in (1, 2)}
        world = World()
        world.blobs.items |= stored
        with pytest.raises(InvariantBroken, match=r"state holds 2 states.*headrace stream --begin-afresh"):
            await world.durable.restore(read, load)
        decided = World(begin_afresh=True)
        decided.blobs.items |= stored
        with caplog.at_level(logging.WARNING):
            assert await decided.durable.restore(read, load) is None
        assert "beginning afresh" in caplog.messages[-1]
        assert decided.blobs.items == stored, "what could not be read stays"

    asyncio.run(run())
