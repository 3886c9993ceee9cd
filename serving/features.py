"""Serving's memory of the `features` topic: the counters' buckets by key, evaluated at the newest watermark seen."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

import msgspec

from headrace.contract.errors import HeadraceError
from headrace.contract.log import Reader, Record
from headrace.contract.spec import Counter, FeatureSpec
from headrace.stream.features.counters import value_as_of

logger = logging.getLogger("headrace.serve")


class _Entry(msgspec.Struct):
    as_of_ms: int
    epoch: int
    buckets: dict[str, list[int]]


class FeatureMemory:
    """Counters by (counter, key). Written by one thread, read by others; a read sees one key's value whole."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[int, list[int]]] = {}
        self._fence: tuple[int, int] = (0, 0)
        self.watermark_ms = 0
        self.is_caught_up = False

    def take(self, record: Record) -> None:
        """Take one record; one of a lower epoch was written by a fenced-off aggregator and is dropped."""
        name = (record.key or b"").decode()
        if record.value is None:
            self._rows.pop(name, None)
            return
        entry = msgspec.json.decode(record.value, type=_Entry)
        if entry.epoch < self._fence[0]:
            return
        self._fence = max(self._fence, (entry.epoch, entry.as_of_ms))
        self.watermark_ms = max(self.watermark_ms, entry.as_of_ms)
        self._rows[name] = {int(b): counts for b, counts in entry.buckets.items()}

    def counts(self, counter: Counter, key: str) -> list[int]:
        """Return one count for each of `counter.counts`, zeros where nothing is known."""
        row = self._rows.get(f"{counter.name}/{key}")
        return [0] * len(counter.counts) if row is None else value_as_of(row, counter, self.watermark_ms)

    def columns(self, spec: FeatureSpec, fields: Mapping[str, Any]) -> dict[str, float]:
        """Return every counter column of one candidate."""
        found: dict[str, float] = {}
        for counter in spec.counters:
            key = fields.get(counter.key)
            counts = [0] * len(counter.counts) if key is None else self.counts(counter, str(key))
            found.update(zip(counter.columns(), map(float, counts), strict=True))
        return found

    def follow(self, reader: Reader, topic: str, stop: threading.Event) -> None:
        """Read the topic until `stop`; a broker that stays away leaves the memory as it is."""
        begun = False
        while not stop.is_set():
            try:
                if not begun:
                    begin, target = reader.begin_offsets(topic)[0], reader.end_offsets(topic)[0]
                    reader.assign({(topic, 0): begin})
                    begun, seen = True, begin
                records = reader.poll(5_000, 0.2)
            except HeadraceError as error:
                logger.warning("counters wait for Kafka: %s", error)
                begun = False
                stop.wait(1.0)
                continue
            for record in records:
                self.take(record)
                seen = record.offset + 1
            # A compacted tail may end in markers that are never given: an empty poll is the end, too.
            if seen >= target or not records:
                self.is_caught_up = True
        reader.close()
