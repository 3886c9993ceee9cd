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
from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.crawl import CRAWL_TIME, PREFIX, Crawl
from headrace.contract.errors import HeadraceError, InvariantBroken
from headrace.contract.formats.events import EPOCH_MAX, Epoch, ExternalValue
from headrace.contract.formats.json_record import decode_json
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Reader, Record
from headrace.contract.metrics import Metrics
from headrace.contract.spec import Counter, FeatureSpec
from headrace.kernels.arrays import Bools, F64s, U64s
from headrace.kernels.hashes import hash128_integers, hash128_texts
from headrace.process.awake import Awake
from headrace.serving.counter_table import CounterTable, salt_of
from headrace.stream.features.counters import key_text, key_texts
from headrace.stream.features.external_values import values_of
from headrace.stream.features.few_rows import Few, Numbers, Same, Texts, arrow_of, few_of

logger = logging.getLogger("headrace.serve")

State = Literal["reading", "unread", "current", "behind", "stale"]
_ASK_S = 1.0
"""How often the topic's end is asked for."""
_FOREIGN = (msgspec.MsgspecError, HeadraceError, ValueError, TypeError, LookupError)
"""What a record raises that another program wrote into the topic, or that is damaged."""


_NEWEST = (1 << 63, 0)
Column: TypeAlias = pa.Array | Few


class _Entry(msgspec.Struct):
    as_of_ms: Epoch
    epoch: Epoch
    buckets: dict[str, list[int]]


class Entity(NamedTuple):
    """A crawled entity: its columns by name."""

    columns: dict[str, Any]
    packed: bytes
    """The same in a token: a msgpack array, in declared order."""


def entity_of(crawl: Crawl, columns: dict[str, Any]) -> Entity:
    """Return an entity of these columns."""
    return Entity(columns, msgspec.msgpack.encode([columns[name] for name in crawl.columns()]))


class Served(NamedTuple):
    """What a request's candidates are served: columns of one row hold for all of them."""

    rows: int
    counters: list[tuple[Counter, F64s]]
    """Values of each counter: float64 [rows or 1, entries]."""
    entities: list[tuple[Crawl, list[Entity]]]
    """What each source knows: `rows` or 1."""

    def columns(self, wanted: Container[str]) -> dict[str, Column]:
        """Return those columns that are wanted, as features read them."""
        columns: dict[str, Column] = {}
        for counter, values_NE in self.counters:
            for name, values_N in zip(counter.columns(), np.ascontiguousarray(values_NE.T, np.float32), strict=True):
                if name in wanted:
                    columns[name] = self._spread(Numbers(values_N), len(values_N))
        for crawl, entities in self.entities:
            for name, kind in crawl.columns().items():
                if name in wanted:
                    values = [entity.columns[name] for entity in entities]
                    columns[name] = self._spread(few_of(values, kind), len(entities))
        return columns

    def _spread(self, column: Numbers | Texts | pa.Array, rows: int) -> Column:
        return column if rows == self.rows else Same(column, self.rows)

    def matrix(self) -> npt.NDArray[np.float32]:
        """Return the values of all counters: float32 [rows, columns]."""
        values_NC = np.empty((self.rows, sum(values_NE.shape[1] for _, values_NE in self.counters)), np.float32)
        at = 0
        for _, values_NE in self.counters:
            values_NC[:, at : at + values_NE.shape[1]] = values_NE
            at += values_NE.shape[1]
        return values_NC

    def packed(self) -> list[list[bytes]]:
        """Return what each source knows of each candidate, as a token holds it."""
        each = ([entity.packed for entity in entities] for _, entities in self.entities)
        return [one if len(one) == self.rows else one * self.rows for one in each]

    def open(self) -> list[dict[str, Any]]:
        """Return all columns of each candidate by name: counters as float64, crawled values as they are."""
        opened: list[dict[str, Any]] = [{} for _ in range(self.rows)]
        for counter, values_NE in self.counters:
            names = counter.columns()
            rows = [dict(zip(names, row, strict=True)) for row in values_NE.tolist()]
            for into, row in zip(opened, rows if len(rows) == self.rows else rows * self.rows, strict=True):
                into.update(row)
        for _, entities in self.entities:
            found = entities if len(entities) == self.rows else entities * self.rows
            for into, entity in zip(opened, found, strict=True):
                into.update(entity.columns)
        return opened


class FeatureMemory:
    """Counters by (counter, key), crawled entities by (source, key). One thread writes, others read.

    A reader sees one key's values whole.
    """

    def __init__(self, crawls: Sequence[Crawl] = ()) -> None:
        self._table = CounterTable()
        self._said_of: dict[str, tuple[int, int]] = {}
        """(epoch, as of) of each key's value."""
        self._said = (0, 0)
        """That of the newest value; the keys of one time share it."""
        self._crawls = {crawl.name: crawl for crawl in crawls}
        self._entities: dict[str, dict[str | None, Entity]] = {crawl.name: {} for crawl in crawls}
        self._nothing = {crawl.name: _nothing_of(crawl) for crawl in crawls}
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
            if name in self._said_of and _said(record) >= self._said_of[name]:
                self._table.drop(name)
                del self._said_of[name]
            return
        entry: _Entry = decode_json(record.value, _Entry)
        said = (entry.epoch, entry.as_of_ms)
        if name in self._said_of and said < self._said_of[name]:
            return
        self._said = self._said if said == self._said else said
        self._table.put(name, {int(bucket): entries for bucket, entries in entry.buckets.items()})
        self.watermark_ms = max(self.watermark_ms, entry.as_of_ms)
        self._said_of[name] = self._said

    def _take_entity(self, name: str, record: Record) -> None:
        _, source, key = name.split("/", 2)
        crawl = self._crawls.get(source)
        if crawl is None:
            return
        if record.value is None:
            self._entities[source].pop(key, None)
            return
        entity: ExternalValue = decode_json(record.value, ExternalValue)
        if entity.epoch < self._crawl_epoch:
            return
        values = values_of(bytes(entity.values), crawl)
        self._crawl_epoch = entity.epoch
        named = {f"{PREFIX}.{source}.{field}": value for field, value in values.items()}
        named[f"{PREFIX}.{source}.{CRAWL_TIME}"] = entity.crawl_time_ms
        self._entities[source][key] = entity_of(crawl, named)

    def look_up(self, spec: FeatureSpec, raw: Mapping[str, Column], rows: int) -> Served:
        """Return every counter and crawled value of each of `rows` candidates, as of the newest watermark.

        `raw` as `scorer.merge` returns.
        """
        now_ms = self.watermark_ms
        keys_of: dict[tuple[str, ...], _Keys] = {}
        counters: list[tuple[Counter, F64s]] = []
        for counter in spec.counters:
            fields = counter.key_fields
            if fields not in keys_of:
                keys_of[fields] = _keys(raw, fields)
            keys_N2, known_N = keys_of[fields].hashed(salt_of(counter.name))
            counters.append((counter, self._table.values(counter, keys_N2, known_N, now_ms)))
        entities: list[tuple[Crawl, list[Entity]]] = []
        for crawl in self._crawls.values():
            known, nothing = self._entities[crawl.name], self._nothing[crawl.name]
            fields = (crawl.joins,)
            keys = keys_of.get(fields) or _keys(raw, fields)
            found = [known.get(key, nothing) for key in keys.texts()]
            entities.append((crawl, found))
        return Served(rows, counters, entities)

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


class _Keys(NamedTuple):
    """The key of each candidate; of one alone where all have the same."""

    column: Numbers | pa.Array
    """Integers without nulls, or texts."""

    def hashed(self, salt: int) -> tuple[U64s, Bools]:
        """Return `hash128_texts` of the keys: uint64 [N, 2], and which are there: bool [N]."""
        if isinstance(self.column, Numbers):
            return hash128_integers(self.column.values_N, salt), np.ones(len(self.column.values_N), np.bool_)
        return hash128_texts(self.column, salt), self.column.is_valid().to_numpy(zero_copy_only=False)

    def texts(self) -> list[str | None]:
        """Return them as texts."""
        if isinstance(self.column, Numbers):
            return list(map(str, self.column.values_N.tolist()))
        texts: list[str | None] = self.column.to_pylist()
        return texts


def _keys(raw: Mapping[str, Column], fields: Sequence[str]) -> _Keys:
    columns = [raw[field] for field in fields]
    same = [column.one for column in columns if isinstance(column, Same)]
    if len(same) == len(columns):
        columns = same
        plain = [_first(column) for column in columns]
        if len(columns) > 1 and all(type(value) in (int, str, type(None)) for value in plain):
            return _Keys(pa.array([key_text(plain)], pa.string()))
    (first, *others) = columns
    if not others and isinstance(first, Numbers) and first.values_N.dtype == np.int64 and first.missing_N is None:
        return _Keys(first)
    return _Keys(key_texts([arrow_of(column) for column in columns]))


def _first(column: Numbers | Texts | pa.Array) -> Any:
    """Return the value of a column of one row."""
    if isinstance(column, Texts):
        return column.texts[0]
    if isinstance(column, Numbers):
        is_missing = column.missing_N is not None and bool(column.missing_N[0])
        return None if is_missing else column.values_N[0].item()
    return column[0].as_py()


def _nothing_of(crawl: Crawl) -> Entity:
    return entity_of(crawl, dict.fromkeys(crawl.columns()) | {f"{PREFIX}.{crawl.name}.{CRAWL_TIME}": 0})


def _said(gone: Record) -> tuple[int, int]:
    """Return of when it is that a key is gone; what release 0.1 wrote does not say, and counts."""
    try:
        said = int(gone.headers["epoch"]), int(gone.headers["as_of_ms"])
        return said if max(map(abs, said)) < EPOCH_MAX else _NEWEST
    except (LookupError, ValueError):
        return _NEWEST
