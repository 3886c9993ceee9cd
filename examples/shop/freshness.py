"""Freshness as the shop sees it: from a click being given to the shipper to the first answer that contains it.

The shop tells when it logged a click and when an answer came from which version; the `samples` topic tells at which
position a click was resolved, the `steps` topic which positions a version contains. All memory is bounded: what is
older than the bounds is forgotten and not measured. A record that is not ours, or damaged, is counted and skipped.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Sequence
from functools import partial

import msgspec
import pyarrow as pa

from headrace.contract.errors import Unavailable
from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.samples_topic.sample_record import Unreadable, read_samples
from headrace.contract.formats.steps import decode_step
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Reader, Record
from headrace.contract.metrics import Metrics

logger = logging.getLogger("headrace.shop")

# 20,000 clicks are more than a minute of them at 300 impressions/s; 2,000 versions are more than 6 minutes of deltas.
CLICKS_MAX = 20_000
VERSIONS_MAX = 2_000
POLL_RECORDS, POLL_S = 1_000, 0.2
AWAY_S = 2.0


class _Seen(msgspec.Struct):
    """The first answer of a version, and what that version contains."""

    at: float
    positions: dict[str, Position]


class Freshness:
    """Measures into `freshness_seconds`. `clicked` and `answered` may be called from any thread."""

    def __init__(self, topics: Topics, metrics: Metrics, clock: Clock) -> None:
        self._topics, self._metrics, self._clock = topics, metrics, clock
        self._clicks: OrderedDict[str, float] = OrderedDict()
        self._resolved: deque[tuple[float, int, Position]] = deque(maxlen=CLICKS_MAX)
        self._steps: OrderedDict[str, dict[str, Position]] = OrderedDict()
        self._first: OrderedDict[str, float] = OrderedDict()
        self._seen: deque[_Seen] = deque(maxlen=VERSIONS_MAX)
        self._version = ""
        self._lock = threading.Lock()

    def clicked(self, event_id: str) -> None:
        """Remember that the click's line was flushed now."""
        with self._lock:
            self._clicks[event_id] = self._clock.monotonic()
            if len(self._clicks) > CLICKS_MAX:
                self._clicks.popitem(last=False)

    def answered(self, version: str) -> None:
        """Remember that an answer of `version` came now; only the first one of a version matters."""
        if version == self._version or not version:
            return
        with self._lock:
            self._version = version
            self._first.setdefault(version, self._clock.monotonic())
            if len(self._first) > VERSIONS_MAX:
                self._first.popitem(last=False)

    def run(self, reader: Reader, stop: threading.Event) -> None:
        """Follow the topics from their ends until `stop`; while Kafka is away, wait and go on."""
        assigned = False
        while not stop.is_set():
            try:
                if not assigned:
                    names = (self._topics.samples, self._topics.steps)
                    reader.assign({(name, p): end for name in names for p, end in reader.end_offsets(name).items()})
                    assigned = True
                self.take(reader.poll(POLL_RECORDS, POLL_S))
            except Unavailable:
                stop.wait(AWAY_S)
        reader.close()

    def take(self, records: Sequence[Record]) -> None:
        """Take records of both topics and measure every click that an answer is now known to contain."""
        with self._lock:
            for record in records:
                if record.topic == self._topics.steps:
                    self._take_step(record)
                else:
                    self._take_samples(record)
            for version in [v for v in self._first if v in self._steps]:
                self._seen.append(_Seen(self._first.pop(version), self._steps[version]))
            self._measure()

    def _take_step(self, record: Record) -> None:
        try:
            step = decode_step(record.value or b"")
            positions = {p: Position(*position) for p, position in step.positions.items()}
        except (msgspec.DecodeError, TypeError) as error:
            self._skip(record, "steps", "foreign", str(error))
            return
        self._steps[f"{step.run}-{step.step}"] = positions
        if len(self._steps) > VERSIONS_MAX:
            self._steps.popitem(last=False)

    def _take_samples(self, record: Record) -> None:
        found = read_samples(record)
        if isinstance(found, Unreadable):
            self._skip(record, "samples", found.kind, found.detail)
            return
        rows = found.rows
        if "feedback_id" not in rows.schema.names or rows.schema.field("feedback_id").type != pa.string():
            self._skip(record, "samples", "damaged", "it has no feedback ids")
            return
        self._resolve(record.partition, rows)

    def _skip(self, record: Record, topic: str, kind: str, why: str) -> None:
        logger.error("%s/%d offset %d is skipped: %s", record.topic, record.partition, record.offset, why)
        self._metrics.add("records_unreadable_total", topic=topic, kind=kind)

    def _resolve(self, partition: int, batch: pa.RecordBatch) -> None:
        columns = (batch[name].to_pylist() for name in ("feedback_id", "offset", "rank"))
        for feedback, offset, rank in zip(*columns, strict=True):
            flushed = self._clicks.pop(feedback, None)
            if flushed is not None:
                self._resolved.append((flushed, partition, Position(offset, rank)))

    def _measure(self) -> None:
        left: deque[tuple[float, int, Position]] = deque(maxlen=CLICKS_MAX)
        for flushed, partition, position in self._resolved:
            first = bisect_left(self._seen, position, key=partial(_contained, partition))
            if first == len(self._seen):
                left.append((flushed, partition, position))
            else:
                self._metrics.observe("freshness_seconds", max(0.0, self._seen[first].at - flushed))
        self._resolved = left


def _contained(partition: int, seen: _Seen) -> Position:
    return seen.positions.get(str(partition), START)
