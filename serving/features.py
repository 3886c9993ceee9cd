"""What serving knows from the `features` topic: each key's counters, and the newest version of each crawled entity.

Counters come as buckets and are evaluated at the newest watermark that was seen.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pyarrow as pa

from headrace.contract.crawl import CRAWL_TIME, PREFIX, Crawl
from headrace.contract.errors import HeadraceError, InvariantBroken
from headrace.contract.formats.events import ExternalValue
from headrace.contract.interfaces.log import Reader, Record
from headrace.contract.spec import Counter, FeatureSpec
from headrace.stream.features.counters import bucket_ms, key_strings, moves_within_bucket, value_as_of
from headrace.stream.features.external_values import values_of

logger = logging.getLogger("headrace.serve")


class _Entry(msgspec.Struct):
    as_of_ms: int
    epoch: int
    buckets: dict[str, list[int]]


class _Row:
    """One key's buckets, which never change, and the values that were computed of them last: (step of time, values)."""

    __slots__ = ("buckets", "value")

    def __init__(self, buckets: dict[int, list[int]]) -> None:
        self.buckets = buckets
        self.value: tuple[int, list[float]] | None = None


class FeatureMemory:
    """Counters by (counter, key), crawled entities by (source, key). One thread writes, others read.

    A reader sees one key's values whole.
    """

    def __init__(self, crawls: Sequence[Crawl] = ()) -> None:
        self._rows: dict[str, _Row] = {}
        self._fence: tuple[int, int] = (0, 0)
        self._crawls = {crawl.name: crawl for crawl in crawls}
        self._entities: dict[tuple[str, str], dict[str, Any]] = {}
        self._crawl_epoch = 0
        self.watermark_ms = 0
        self.is_caught_up = False

    def take(self, record: Record) -> None:
        """Take one record. One of a lower epoch was written by an aggregator that has been replaced, and is dropped."""
        name = (record.key or b"").decode()
        if name.startswith(f"{PREFIX}/"):
            self._take_entity(name, record)
            return
        if record.value is None:
            self._rows.pop(name, None)
            return
        try:
            entry = msgspec.json.decode(record.value, type=_Entry)
        except msgspec.MsgspecError as error:
            logger.error("record %d of %s holds no counter: %s", record.offset, record.topic, error)
            return
        if entry.epoch < self._fence[0]:
            return
        self._fence = max(self._fence, (entry.epoch, entry.as_of_ms))
        self.watermark_ms = max(self.watermark_ms, entry.as_of_ms)
        self._rows[name] = _Row({int(b): counts for b, counts in entry.buckets.items()})

    def _take_entity(self, name: str, record: Record) -> None:
        _, source, key = name.split("/", 2)
        crawl = self._crawls.get(source)
        if crawl is None:
            return
        if record.value is None:
            self._entities.pop((source, key), None)
            return
        try:
            entity = msgspec.json.decode(record.value, type=ExternalValue)
        except msgspec.MsgspecError as error:
            logger.error("record %d of %s holds no crawled entity: %s", record.offset, record.topic, error)
            return
        if entity.epoch < self._crawl_epoch:
            return
        self._crawl_epoch = entity.epoch
        values = values_of(bytes(entity.values), crawl)
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

    def follow(self, reader: Reader, topic: str, stop: threading.Event) -> None:
        """Read the topic until `stop`. While the broker is away, the memory stays as it is."""
        begun, is_away, target = False, False, 0
        while not stop.is_set():
            try:
                if not begun:
                    begin, target = reader.begin_offsets(topic)[0], reader.end_offsets(topic)[0]
                    reader.assign({(topic, 0): begin})
                    begun = True
                records = reader.poll(5_000, 0.2)
            except HeadraceError as error:
                if not is_away:
                    logger.warning("counters wait: %s", error)
                # What was assigned is still assigned, unless compaction took the offset: then all is read again.
                is_away, begun = True, begun and not isinstance(error, InvariantBroken)
                stop.wait(0.5)
                continue
            if is_away and records:
                logger.info("counters come again")
                is_away = False
            for record in records:
                self.take(record)
            if reader.position(topic, 0) >= target:
                self.is_caught_up = True
        reader.close()
