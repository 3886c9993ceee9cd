"""From the outbox to every partition of `events`, and to `features`: steps 3 and 4 of `contract.interfaces.frontier`.

One producer sends in the order of the outbox, so that every partition has the versions in one order. What has its
receipts from all of them leaves the outbox; after a crash the rest is sent again under a higher epoch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence

import msgspec
import pyarrow as pa

from headrace.contract.crawl import PREFIX
from headrace.contract.errors import Overloaded
from headrace.contract.formats.events import EXTERNAL, EXTERNAL_SCHEMA, ExternalValue, encode_batch
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.frontier import Frontier, Version
from headrace.contract.interfaces.log import Producer
from headrace.contract.metrics import Metrics

log = logging.getLogger("headrace.crawl")

RECORD_ROWS, RECORD_BYTES = 500, 512_000
"""Most versions and most text in one record, below the broker's limit; one version of more is a record by itself."""
_IN_FLIGHT_MAX = 16
_TURN_S = 0.03
"""Time between turns: what is settled meanwhile is sent together, after one wait for the disk."""


class _Sent(msgspec.Struct):
    """Versions sent together, up to `number`; `open` records have no receipt yet."""

    number: int
    open: int


class OutboxSender:
    """Sends versions until it is told to stop; `failure` says why it cannot go on."""

    def __init__(
        self, frontier: Frontier, producer: Producer, topics: Topics, partitions: int, metrics: Metrics, epoch: int
    ) -> None:
        self._frontier, self._producer, self._topics = frontier, producer, topics
        self._partitions, self._metrics, self._epoch = partitions, metrics, epoch
        self._taken = 0
        self._unsettled: deque[_Sent] = deque()
        self.failure: Exception | None = None

    async def run(self, stopping: asyncio.Event) -> None:
        """Send until `stopping` and the outbox is empty, or a record is refused."""
        while self.failure is None:
            busy = self.turn()
            if stopping.is_set() and not self._unsettled and not busy and not self._frontier.waiting():
                return
            await asyncio.sleep(_TURN_S)

    def turn(self) -> bool:
        """Send what waits and take receipts; say whether anything was sent. Never blocks."""
        self._producer.poll(0.0)
        self._settle()
        if len(self._unsettled) >= _IN_FLIGHT_MAX:
            return False
        versions = _bounded(self._frontier.outbox(self._taken, RECORD_ROWS))
        if not versions:
            return False
        self._frontier.make_safe()
        self._taken = versions[-1].number
        group = _Sent(self._taken, 1)
        self._unsettled.append(group)
        self._send(versions, group)
        # One more than the records: receipts that come at once must not settle a group that is half sent.
        group.open -= 1
        return True

    def _send(self, versions: Sequence[Version], group: _Sent) -> None:
        value = encode_batch(_batch(versions, self._epoch))
        for partition in range(self._partitions):
            self._send_one(group, self._topics.events, partition, value, None)
        for version in versions:
            self._metrics.add("versions_total", source=version.source)
            key = f"{PREFIX}/{version.source}/{version.key}".encode()
            self._send_one(group, self._topics.features, 0, _served(version, self._epoch), key)

    def _send_one(self, group: _Sent, topic: str, partition: int, value: bytes | None, key: bytes | None) -> None:
        headers = {"kind": EXTERNAL} if key is None else None

        def delivered(error: Exception | None, _offset: int) -> None:
            group.open -= 1
            self.failure = self.failure or error

        group.open += 1
        while True:
            try:
                self._producer.send(topic, partition, value, key=key, headers=headers, delivered=delivered)
            except Overloaded:
                # Nothing else fills this producer's queue, and receipts empty it: wait for some. The order stays.
                self._producer.poll(0.05)
            else:
                return

    def _settle(self) -> None:
        if self.failure is not None:
            return
        number = 0
        while self._unsettled and self._unsettled[0].open == 0:
            number = self._unsettled.popleft().number
        if number:
            self._frontier.sent(number)
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
