"""From the outbox to every partition of `events`, and to `features`: steps 3 and 4 of `contract.interfaces.frontier`.

One producer sends in the order of the outbox, so that every partition has the versions in one order. What has its
receipts from all of them leaves the outbox; after a crash the rest is sent again under a higher epoch. A receipt that
says no ends the sending, as does one that does not come: the next process sends the rest. Of one entity the next
version waits for the receipts of the one before: sent again behind it, the older one would be a version that nobody
reads.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import pyarrow as pa

from headrace.contract.crawl import PREFIX
from headrace.contract.errors import Overloaded, Unavailable
from headrace.contract.formats.events import EXTERNAL, EXTERNAL_SCHEMA, ExternalValue, encode_batch
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.frontier import Frontier, Version
from headrace.contract.interfaces.log import Producer
from headrace.contract.metrics import Metrics
from headrace.process.awake import Awake
from headrace.process.waits import RECEIPT_MAX_S, Waits
from headrace.process.woken import woken

log = logging.getLogger("headrace.crawl")

RECORD_ROWS, RECORD_BYTES = 500, 512_000
"""Most versions and most text in one record, below the broker's limit; one version of more is a record by itself."""
_IN_FLIGHT_MAX = 16
_TURN_S = 0.03
"""Time between turns: receipts are taken, and what waits is sent."""
_GATHER_S = 0.25
"""Time after a turn that sent something: what is settled meanwhile is sent together, after one wait for the disk: a
busy one takes 10 to 100 ms for it."""
_REST_S = 0.5
"""Time between turns while there is nothing to send: Kafka's client wants to be asked now and then."""


class _Sent(msgspec.Struct):
    """Versions sent together, up to `number`, since `since_s`; `open` records have no receipt yet."""

    number: int
    open: int
    since_s: float
    entities: set[tuple[str, str]]


class _Record(NamedTuple):
    """A record that waits for room in the producer's queue."""

    group: _Sent
    topic: str
    partition: int
    value: bytes | None
    key: bytes | None


class OutboxSender:
    """Sends versions until it is told to stop, or cannot go on."""

    def __init__(
        self,
        frontier: Frontier,
        producer: Producer,
        topics: Topics,
        partitions: int,
        metrics: Metrics,
        epoch: int,
        clock: Clock,
    ) -> None:
        self._frontier, self._producer, self._topics = frontier, producer, topics
        self._partitions, self._metrics, self._epoch = partitions, metrics, epoch
        self._awake = Awake(clock.monotonic)
        self._taken = 0
        self._unsettled: deque[_Sent] = deque()
        self._unsent: deque[_Record] = deque()
        self._refused: Exception | None = None

    async def run(self, stopping: asyncio.Event, noted: asyncio.Event, waits: Waits) -> None:
        """Send until `stopping` and the outbox is empty. Raises as `turn`.

        The disk is waited for in a thread: pages would look slow, and their sites be asked less often.

        Args:
            noted: set whenever something may have come into the outbox, and when it is to stop.
        """
        while True:
            noted.clear()
            versions = self._take()
            if versions:
                await waits.call("wait for the disk of the outbox", self._frontier.make_safe)
                self._begin(versions)
            busy = bool(versions or self._unsent)
            if stopping.is_set() and not self._unsettled and not busy and not self._frontier.waiting():
                return
            if not (busy or self._unsettled or self._frontier.waiting()):
                await woken(noted, _REST_S)
            is_much = self._frontier.waiting() > RECORD_ROWS * (1 + len(self._unsettled))
            await asyncio.sleep(_GATHER_S if busy and not is_much and not stopping.is_set() else _TURN_S)

    def turn(self) -> bool:
        """Send what waits and take receipts; say whether anything was sent, or waits for room. Waits for the disk.

        Raises what a receipt said that refused a record, and `Unavailable` where one does not come in time.
        """
        versions = self._take()
        if versions:
            self._frontier.make_safe()
            self._begin(versions)
        return bool(versions or self._unsent)

    def _take(self) -> list[Version]:
        """Take receipts; return what is to be sent once it is safe, nothing while something waits for room."""
        self._producer.poll(0.0)
        self._settle()
        self._send_unsent()
        if self._unsent or len(self._unsettled) >= _IN_FLIGHT_MAX:
            return []
        return self._ready(_bounded(self._frontier.outbox(self._taken, RECORD_ROWS)))

    def _begin(self, versions: list[Version]) -> None:
        self._taken = versions[-1].number
        group = _Sent(self._taken, 1, self._awake.monotonic(), {(v.source, v.key) for v in versions})
        self._unsettled.append(group)
        self._send(versions, group)
        # One more than the records: receipts that come at once must not settle a group that is half sent.
        group.open -= 1

    def _ready(self, versions: list[Version]) -> list[Version]:
        """Return those before the first one of an entity that is on its way."""
        on_the_way = set[tuple[str, str]]().union(*(group.entities for group in self._unsettled))
        return list(itertools.takewhile(lambda one: (one.source, one.key) not in on_the_way, versions))

    def _send(self, versions: Sequence[Version], group: _Sent) -> None:
        value = encode_batch(_batch(versions, self._epoch))
        for partition in range(self._partitions):
            self._unsent.append(_Record(group, self._topics.events, partition, value, None))
        for version in versions:
            self._metrics.add("versions_total", source=version.source)
            key = f"{PREFIX}/{version.source}/{version.key}".encode()
            self._unsent.append(_Record(group, self._topics.features, 0, _served(version, self._epoch), key))
        group.open += self._partitions + len(versions)
        self._send_unsent()

    def _send_unsent(self) -> None:
        """Send in order what waits, until there is no room: receipts make some, before the next turn."""
        while self._unsent:
            group, topic, partition, value, key = self._unsent[0]
            headers = {"kind": EXTERNAL} if key is None else None
            told = partial(self._delivered, group)
            try:
                self._producer.send(topic, partition, value, key=key, headers=headers, delivered=told)
            except Overloaded:
                return
            self._unsent.popleft()

    def _delivered(self, group: _Sent, error: Exception | None, _offset: int) -> None:
        group.open -= 1
        self._refused = self._refused or error

    def _settle(self) -> None:
        if self._refused is not None:
            raise self._refused
        number = 0
        while self._unsettled and self._unsettled[0].open == 0:
            number = self._unsettled.popleft().number
        if number:
            self._frontier.sent(number)
        now_s = self._awake.monotonic()
        waited_s = now_s - self._unsettled[0].since_s if self._unsettled else 0.0
        if waited_s > RECEIPT_MAX_S:
            raise Unavailable(
                f"no receipt of versions up to number {self._unsettled[0].number} in {waited_s:.0f} s, "
                f"{RECEIPT_MAX_S:.0f} s are allowed. The stage stops, and the next start sends them again."
            )
        self._metrics.set("outbox_rows", self._frontier.waiting())


def _bounded(versions: list[Version]) -> list[Version]:
    size = 0
    for count, version in enumerate(versions):
        size += len(version.values or "") + len(version.url) + len(version.key)
        if size > RECORD_BYTES and count:
            return versions[:count]
    return versions


def _batch(versions: Sequence[Version], epoch: int) -> pa.RecordBatch:
    rows = [(v.source, v.key, v.crawl_time_ms, epoch, v.version, v.values, v.url) for v in versions]
    columns = [
        pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), EXTERNAL_SCHEMA, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=EXTERNAL_SCHEMA)


def _served(version: Version, epoch: int) -> bytes | None:
    if version.values is None:
        return None
    return msgspec.json.encode(ExternalValue(version.crawl_time_ms, epoch, msgspec.Raw(version.values.encode())))
