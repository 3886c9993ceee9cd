"""What serving knows from the `features` topic: each key's counters, and the newest version of each crawled entity.

Counters come as buckets and are evaluated at the newest watermark that was seen.

How far it is (`FeatureMemory.state`), of which readiness and `POST /v1/rank` make their answers:

| state | meaning |
|---|---|
| `reading` | the counters that there were at the beginning are not all read: what is missing would look like zeros |
| `unread` | the same, and no broker has answered for longer than the bound |
| `current` | all counters are known that there were at most the bound ago |
| `behind` | the broker answers, and this process has not read so far for longer than the bound |
| `stale` | all were read once, and no broker has answered for longer than the bound |

Every second the end of the topic is asked for; when the position has reached it, the memory was current at that time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import pyarrow as pa

from headrace.contract.crawl import CRAWL_TIME, PREFIX, Crawl
from headrace.contract.errors import HeadraceError, InvariantBroken
from headrace.contract.formats.events import EPOCH_MAX, Epoch, ExternalValue
from headrace.contract.formats.json_record import decode_json
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Reader, Record
from headrace.contract.metrics import Metrics
from headrace.contract.spec import Counter, FeatureSpec
from headrace.process.awake import Awake
from headrace.stream.features.counters import bucket_ms, key_strings, moves_within_bucket, value_as_of
from headrace.stream.features.external_values import values_of

logger = logging.getLogger("headrace.serve")

State = Literal["reading", "unread", "current", "behind", "stale"]
_ASK_S = 1.0
"""How often the topic's end is asked for."""
_FOREIGN = (msgspec.MsgspecError, HeadraceError, ValueError, TypeError, LookupError)
"""What a record raises that another program wrote into the topic, or that is damaged."""


_NEWEST = (1 << 63, 0)


class _Entry(msgspec.Struct):
    as_of_ms: Epoch
    epoch: Epoch
    buckets: dict[str, list[int]]


class _Row:
    """One key's buckets, which never change, and the values that were computed of them last: (step of time, values)."""

    __slots__ = ("buckets", "said", "value")

    def __init__(self, buckets: dict[int, list[int]], said: tuple[int, int]) -> None:
        self.buckets, self.said = buckets, said
        self.value: tuple[int, list[float]] | None = None


class FeatureMemory:
    """Counters by (counter, key), crawled entities by (source, key). One thread writes, others read.

    A reader sees one key's values whole.
    """

    def __init__(self, crawls: Sequence[Crawl] = ()) -> None:
        self._rows: dict[str, _Row] = {}
        self._said = (0, 0)
        """(epoch, as of) of the newest value; the rows of one time share it."""
        self._crawls = {crawl.name: crawl for crawl in crawls}
        self._entities: dict[tuple[str, str], dict[str, Any]] = {}
        self._crawl_epoch = 0
        self.watermark_ms = 0
        self.offset = 0
        """The next record to read."""
        self.is_caught_up = False
        """True once all that there was at the beginning has been read."""
        self.current_s = 0.0
        """When the memory was known to hold all that there was, by the monotonic clock."""
        self.away_since_s: float | None = None
        """Since when no broker answers, in time awake; None while one does."""
        self._awake: Awake | None = None
        """Follows the thread that reads: while the process stood still, no broker could answer it."""

    def state(self, now_s: float, bound_s: float) -> State:
        """Return how far the memory is. `now_s` is of the monotonic clock."""
        since_s, awake_s = self.away_since_s, now_s if self._awake is None else self._awake.monotonic()
        is_away = since_s is not None and awake_s - since_s > bound_s
        if not self.is_caught_up:
            return "unread" if is_away else "reading"
        if is_away:
            return "stale"
        return "behind" if self.away_since_s is None and now_s - self.current_s > bound_s else "current"

    def take(self, record: Record) -> None:
        """Take one record. A key's value of a lower (epoch, as of) than it has was written by an aggregator that has
        been replaced, and is dropped. It is judged by key: compaction may have left nothing else of one.

        Raises one of `_FOREIGN` for a record that is neither a counter nor a crawled entity; nothing has changed then.
        """
        name = (record.key or b"").decode()
        if name.startswith(f"{PREFIX}/"):
            self._take_entity(name, record)
            return
        if record.value is None:
            if name in self._rows and _said(record) >= self._rows[name].said:
                del self._rows[name]
            return
        entry: _Entry = decode_json(record.value, _Entry)
        said, known = (entry.epoch, entry.as_of_ms), self._rows.get(name)
        if known is not None and said < known.said:
            return
        self._said = self._said if said == self._said else said
        row = _Row({int(b): counts for b, counts in entry.buckets.items()}, self._said)
        self.watermark_ms = max(self.watermark_ms, entry.as_of_ms)
        self._rows[name] = row

    def _take_entity(self, name: str, record: Record) -> None:
        _, source, key = name.split("/", 2)
        crawl = self._crawls.get(source)
        if crawl is None:
            return
        if record.value is None:
            self._entities.pop((source, key), None)
            return
        entity: ExternalValue = decode_json(record.value, ExternalValue)
        if entity.epoch < self._crawl_epoch:
            return
        values = values_of(bytes(entity.values), crawl)
        self._crawl_epoch = entity.epoch
        named = {f"{PREFIX}.{source}.{field}": value for field, value in values.items()}
        self._entities[source, key] = {**named, f"{PREFIX}.{source}.{CRAWL_TIME}": entity.crawl_time_ms}

    def counts(self, counter: Counter, key: str) -> list[float]:
        """Return one value for each of `counter.counts`, zeros where nothing is known."""
        row = self._rows.get(f"{counter.name}/{key}")
        if row is None:
            return [0] * len(counter.counts)
        now_ms = self.watermark_ms
        step = now_ms if moves_within_bucket(counter) else now_ms // bucket_ms(counter)
        if row.value is None or row.value[0] != step:
            row.value = step, value_as_of(row.buckets, counter, now_ms)
        return row.value[1]

    def columns(self, spec: FeatureSpec, raw: Mapping[str, pa.Array], rows: int) -> list[dict[str, Any]]:
        """Return every counter and external column of each of `rows` candidates; `raw` as `scorer.merge` returns."""
        served: list[dict[str, Any]] = [{} for _ in range(rows)]
        texts: dict[tuple[str, ...], list[str | None]] = {}
        for counter in spec.counters:
            names = counter.columns()
            known: dict[str | None, dict[str, float]] = {}
            fields = counter.key_fields
            if fields not in texts:
                texts[fields] = key_strings([raw[field] for field in fields])
            for row, key in zip(served, texts[fields], strict=True):
                found = known.get(key)
                if found is None:
                    counts: list[float] = [0] * len(names) if key is None else self.counts(counter, key)
                    found = known[key] = dict(zip(names, map(float, counts), strict=True))
                row.update(found)
        for crawl in self._crawls.values():
            nothing: dict[str, Any] = dict.fromkeys(crawl.columns()) | {f"{PREFIX}.{crawl.name}.{CRAWL_TIME}": 0}
            for row, key in zip(served, key_strings([raw[crawl.joins]]), strict=True):
                entity = None if key is None else self._entities.get((crawl.name, key))
                row.update(nothing if entity is None else entity)
        return served

    def follow(self, reader: Reader, topic: str, stop: threading.Event, *, clock: Clock, metrics: Metrics) -> None:
        """Read the topic until `stop`. While the broker is away, the memory stays as it is."""
        begun, first_end, asked = False, 0, (0, clock.monotonic())
        awake = self._awake = Awake(clock.monotonic)
        while not stop.is_set():
            awake.stood_s()
            try:
                if not begun:
                    begin, end = reader.begin_offsets(topic)[0], reader.end_offsets(topic)[0]
                    first_end, asked = end, (end, clock.monotonic())
                    reader.assign({(topic, 0): begin})
                    begun = True
                records = reader.poll(5_000, 0.2)
                self._take_all(records, metrics)
                self.offset = reader.position(topic, 0)
                if self.offset >= asked[0]:
                    self.current_s = asked[1]
                    self.is_caught_up = self.is_caught_up or self.offset >= first_end
                    now_s = clock.monotonic()
                    if now_s - asked[1] >= _ASK_S:
                        asked = reader.end_offsets(topic)[0], now_s
                        self._broker_answers()
                elif records:
                    self._broker_answers()
            except HeadraceError as error:
                if self.away_since_s is None:
                    logger.warning("counters wait: %s", error)
                    self.away_since_s = awake.monotonic()
                # What was assigned is still assigned, unless compaction took the offset: then all is read again.
                begun = begun and not isinstance(error, InvariantBroken)
                stop.wait(0.5)
        reader.close()

    def _broker_answers(self) -> None:
        if self.away_since_s is not None:
            logger.info("counters come again")
        self.away_since_s = None

    def _take_all(self, records: Sequence[Record], metrics: Metrics) -> None:
        for record in records:
            try:
                self.take(record)
            except _FOREIGN as error:
                logger.error("record %d of %s is left out: %s", record.offset, record.topic, error)
                metrics.add("records_unreadable_total", topic="features", kind="foreign")


def _said(gone: Record) -> tuple[int, int]:
    """Return of when it is that a key is gone; what release 0.1 wrote does not say, and counts."""
    try:
        said = int(gone.headers["epoch"]), int(gone.headers["as_of_ms"])
        return said if max(map(abs, said)) < EPOCH_MAX else _NEWEST
    except (LookupError, ValueError):
        return _NEWEST
