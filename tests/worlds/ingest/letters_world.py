"""What the tests of dead letters share: letters of a gateway, a corrected project, retries that die on purpose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import msgspec
from ingest_world import PROJECT, START_MS, dependencies, impression, message

from headrace.backends.clock import VirtualClock
from headrace.backends.log.fenced_memory import FencedMemory, WriterEpochs
from headrace.backends.log.memory import MemoryLog, MemoryProducer
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import IngestConfig
from headrace.contract.formats.dead_letters import RetryMark, decode_retry_mark
from headrace.contract.formats.events import PUNCTUATION, decode_batch
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.fenced import FencedWriter
from headrace.contract.interfaces.log import Delivered, Producer, Reader
from headrace.contract.project import FeedbackType, Project
from headrace.ingest.dead_letters.letters import Letter, States, read_letters
from headrace.ingest.dead_letters.look_up import LookUp
from headrace.ingest.dead_letters.retry import Retry
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.gateway import Gateway

P = 3
TOPICS = Topics()
CART = FeedbackType(name="cart", tag="shop.cart", fields={"item_id": "int64", "note": "string"})
CORRECTED: Project = msgspec.structs.replace(PROJECT, feedback=(*PROJECT.feedback, CART)).checked()


class Killed(Exception):
    """kill -9 of the retry."""


class World:
    """One log with dead letters in it, and all that outlives a retry."""

    def __init__(self) -> None:
        self.clock = VirtualClock(START_MS)
        self.log = MemoryLog(self.clock.now_ms)
        self.log.admin().ensure_topics(TOPICS.specs(P))
        self.epochs = WriterEpochs()
        self.runs = self.starts = 0

    def offer(self, tag: str, records: list[Any], chunk: str | None = None, at_s: int = START_MS // 1000 - 50) -> None:
        """Let a gateway of the project as it was take a chunk."""
        # Two epochs of one gateway never begin in the same millisecond.
        self.clock.advance(0.001)
        self.starts += 1
        producer = self.log.producer()
        config = IngestConfig(grace_ms=600_000)
        gateway = Gateway(
            dependencies(
                producer,
                MemoryMetrics(),
                self.clock,
                project=PROJECT,
                config=config,
                topics=TOPICS,
                partitions=P,
                instance=f"start-{self.starts}",
            ),
            "g1",
        )
        gateway.offer(message(tag, records, chunk, at_s), 100, Peer("10.0.0.1"), None)
        while not gateway.drained():
            gateway.tick()

    def writer(self) -> FencedMemory:
        return FencedMemory(self.log, TOPICS.retries, "retries", self.epochs)

    def retry(
        self,
        project: Project = CORRECTED,
        kind: Callable[..., Retry] = Retry,
        producer: Producer | None = None,
        reader: Reader | None = None,
        writer: FencedWriter | None = None,
        clock: Any = None,
        look_up: LookUp | None = None,
    ) -> Retry:
        """Return a retry that has not begun."""
        self.runs += 1
        return kind(
            project,
            IngestConfig(),
            TOPICS,
            P,
            producer=producer or self.log.producer(),
            reader=reader or self.log.reader(),
            writer=writer or self.writer(),
            clock=clock or self.clock,
            metrics=MemoryMetrics(),
            run=f"r{self.runs}",
            look_up=look_up,
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return every event in the log."""
        found: list[dict[str, Any]] = []
        for partition in self.log.partitions(TOPICS.events):
            for record in partition:
                assert record.value is not None
                if record.headers["kind"] != PUNCTUATION:
                    found.extend(decode_batch(record.value).to_pylist())
        return found

    def letters(self) -> list[Letter]:
        reader = self.log.reader()
        return list(read_letters(reader, TOPICS.dead_letters, reader.end_offsets(TOPICS.dead_letters)[0]))

    def marks(self) -> list[RetryMark]:
        return [decode_retry_mark(value) for _, value in self.writer().read(0)]

    def states(self) -> dict[int, str]:
        states = States(self.marks())
        for letter in self.letters():
            states.note(letter)
        return {letter.offset: states.of(letter.offset) for letter in self.letters()}


class Dying:
    """Counts the effects of a retry and kills it at the one that is its turn, before or after it."""

    def __init__(self, turn: int, random: Random) -> None:
        self.turn, self.random = turn, random
        self.producers: list[DyingProducer] = []

    def step(self, do: Callable[[], None]) -> None:
        self.turn -= 1
        if self.turn == 0:
            if self.random.random() < 0.5:
                do()
            for producer in self.producers:
                producer.die()
            raise Killed
        do()


class DyingProducer:
    """Holds records in its queue as a client does; when it dies, the broker has some of them."""

    def __init__(self, inner: MemoryProducer, dying: Dying) -> None:
        self._inner, self._dying = inner, dying
        self._queue: list[Callable[[], None]] = []
        dying.producers.append(self)

    def send(
        self,
        topic: str,
        partition: int,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        delivered: Delivered | None = None,
    ) -> None:
        def land() -> None:
            self._inner.send(topic, partition, value, key=key, headers=headers, delivered=delivered)

        self._dying.step(lambda: self._queue.append(land))

    def poll(self, timeout_s: float) -> None:
        for _ in range(self._dying.random.randint(0, len(self._queue))):
            self._queue.pop(0)()
        self._dying.step(lambda: self._inner.poll(0.0))

    def flush(self, timeout_s: float) -> int:
        return 0

    def close(self) -> None:
        pass

    def die(self) -> None:
        for land in self._queue[: self._dying.random.randint(0, len(self._queue))]:
            land()
        self._queue = []


class DyingWriter(FencedMemory):
    """Dies before or after the mark is committed."""

    def __init__(self, log: MemoryLog, epochs: WriterEpochs, dying: Dying) -> None:
        super().__init__(log, TOPICS.retries, "retries", epochs)
        self._dying = dying

    def append(self, value: bytes) -> None:
        self._dying.step(lambda: super(DyingWriter, self).append(value))


def fill(world: World, random: Random) -> dict[str, int]:
    """Write letters of every kind; return how often each request id must be in the log after the retry."""
    wanted: dict[str, int] = {}
    for number in range(random.randint(4, 12)):
        chunk = f"c{number}" if random.random() < 0.7 else None
        records = []
        for n in range(random.randint(1, 4)):
            name = f"{number}-{n}"
            record: dict[str, Any] = {"request_id": name, "user_id": random.randint(1, 9), "item_id": n}
            wanted[name] = 1
            if random.random() < 0.4:
                record["event_id"] = f"own-{name}"
            if random.random() < 0.2:
                record["item_id"] = "seven"
                wanted[name] = 0
            records.append(record)
        world.offer("shop.cart", records, chunk)
        if chunk is not None and random.random() < 0.3:
            # The gateway was killed before its ack: the shipper sends the chunk again, the letters are there twice.
            world.offer("shop.cart", records, chunk)
        if random.random() < 0.3:
            world.offer("shop.impression", [impression(number, user_id=None, request_id=f"i{number}")])
            wanted[f"i{number}"] = 0
    return wanted


def found(world: World, wanted: Mapping[str, int]) -> Counter[str]:
    """Return how often each request id is in the log."""
    return Counter(dict.fromkeys(wanted, 0)) + Counter(row["request_id"] for row in world.rows())
