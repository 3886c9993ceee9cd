"""Shippers, gateway processes and a broker that fail from one seed, and checkers that watch them from outside.

What fails: connections (before and after the ack), acks, whole processes (kill -9 with records on their way, SIGTERM
with a drain, a stall), the broker (away, refusing, denying what it took) and the producer's full queue. What the
checkers know is only what shippers offered, what was acked and what lies in the log.
"""

from __future__ import annotations

import base64
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgpack
from ingest_world import NOT_LATE, PROJECT, START_MS, Counts, HandClock, dependencies, impression, message

from headrace.contract.config import IngestConfig, JoinConfig
from headrace.contract.errors import Overloaded
from headrace.contract.formats.dead_letters import TOO_LATE, decode_dead_letter
from headrace.contract.formats.events import PUNCTUATION, decode_batch, decode_punctuation
from headrace.contract.formats.topics import Topics
from headrace.contract.hashing import partition_of
from headrace.contract.interfaces.log import Delivered, Producer, Record
from headrace.ingest.decode.message import Message
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.gateway.late_events import LateEvents
from headrace.ingest.gateway.log_start import LogStart
from headrace.ingest.gateway.repeats import digest

PARTITIONS = 2
IMPRESSION_TAG, CLICK_TAG = "shop.impression", "shop.click"
WINDOW = 4
"""Chunks that a shipper sends without waiting for an ack."""
_QUEUE_MAX = 40
_ON_THE_WIRE_MAX_STEPS = 30

Wrap = Callable[[Producer], Producer]


@dataclass(frozen=True)
class Faults:
    """How often what fails; drawn from the seed, so that some worlds are calm and some are not."""

    refused: float = 0.0
    full: float = 0.0
    killed: float = 0.0
    drained: float = 0.0
    stalled: float = 0.0
    cut: float = 0.0
    ack_lost: float = 0.0
    away: float = 0.0
    one_name: bool = False

    @classmethod
    def drawn(cls, random: Random) -> Faults:
        """Return a mix: each fault is absent in a third of the worlds, rare in a third, frequent in a third."""

        def often(most: float) -> float:
            return random.choice((0.0, most / 5, most))

        return cls(
            refused=often(0.3),
            full=often(0.2),
            killed=often(0.02),
            drained=often(0.02),
            stalled=often(0.01),
            cut=often(0.05),
            ack_lost=often(0.2),
            away=often(0.01),
            one_name=random.random() < 0.3,
        )


NO_FAULTS = Faults()


class Broker:
    """The log that all gateways share. `seen` counts what lies there, by request id, once an event id."""

    def __init__(self) -> None:
        self.away = False
        self.records: list[tuple[str, int, bytes, dict[str, str]]] = []
        self.found: Counter[str] = Counter()
        self.letters: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.repeated = 0
        self._ids: set[tuple[int, str, str]] = set()

    def append(self, topic: str, partition: int, value: bytes, headers: dict[str, str]) -> int:
        """Take one record and note its events as the stream would: an event id counts once a partition and type."""
        self.records.append((topic, partition, value, headers))
        if topic == Topics().dead_letters:
            letter = decode_dead_letter(value)
            if letter.reason == TOO_LATE:
                # It stands for its event, and is looked up before it is taken.
                request = msgpack.unpackb(letter.raw)["request_id"]
                self._find(letter.partition, letter.event_type, letter.event_id, request)
            else:
                self.letters[letter.event_id] += 1
                self.reasons[letter.reason] += 1
        elif headers["kind"] != PUNCTUATION:
            batch = decode_batch(value)
            kind = headers.get("type", headers["kind"])
            for event_id, request in zip(batch["event_id"].to_pylist(), batch["request_id"].to_pylist(), strict=True):
                self._find(partition, kind, event_id, request)
        return len(self.records) - 1

    def _find(self, partition: int, kind: str, event_id: str, request: str) -> None:
        if (partition, kind, event_id) in self._ids:
            self.repeated += 1
            return
        self._ids.add((partition, kind, event_id))
        self.found[request] += 1

    def start(self, gateway: str) -> LogStart:
        """Return what a gateway of this name finds in the log when it starts."""
        start, topic = LogStart(), Topics().events
        for name, partition, value, headers in self.records:
            if name == topic:
                start = start.after(Record(topic, partition, 0, None, value, headers, 0), gateway)
        return start


class Line:
    """One process's producer: a bounded queue, receipts that come late or wrong, records on the wire at its death."""

    def __init__(self, broker: Broker, random: Random, faults: Faults) -> None:
        self._broker, self._random, self.faults = broker, random, faults
        self._queue: deque[tuple[str, int, bytes, dict[str, str], Delivered | None]] = deque()

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
        if len(self._queue) >= _QUEUE_MAX or self._random.random() < self.faults.full:
            raise Overloaded("the local queue is full")
        self._queue.append((topic, partition, value or b"", dict(headers or {}), delivered))

    def poll(self, timeout_s: float) -> None:
        if self._broker.away:
            return
        for _ in range(self._random.randint(0, len(self._queue)) if self.faults.refused else len(self._queue)):
            *record, delivered = self._queue.popleft()
            refused = self._random.random() < self.faults.refused
            offset = -1
            if not refused or self._random.random() < 0.5:
                offset = self._broker.append(*record)
            if delivered is not None:
                delivered(RuntimeError("timed out") if refused else None, -1 if refused else offset)

    def flush(self, timeout_s: float) -> int:
        self.poll(timeout_s)
        return len(self._queue)

    def close(self) -> None:
        pass

    def die(self) -> list[tuple[str, int, bytes, dict[str, str]]]:
        """Return what was on the wire already: it will be appended, and nobody hears of it."""
        sent = self._random.randint(0, len(self._queue))
        return [(t, p, v, h) for t, p, v, h, _ in list(self._queue)[:sent]]


class Watched:
    """A process's producer as the checkers see it: each promise is held against what the process holds."""

    def __init__(self, line: Line, process: Process) -> None:
        self._line, self._process = line, process

    def send(self, topic: str, partition: int, value: bytes | None, **more: Any) -> None:
        self._line.send(topic, partition, value, **more)
        if (more.get("headers") or {}).get("kind") == PUNCTUATION:
            self._process.promised(partition, decode_punctuation(value or b"").time_ms)

    def poll(self, timeout_s: float) -> None:
        self._line.poll(timeout_s)

    def flush(self, timeout_s: float) -> int:
        return self._line.flush(timeout_s)

    def close(self) -> None:
        self._line.close()


class Process:
    """One gateway process from its start to its end."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.line = Line(world.broker, world.random, world.faults)
        watched = Watched(self.line, self)
        producer: Producer = world.wrap(watched) if world.wrap else watched
        config = IngestConfig(punctuate_ms=50, grace_ms=world.random.choice((0, 200)))
        self.gateway: Gateway = world.kind(
            dependencies(
                producer,
                Counts(),
                world.clock,
                project=PROJECT,
                config=config,
                partitions=PARTITIONS,
                start=world.broker.start(name),
                late=world.late,
            ),
            name,
        )
        self.open: dict[int, Chunk] = {}
        self.alive, self.draining, self.stalled = True, False, 0
        start = world.broker.start(name)
        self._has_promised = [False] * PARTITIONS
        self._promises = [start.promised.get(partition, 0) for partition in range(PARTITIONS)]

    def offer(self, chunk: Chunk, peer: Peer, heard: Callable[[], None]) -> None:
        """Hand a chunk over; `heard` is called when its ack is written."""
        number = self.world.count()
        self.open[number] = chunk

        def acked(*_outcome: object) -> None:
            if self.open.pop(number, None) is None:
                self.world.complaints["acked twice"] += 1
            missing = [r for r, at in chunk.requests.items() if at >= 0 and not self.world.broker.found[r]]
            missing += [e for e in chunk.bad if not self.world.broker.letters[e]]
            if missing:
                self.world.complaints["acked before the log has it"] += 1
            if self.alive:
                heard()

        self.gateway.offer(chunk.message, chunk.size, peer, acked)

    def promised(self, partition: int, time_ms: int) -> None:
        """Check a promise that is being made: it may stay behind, it must not pass an event that is held.

        An event that was older than a promise when it came is late already, and is not held. Neither is one that is
        too late, which becomes a letter.
        """
        before, self._promises[partition] = self._promises[partition], time_ms
        if time_ms < before and self._has_promised[partition]:
            self.world.complaints["a promise went back"] += 1
        self._has_promised[partition] = True
        if time_ms <= before:
            return
        for chunk in self.open.values():
            for request, event_ms in chunk.requests.items():
                held = partition_of(str(chunk.users[request]), PARTITIONS) == partition
                if event_ms < self.world.late.before_ms(self.world.clock.ms):
                    continue
                if held and before < event_ms < time_ms and not self.world.broker.found[request]:
                    self.world.complaints["promised beyond a held event"] += 1

    def step(self) -> None:
        if self.stalled:
            self.stalled -= 1
            return
        self.gateway.tick()
        if self.draining and self.gateway.drained():
            self.gateway.goodbye()
            self.line.poll(0.0)
            self.world.end(self)


@dataclass
class Chunk:
    """What one message holds, as its shipper knows it: event times by request id, and the ids of bad events."""

    message: Message
    requests: dict[str, int]
    users: dict[str, int]
    bad: list[str]
    times: int = 1
    """More than once on one connection: genuine chunks with equal content."""
    size: int = 100


class Shipper:
    """Sends chunks in a window, sends what is not acked again on its next connection, to whichever process answers."""

    def __init__(self, world: World, origin: str, chunks: list[Chunk], *, in_order: bool) -> None:
        self.world, self.origin, self.in_order = world, origin, in_order
        self.todo = chunks
        self.unacked: dict[int, tuple[Chunk, int]] = {}
        self.process: Process | None = None
        self.peer = Peer(origin)

    def connect(self) -> None:
        """Begin a connection to any process: what is unacked goes first, acks of the old one are lost."""
        self.todo[:0] = [chunk for chunk, _ in self.unacked.values()]
        self.unacked = {}
        ready = [p for p in self.world.processes if not p.draining]
        self.process = self.world.random.choice(ready) if ready else None
        self.peer = Peer(self.origin)

    def step(self) -> None:
        random, faults = self.world.random, self.world.faults
        if self.process is None or not self.process.alive or random.random() < faults.cut:
            self.connect()
        elif self.unacked and (not self.todo or len(self.unacked) >= WINDOW) and random.random() < 0.05:
            # Waited long enough for an ack.
            self.connect()
        process = self.process
        if process is None or process.draining or process.stalled or not self.todo or len(self.unacked) >= WINDOW:
            return
        chunk = self.todo.pop(0 if self.in_order else random.randrange(min(3, len(self.todo))))
        number, peer = self.world.count(), self.peer
        self.unacked[number] = (chunk, chunk.times)

        def heard() -> None:
            if self.peer is not peer or number not in self.unacked or random.random() < self.world.faults.ack_lost:
                return
            left = self.unacked[number][1] - 1
            if left:
                self.unacked[number] = (chunk, left)
            else:
                del self.unacked[number]

        for _ in range(chunk.times):
            process.offer(chunk, peer, heard)

    @property
    def done(self) -> bool:
        return not self.todo and not self.unacked


@dataclass
class World:
    """One run of everything from a seed; `run` returns what the checkers complain about, by kind."""

    seed: int
    kind: type[Gateway] = Gateway
    wrap: Wrap | None = None
    faults: Faults = NO_FAULTS
    chunks: int = 10
    complaints: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        # In every other world the stream forgets, and events of an hour ago are set aside.
        self.late = LateEvents(JoinConfig().repeat_horizon_ms) if self.seed % 2 else NOT_LATE
        if self.faults is NO_FAULTS:
            self.faults = Faults.drawn(self.random)
        self.clock, self.broker = HandClock(), Broker()
        self.processes: list[Process] = []
        self.ended: list[Process] = []
        self.wanted: dict[str, int] = {}
        self.kills = self.drains = 0
        self._count = 0
        self._wire: list[tuple[int, list[tuple[str, int, bytes, dict[str, str]]]]] = []
        for number in range(self.random.randint(1, 3)):
            self.start("g" if self.faults.one_name else f"g{number}")
        self.shippers = [self._shipper(number) for number in range(self.random.randint(1, 3))]

    def count(self) -> int:
        """Return a number that nobody has."""
        self._count += 1
        return self._count

    def start(self, name: str) -> None:
        # An epoch is a time in milliseconds: two starts of one name are never in the same one.
        self.clock.ms += 1
        self.processes.append(Process(self, name))

    def end(self, process: Process) -> None:
        """Take a process that has gone from the world and start its successor."""
        process.alive = False
        self.processes.remove(process)
        self.ended.append(process)
        self.start(process.name)

    def run(self) -> Counter[str]:
        """Run until every shipper is rid of its chunks, then until the gateways are quiet; return the complaints."""
        step = 0
        while not all(shipper.done for shipper in self.shippers):
            step += 1
            if step == 1_500:
                self._calm()
            if step > 4_000:
                self.complaints["never done"] += 1
                break
            self._step(step)
        self._calm()
        for quiet in range(2_000):
            step += 1
            self._step(step)
            # A record that was refused waits up to 5 s for its next turn.
            if quiet > 60 and not any(process.gateway.open_chunks for process in self.processes):
                break
        self._judge()
        return self.complaints

    def _calm(self) -> None:
        self.faults, self.broker.away = Faults(), False
        for process in self.processes:
            process.line.faults, process.stalled = self.faults, 0

    def _step(self, step: int) -> None:
        random, faults = self.random, self.faults
        self.clock.ms += random.randint(1, 20)
        if random.random() < (0.05 if self.broker.away else faults.away):
            self.broker.away = not self.broker.away
        if self._wire and not self.broker.away:
            for record in [r for at, records in self._wire if at <= step for r in records]:
                self.broker.append(*record)
            self._wire = [(at, records) for at, records in self._wire if at > step]
        for shipper in self.shippers:
            shipper.step()
        for process in list(self.processes):
            process.step()
            if not process.alive:
                continue
            if random.random() < faults.killed:
                self.kills += 1
                self._wire.append((step + random.randint(0, _ON_THE_WIRE_MAX_STEPS), process.line.die()))
                self.end(process)
            elif random.random() < faults.drained:
                self.drains += 1
                process.draining = True
            elif random.random() < faults.stalled:
                process.stalled = random.randint(1, 60)

    def _judge(self) -> None:
        found = self.broker.found
        for request, times in self.wanted.items():
            if found[request] < times:
                self.complaints["lost"] += 1
            elif found[request] > times:
                self.complaints["twice"] += 1
        if set(found) - set(self.wanted):
            self.complaints["made up"] += 1
        if not set(self.broker.reasons) <= {"bad_type"}:
            self.complaints["refused a good event"] += 1
        for process in self.processes + self.ended:
            counts = process.gateway.counts
            if counts["read"] != counts["appended"] + counts["dead_lettered"] + counts["repeated"]:
                self.complaints["a gateway's ledger is open"] += 1
        for process in self.processes:
            if process.gateway.buffer_bytes or process.gateway.open_chunks or process.open:
                self.complaints["a gateway holds what it settled"] += 1

    # -- what is shipped

    def _shipper(self, number: int) -> Shipper:
        """Return a shipper of its own host: fluent-bit's ids are hashes of content, the others' are unique."""
        hashed, origin = self.random.random() < 0.4, f"10.0.0.{number}"
        made: list[Chunk] = []
        again: list[dict[str, Any]] = []
        for at in range(self.chunks):
            first = number * 100_000 + at * 100
            # The form of fluent-bit's ids, not computed from what is sent: it writes times as integers here.
            like = base64.b64encode(digest(f"hash-{number}-{at}")).decode()
            made.append(self._chunk(first, like if hashed else f"{number}/{at}\n", hashed, again))
            if hashed and self.random.random() < 0.2:
                # The same bytes under another tag have the same id and are other events.
                other = CLICK_TAG if made[-1].message.tag == IMPRESSION_TAG else IMPRESSION_TAG
                made.append(self._chunk(first + 50, like, hashed, [], other))
        return Shipper(self, origin, made, in_order=self.random.random() < 0.5)

    def _chunk(self, first: int, name: str, hashed: bool, again: list[dict[str, Any]], tag: str = "") -> Chunk:
        random = self.random
        tag = tag or (CLICK_TAG if random.random() < 0.2 else IMPRESSION_TAG)
        times = 2 if hashed and random.random() < 0.2 else 1
        records: list[dict[str, Any]] = []
        chunk = Chunk(message(tag, []), {}, {}, [], times)
        for n in range(first, first + random.randint(1, 4)):
            record = impression(n, event_time_ms=self.clock.ms - random.choice((0, 0, 5_000, 3_600_000)))
            if times == 2 or random.random() < 0.5:
                del record["event_id"]
            elif random.random() < 0.3 and tag == IMPRESSION_TAG:
                again.append(record)
            self.wanted[record["request_id"]] = times
            records.append(record)
        if random.random() < 0.15:
            records.append(impression(first + 9, item_id="bad"))
            chunk.bad.append(f"e{first + 9}")
        if again and random.random() < 0.2 and tag == IMPRESSION_TAG and times == 1:
            # The web service itself sent an event twice, under its id.
            records.append(dict(random.choice(again)))
        for record in records:
            if record["item_id"] != "bad":
                chunk.requests[record["request_id"]] = record["event_time_ms"]
                chunk.users[record["request_id"]] = record["user_id"]
        chunk.message = message(tag, records, name, START_MS // 1000)
        return chunk


def total(seeds: range, **world: Any) -> Counter[str]:
    """Return the complaints of all these worlds together."""
    found: Counter[str] = Counter()
    for seed in seeds:
        found += World(seed, **world).run()
    return found
