"""The gateway in the fault matrix: a shipper on connections in memory, a Kafka source, and their outside checker.

The loop, the forward connections, the Kafka source and the start are those of the real stage. In place of sockets stand
transports whose calls are rows of the matrix; what a client sends comes in between the turns, as from a socket.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import msgpack
from fault_matrix import Process, StageRow
from fault_stages import LaggingProducer
from ingest_world import PROJECT, START_MS, impression

from headrace.backends.clock import VirtualClock
from headrace.backends.log.group_memory import MemoryGroups
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.cli.stage_topics import open_topics
from headrace.cli.stages.ingest import once_kafka_answers
from headrace.contract.config import IngestConfig, SourceConfig
from headrace.contract.formats.dead_letters import decode_dead_letter
from headrace.contract.formats.events import PUNCTUATION, decode_batch, decode_punctuation
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.group import Group
from headrace.contract.interfaces.log import Admin, Producer, Reader, TopicSpec
from headrace.ingest.forward.connection import Connection
from headrace.ingest.forward.endpoint import Endpoint
from headrace.ingest.forward.forward_server import ForwardServer
from headrace.ingest.gateway.admission import Admission
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.gateway.gateway_dependencies import GatewayDependencies
from headrace.ingest.gateway.log_start import read_start
from headrace.ingest.gateway.loop import GatewayLoop
from headrace.ingest.sources.kafka_source import KafkaSource

PARTITIONS, TOPICS = 2, Topics()
CONFIG = IngestConfig(
    grace_ms=0,
    batch_ms=10,
    # Two chunks: it stops reading, and goes on.
    buffer_bytes_max=1_500,
    dead_letter_events_min=6,
    dead_letter_probe_ms=100,
)
SOURCE = SourceConfig(topic="weblogs", tag="shop.order", in_flight_max=6)
CHUNKS, EVENTS = 8, 3
SOURCED = 6, 20
"""Records in the source's two partitions; those of the second are bad, and so many that the ceiling stops them."""
UNACKED_S = 2.0
"""After this long without an ack the shipper begins a new connection, as fluentd does."""
PROMISE_MS = 300
OUTAGE_S = 120.0
"""A broker that is away comes back."""


class Sockets(Protocol):
    """What the gateway asks of one client's connection."""

    def write(self, data: bytes) -> None:
        """Send acks."""

    def close(self) -> None:
        """End the connection when what was written is sent."""

    def pause_reading(self) -> None:
        """Take nothing more of the client."""

    def resume_reading(self) -> None:
        """Take on."""


class Client:
    """The other end of one connection."""

    def __init__(self, shipper: Shipper) -> None:
        self.shipper, self.is_open, self.is_read = shipper, True, True
        self.sent: set[str] = set()

    def write(self, data: bytes) -> None:
        for ack in _unpacked(data):
            self.shipper.acked(ack["ack"])

    def close(self) -> None:
        self.is_open = False

    def pause_reading(self) -> None:
        self.is_read = False

    def resume_reading(self) -> None:
        self.is_read = True


class Transport(asyncio.Transport):
    """The gateway's end: each call goes through the process's faults."""

    def __init__(self, client: Client, faulty: Any) -> None:
        super().__init__({"peername": ("10.0.0.1", 1)})
        self._client, self._faulty = client, faulty

    def write(self, data: Any) -> None:
        self._faulty.write(data)

    def close(self) -> None:
        self._faulty.close()

    def abort(self) -> None:
        self._faulty.close()

    def is_closing(self) -> bool:
        return not self._client.is_open

    def pause_reading(self) -> None:
        self._faulty.pause_reading()

    def resume_reading(self) -> None:
        self._faulty.resume_reading()

    def is_reading(self) -> bool:
        return self._client.is_read

    def get_write_buffer_size(self) -> int:
        return 0


class Shipper:
    """Keeps each chunk until its ack, and sends it again. It outlives the gateway's processes."""

    def __init__(self, world: GatewayWorld) -> None:
        self.world = world
        self.chunks: dict[str, list[dict[str, Any]]] = {}
        for number in range(CHUNKS):
            events = [impression(number * EVENTS + at) for at in range(EVENTS)]
            if number % 3 == 0:
                events[1]["item_id"] = "seven"
            self.chunks[f"c{number}"] = events
        self.unacked = dict.fromkeys(self.chunks)
        self.early: list[str] = []
        self.client: Client | None = None
        self.connection: Connection | None = None
        self.since_s = 0.0

    def acked(self, chunk: str) -> None:
        """Take an ack; what it promises must lie in the log."""
        rows, letters = self.world.rows(), self.world.letters()
        if not {event["event_id"] for event in self.chunks[chunk]} <= rows | letters:
            self.early.append(chunk)
        self.unacked.pop(chunk, None)
        self.since_s = self.world.clock.monotonic()

    def step(self, process: Process, port: Port) -> None:
        """Send the next chunk; what was sent on a connection that ended goes out on the next one."""
        now_s = self.world.clock.monotonic()
        if self.client is not None and not self.client.is_open:
            self.lose(None)
        if self.client is not None and self.client.sent and now_s - self.since_s > UNACKED_S:
            self.lose(None)
        if self.client is None:
            self.client, self.since_s = Client(self), now_s
            self.connection = port.connection()
            transport = Transport(self.client, process.wrap(Sockets, self.client))
            self.happens(lambda connection: connection.connection_made(transport))
        if self.client is None or not self.client.is_read:
            return
        for chunk in [chunk for chunk in self.unacked if chunk not in self.client.sent][:2]:
            if self.client is None or not self.client.is_open:
                return
            self.client.sent.add(chunk)
            entries = [[START_MS // 1_000, event] for event in self.chunks[chunk]]
            frame = msgpack.packb(["shop.impression", entries, {"chunk": chunk}])
            self.happens(lambda connection, frame=frame: connection.data_received(frame))

    def happens(self, what: Callable[[Connection], None]) -> None:
        """Let the gateway hear of something; what it raises ends the connection, as asyncio has it."""
        assert self.connection is not None
        try:
            what(self.connection)
        except Exception as error:
            self.lose(error)

    def lose(self, error: Exception | None) -> None:
        connection, self.client, self.connection = self.connection, None, None
        if connection is not None:
            connection.connection_lost(error)

    def forget(self) -> None:
        """The gateway's process is gone, and its connections with it."""
        self.client = self.connection = None


class Port(ForwardServer):
    """The forward port, without its listeners."""

    async def listen(self, admission: Admission) -> int:
        self._admission = admission
        return 1

    @property
    def is_listening(self) -> bool:
        return self._admission is not None


class Stop(threading.Event):
    """The wait for Kafka at the start, on the virtual clock."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        self._clock.advance(timeout or 0.0)
        return self.is_set()


class GatewayStage:
    """One process of the gateway."""

    def __init__(self, world: GatewayWorld, process: Process) -> None:
        self.world, self.process = world, process
        self.producer = LaggingProducer(world.log)
        self.port: Port | None = None
        self.serving: asyncio.Task[None] | None = None
        self.stop = Stop(world.clock)

    async def work(self) -> None:
        if self.serving is None:
            self.begin()
        if self.port is not None and self.port.is_listening:
            self.world.shipper.step(self.process, self.port)

    def begin(self) -> None:
        """Start as the command does."""
        world, process = self.world, self.process
        admin, beat = process.wrap(Admin, world.log.admin()), process.watchdog.beat
        assert once_kafka_answers(partial(open_topics, admin, TOPICS, PARTITIONS), self.stop, beat) is not None
        reader = process.wrap(Reader, world.log.reader())
        try:
            start = once_kafka_answers(lambda: read_start(reader, TOPICS.events, "gateway"), self.stop, beat)
        finally:
            reader.close()
        assert start is not None
        if start.epoch <= (before := world.newest_epoch()):
            world.stale_epochs.append((start.epoch, before))
        world.started += 1
        metrics = MemoryMetrics()
        deps = GatewayDependencies(
            project=PROJECT,
            config=CONFIG,
            topics=TOPICS,
            partitions=PARTITIONS,
            producer=process.wrap(Producer, self.producer),
            metrics=metrics,
            clock=world.clock,
            start=start,
            instance=str(world.started),
        )
        self.port = Port(CONFIG, metrics, world.clock, Endpoint())
        loop = GatewayLoop(Gateway(deps, "gateway"), CONFIG, metrics, world.clock, self.port)
        world.member = world.groups.join()
        source = KafkaSource(SOURCE, lambda: process.wrap(Group, world.member), metrics, world.clock)
        self.serving = asyncio.ensure_future(loop.serve(self.stop, ready=lambda _: None, companions=[source]))
        # A process that died leaves what its loop met with nobody to hear of it.
        self.serving.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def tick(self) -> None:
        if not self.process.is_dead:
            self.world.member.commit()
        if self.serving is not None and self.serving.done():
            self.serving.result()
            raise AssertionError("the gateway ended and nobody told it to")

    async def finish(self) -> None:
        self.stop.set()
        assert self.serving is not None
        await self.serving

    def is_busy(self) -> bool:
        world = self.world
        unsettled = world.shipper.unacked or world.unread() or self.producer.held
        # Time is its work, too: a promise that stands still would hold the watermark for ever.
        return bool(self.serving is None or unsettled or world.clock.now_ms() - world.promised_ms() > PROMISE_MS)


class GatewayWorld:
    """The log, the group's positions and the shipper."""

    def __init__(self) -> None:
        self.clock = VirtualClock(START_MS)
        self.log = MemoryLog(self.clock.now_ms)
        self.log.admin().ensure_topics([TopicSpec(SOURCE.topic, 2)])
        for partition, records in enumerate(SOURCED):
            for number in range(records):
                value = {
                    "event_id": f"o{partition}-{number}",
                    "request_id": "r",
                    "user_id": None if partition else number,
                }
                self.log.append(SOURCE.topic, partition, json.dumps(value).encode(), None, {})
        self.groups = MemoryGroups(self.log, SOURCE.topic)
        self.member = self.groups.join()
        self.shipper = Shipper(self)
        self.stale_epochs: list[tuple[int, int]] = []
        self.started = 0

    def start(self, process: Process) -> GatewayStage:
        for member in list(self.groups.members):
            self.groups.crash(member)
        self.shipper.forget()
        return GatewayStage(self, process)

    def close(self) -> None:
        """What lies in memory goes by itself."""

    def rows(self) -> set[str]:
        """Return the ids of all appended events; the stream drops what is there twice."""
        found = set[str]()
        for partition in self.log.topics.get(TOPICS.events, ()):
            for record in partition:
                if record.headers["kind"] != PUNCTUATION:
                    found |= set(decode_batch(record.value or b"").column("event_id").to_pylist())
        return found

    def letters(self) -> set[str]:
        """Return the ids of all dead letters."""
        partitions = self.log.topics.get(TOPICS.dead_letters, ())
        return {decode_dead_letter(r.value or b"").event_id for partition in partitions for r in partition}

    def promised_ms(self) -> int:
        """Return how far the gateway's promises have come in every partition."""
        promises = [
            [decode_punctuation(r.value or b"").time_ms for r in partition if r.headers["kind"] == PUNCTUATION][-1:]
            for partition in self.log.topics.get(TOPICS.events, [[]])
        ]
        return min(promise[0] if promise else 0 for promise in promises)

    def newest_epoch(self) -> int:
        """Return the newest epoch in the log, 0 where there is none."""
        records = [record for partition in self.log.topics.get(TOPICS.events, ()) for record in partition]
        return max((int(record.headers["epoch"]) for record in records), default=0)

    def unread(self) -> bool:
        """Say whether the source's group has records before it."""
        return [self.groups.committed.get(partition, 0) for partition in range(2)] != list(SOURCED)

    def trouble(self) -> str:
        if self.shipper.early:
            return f"acked before the log had them: {self.shipper.early}"
        if self.stale_epochs:
            return f"epochs that began again, and the newest in the log: {self.stale_epochs}"
        shipped = [event for events in self.shipper.chunks.values() for event in events]
        bad = {event["event_id"] for event in shipped if event["item_id"] == "seven"}
        good = {event["event_id"] for event in shipped} - bad
        rows, letters = self.rows(), self.letters()
        sourced = [{f"o{partition}-{n}" for n in range(records)} for partition, records in enumerate(SOURCED)]
        expected = good | sourced[0], bad | sourced[1]
        if (rows, letters) != expected:
            return f"appended {sorted(rows ^ expected[0])}, dead letters {sorted(letters ^ expected[1])} differ"
        return f"unacked {list(self.shipper.unacked)}" if self.shipper.unacked else ""


def _unpacked(data: bytes) -> list[Any]:
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    return list(unpacker)


GATEWAY = StageRow(
    "gateway",
    (Admin, Producer, Reader, Group, Sockets),
    GatewayWorld,
    {
        "Admin.topic_id": "it stores nothing that was made of a topic",
        "Admin.retention_ms": "the sink alone asks it: the row sink",
        "Admin.delete_before": "the trainer alone deletes: tests/simulation/trainer/test_steps_archive.py",
        "Producer.flush": "called when the loop has ended: what has no receipt has no ack",
        "Producer.close": "the command closes it when the stage has ended",
    },
    outage_s=OUTAGE_S,
)
