"""Snapshots of a join's state, incremental: a manifest, and parts that are written once and never change. Pure.

| what | where |
|---|---|
| rules: those in force, and those that something waits under | the manifest |
| impressions that wait: keys, times, columns | a part for each full piece; the open ones in the manifest |
| what was seen and resolved | parts by sequence number, eight of a size merged; the newest rows in the manifest |
| counters | whole in the manifest while few; then a base and at most 16 parts of what changed |
| bits of what is answered, early feedback, aggregates, watermark, totals, positions | the manifest |

A part's name says what is in it: from which to which row, or since which offset. So two workers that write the same
name write the same rows, also where one was declared dead and writes on, or dies between parts and manifest. The
manifest carries the offset it was taken at, the last emitted position and the rules in force there, which are what the
log said: those of the project that a restarted worker loads are not asked.

Taking a snapshot copies little; encoding it touches nothing of the state any more and may run in another thread.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.events import decode_batch, encode_batch
from headrace.contract.formats.positions import Position
from headrace.contract.project import FeedbackType
from headrace.contract.rules import Rules
from headrace.contract.spec import Counter
from headrace.kernels.ring_table import FIRST, NEXT
from headrace.stream.join.join import JoinState
from headrace.stream.join.local_counters import LocalCounter, Rows
from headrace.stream.join.outcome import TaskCounts, Totals
from headrace.stream.join.payload import Piece
from headrace.stream.join.recent_keys import RecentKeys
from headrace.stream.join.rules_in_force import Lane, RulesInForce

VERSION = 3
INLINE_ROWS = 16_384
"""Rows that a manifest may carry itself; more of them become a part."""
MERGED = 8
"""So many parts of a size become one of the next."""
CHAIN_MAX = 16
"""Most parts on top of a counter's base."""
_RULES = "eras"
"""Key of the rules in force, each with what waits under them. Stored states have it, so it stays."""
_KEYS = ("low", "high", "base_ms")

Encode = Callable[[], bytes]


class Damaged(Exception):
    """A manifest or one of its parts can't be read; the snapshot before may be whole."""


@dataclass
class Snapshot:
    """A state at an offset: encode it and store parts before the manifest."""

    offset: int
    plain: dict[str, Any]
    fresh: dict[str, Encode] = field(default_factory=dict)
    """Parts that were not in any snapshot before."""

    @property
    def names(self) -> list[str]:
        """All parts that the manifest needs."""
        return part_names(self.plain)

    def manifest(self) -> bytes:
        """Return the manifest's bytes."""
        return zlib.compress(msgspec.msgpack.encode(self.plain, enc_hook=_bytes_of), 1)


@dataclass
class _Spans:
    """Which sequence numbers lie in which parts: (first, following), ascending, without gaps."""

    spans: list[tuple[int, int]] = field(default_factory=list)

    def extend(self, first: int, following: int) -> list[tuple[int, int]]:
        """Cover what lies below `following` but for a rest, forget what lies below `first`; return the new spans."""
        before = set(self.spans)
        self.spans = [span for span in self.spans if span[1] > first]
        start = self.spans[-1][1] if self.spans else first
        if following - start >= INLINE_ROWS:
            self.spans.append((start, following))
        while len(last := self.spans[-MERGED:]) == MERGED and last[0][1] - last[0][0] <= MERGED * _rows(last[-1]):
            # What is forgotten is not written: the span says what its part holds.
            self.spans[-MERGED:] = [(max(last[0][0], first), last[-1][1])]
        return [span for span in self.spans if span not in before]


class StateWriter:
    """Takes snapshots of one state, each with what is new since the one before."""

    def __init__(self, state: JoinState) -> None:
        self.state = state
        self._memories = {"seen": _Spans(), "resolved": _Spans()}
        self._pieces: dict[int, str] = {}
        self._external = ""
        self._chains: dict[Counter, tuple[list[str], list[int]]] = {}
        """Of each counter the names of its parts, and their rows."""

    def take(self) -> Snapshot:
        """Return the state as it is now."""
        state = self.state
        plain: dict[str, Any] = {
            "v": VERSION,
            "partition": state.partition,
            "offset": state.offset,
            "last": list(state.last),
            "watermark": state.watermark.to_plain(),
            "totals": state.row_totals(),
            "counts": state.counts_T9.copy(),
            "lanes": list(state.lanes),
            "feedback": msgspec.to_builtins(list(state.feedback.values())),
            "answers": list(state.answers),
            "aggregates": state.aggregates.to_plain(),
        }
        snapshot = Snapshot(state.offset, plain)
        for name, spans in self._memories.items():
            plain[name] = self._take_memory(name, getattr(state, name), spans, snapshot)
        plain[_RULES] = [self._take_waiting(rules, snapshot) for rules in state.rules_in_force]
        needed = {part for kept in plain[_RULES] for part in kept["parts"]}
        self._pieces = {start: name for start, name in self._pieces.items() if name in needed}
        plain["external"] = self._take_external(snapshot)
        self._chains = {table.counter: self._chains.get(table.counter, ([], [])) for table in state.local_counters}
        plain["locals"] = [self._take_counter(table, snapshot) for table in state.local_counters]
        first, *columns = state.early.rows()
        plain["early"] = [first, *columns, list(state.early.ids.items())]
        plain["early_values"] = list(state.early.values.items())
        return snapshot

    def resume(self, plain: Mapping[str, Any]) -> None:
        """Go on after the snapshot that the state was loaded from."""
        for name, spans in self._memories.items():
            spans.spans = [(a, b) for a, b in plain[name]["spans"]]
        self._pieces = {_start_of(name): name for kept in plain[_RULES] for name in kept["parts"]}
        self._external = plain.get("external", "")
        for table, kept in zip(self.state.local_counters, plain["locals"], strict=True):
            self._chains[table.counter] = list(kept["parts"]), list(kept["rows"])

    def _take_memory(self, name: str, memory: RecentKeys, spans: _Spans, snapshot: Snapshot) -> dict[str, Any]:
        first, following = memory.live
        for a, b in spans.extend(first, following):
            snapshot.fresh[f"{name}-{a}-{b}"] = _encoder([a, *memory.rows(a, b)])
        rest = spans.spans[-1][1] if spans.spans else first
        return {
            "slices": memory.slices,
            "first": first,
            "spans": list(spans.spans),
            "rest": list(memory.rows(rest, following)),
        }

    def _take_waiting(self, rules: RulesInForce, snapshot: Snapshot) -> dict[str, Any]:
        payload, head = self.state.payload, rules.pending.arrays.ring.head
        first, following = int(head[FIRST]), int(head[NEXT])
        parts: list[str] = []
        for piece in payload.full:
            start, end = max(piece.first, first), piece.first + piece.batch.num_rows
            if not rules.first <= piece.first < following:
                continue
            if piece.first not in self._pieces:
                self._pieces[piece.first] = f"rows-{start}-{end}"
                snapshot.fresh[self._pieces[piece.first]] = self._piece_encoder(rules, piece, start)
            parts.append(self._pieces[piece.first])
        open_ = [(max(p.first, first), p) for p in payload.open if p.live and rules.first <= p.first < following]
        return {
            "number": rules.number,
            "rules": msgspec.to_builtins(rules.declared),
            "begins": rules.first,
            "first": first,
            "following": following,
            "bits": rules.pending.bits(first, following),
            "parts": parts,
            "open": [[start, self._piece_encoder(rules, piece, start)] for start, piece in open_],
        }

    def _take_external(self, snapshot: Snapshot) -> str:
        """Return the part with all crawled versions: a new one when any changed, which is seldom."""
        external = self.state.external
        name = f"external-{external.changes}" if external.changes else ""
        if name != self._external:
            snapshot.fresh[name] = _encoder(external.to_plain())
            self._external = name
        return name

    def _piece_encoder(self, rules: RulesInForce, piece: Piece, start: int) -> Encode:
        """Return what encodes a piece's rows from sequence number `start` on, with keys and times as columns."""
        keys_N2, times_N2 = rules.pending.rows(start, piece.first + piece.batch.num_rows)
        batch = piece.batch.slice(start - piece.first)
        extra = [keys_N2[:, 0].view(np.int64), keys_N2[:, 1].view(np.int64), times_N2[:, 1]]

        def encode() -> bytes:
            arrays = [*batch.columns, *(pa.array(np.ascontiguousarray(column)) for column in extra)]
            return encode_batch(pa.RecordBatch.from_arrays(arrays, names=[*batch.schema.names, *_KEYS]))

        return encode

    def _take_counter(self, table: LocalCounter, snapshot: Snapshot) -> dict[str, Any]:
        chain, sizes = self._chains[table.counter]
        changed = table.rows(changed=bool(chain))
        rows = len(changed.number_R)
        if chain and (len(chain) >= CHAIN_MAX or sum(sizes[1:]) + rows > sizes[0]):
            chain.clear()
            sizes.clear()
            changed = table.rows(changed=False)
            rows = len(changed.number_R)
        whole: list[Any] = []
        if not chain and rows <= INLINE_ROWS:
            whole = list(changed)
        elif rows:
            declared = hashlib.sha256(msgspec.json.encode(table.counter)).hexdigest()[:8]
            kind = f"delta-{chain[-1].rpartition('-')[2]}" if chain else "base"
            name = f"counter-{declared}-{kind}-{self.state.offset}"
            snapshot.fresh[name] = _encoder(list(changed))
            chain.append(name)
            sizes.append(rows)
        return {"floor": table.floor, "parts": list(chain), "rows": list(sizes), "whole": whole}


def part_names(plain: Mapping[str, Any]) -> list[str]:
    """Return the names of all parts that a decoded manifest needs."""
    memories = [f"{name}-{a}-{b}" for name in ("seen", "resolved") for a, b in plain[name]["spans"]]
    external = [plain["external"]] if plain.get("external") else []
    return [
        *memories,
        *external,
        *(part for kept in plain[_RULES] for part in kept["parts"]),
        *(part for kept in plain["locals"] for part in kept["parts"]),
    ]


def read_manifest(data: bytes) -> dict[str, Any]:
    """Return a manifest's content. Raises `Damaged`."""
    try:
        plain: dict[str, Any] = msgspec.msgpack.decode(zlib.decompress(data))
    except (zlib.error, msgspec.DecodeError) as error:
        raise Damaged(f"a manifest of {len(data)} bytes: {error}") from error
    return plain


def rules_kept(plain: Mapping[str, Any]) -> dict[int, Rules]:
    """Return, by their numbers, the rules in force that a decoded manifest has; none of one of another format."""
    if plain.get("v") != VERSION:
        return {}
    return {kept["number"]: msgspec.convert(kept["rules"], Rules) for kept in plain[_RULES]}


def load(state: JoinState, plain: Mapping[str, Any], part: Callable[[str], bytes | None]) -> StateWriter:
    """Make a fresh `state` what was stored; the writer returned takes further snapshots on top of it.

    Raises `InvariantBroken` when it is of another format or another partition key, `Damaged` when a part is missing.
    """
    key, format_ = state.project.impression.key, plain["v"]
    stored_key = plain[_RULES][-1]["rules"]["key"] if format_ == VERSION else key
    if format_ != VERSION or plain["partition"] != state.partition or stored_key != key:
        raise InvariantBroken(
            f"the stored state of partition {plain['partition']} is of format {format_} and partition key "
            f"{stored_key!r}; this is {VERSION} and {key!r}. Raise log.generation to begin anew."
        )

    def fetch(name: str) -> bytes:
        data = part(name)
        if data is None:
            raise Damaged(f"part {name} is missing")
        return data

    state.offset, state.last = plain["offset"], Position(*plain["last"])
    state.watermark.load_plain(plain["watermark"])
    state.load_totals(plain["totals"])
    counts_T9 = _array(plain["counts"], np.int64, 9).copy()
    feedback = msgspec.convert(plain["feedback"], list[FeedbackType])
    state.resume_rules([(name, of) for name, of in plain["lanes"]], feedback, plain["answers"], counts_T9)
    for kept in plain[_RULES]:
        state.begin_rules(kept["number"], msgspec.convert(kept["rules"], Rules), first=kept["begins"])
    state.aggregates.load_plain(plain["aggregates"])
    if plain.get("external"):
        state.external.load_plain(_plain_of(fetch(plain["external"])))
    for name in ("seen", "resolved"):
        _load_memory(name, getattr(state, name), plain[name], fetch)
    for table, kept in zip(state.local_counters, plain["locals"], strict=True):
        several = [_rows_of(_plain_of(fetch(name))) for name in kept["parts"]]
        table.load(kept["floor"], [*several, *([_rows_of(kept["whole"])] if kept["whole"] else [])])
    loaded = [
        _load_waiting(rules, kept, fetch) for rules, kept in zip(state.rules_in_force, plain[_RULES], strict=True)
    ]
    state.payload.load([piece for pieces in loaded for piece in pieces])
    first, keys, facts, kinds, ids = plain["early"]
    columns = _array(keys, np.uint64, 2), _array(facts, np.int64, 3), _array(kinds, np.uint8)
    state.early.load(first, *columns, dict(ids), dict(plain.get("early_values", ())))
    writer = StateWriter(state)
    writer.resume(plain)
    return writer


def encode_state(state: JoinState) -> bytes:
    """Return the whole state as one blob, manifest and parts; `load_state` goes on from it exactly."""
    snapshot = StateWriter(state).take()
    return msgspec.msgpack.encode([snapshot.manifest(), {name: encode() for name, encode in snapshot.fresh.items()}])


def load_state(state: JoinState, data: bytes) -> None:
    """Make a fresh `state` what `encode_state` gave."""
    manifest, parts = msgspec.msgpack.decode(data)
    load(state, read_manifest(manifest), parts.get)


def _load_memory(name: str, memory: RecentKeys, plain: Mapping[str, Any], fetch: Callable[[str], bytes]) -> None:
    keys, values = [np.empty((0, 2), np.uint64)], [np.empty(0, np.uint8)]
    for a, b in plain["spans"]:
        start, raw_keys, raw_values = _plain_of(fetch(f"{name}-{a}-{b}"))
        if start > max(a, plain["first"]) or start + len(raw_values) != b:
            raise Damaged(f"part {name}-{a}-{b} holds {len(raw_values)} rows from {start} on")
        gone = max(0, plain["first"] - start)
        keys.append(_array(raw_keys, np.uint64, 2)[gone:])
        values.append(_array(raw_values, np.uint8)[gone:])
    raw_keys, raw_values = plain["rest"]
    keys.append(_array(raw_keys, np.uint64, 2))
    values.append(_array(raw_values, np.uint8))
    memory.load([tuple(s) for s in plain["slices"]], plain["first"], np.concatenate(keys), np.concatenate(values))


def _load_waiting(rules: RulesInForce, kept: Mapping[str, Any], fetch: Callable[[str], bytes]) -> list[Piece]:
    """Fill rules with what waits under them, and return its columns that are still asked for."""
    rules.pending.begin(kept["first"], kept["following"])
    bits_N2 = _array(kept["bits"], np.uint8, 2)
    stored = [(_start_of(name), fetch(name)) for name in kept["parts"]] + [tuple(o) for o in kept["open"]]
    pieces: list[Piece] = []
    for start, data in stored:
        batch = decode_batch(data)
        width = batch.num_columns - len(_KEYS)
        low_N, high_N, base_N = (batch.column(width + i).to_numpy() for i in range(len(_KEYS)))
        columns = pa.RecordBatch.from_arrays(batch.columns[:width], schema=rules.source_schema)
        keys_N2 = np.ascontiguousarray(np.stack([low_N, high_N], axis=1)).view(np.uint64)
        gone = max(0, kept["first"] - start)
        at = start + gone - kept["first"]
        bits = bits_N2[at : at + batch.num_rows - gone]
        event_N = columns.column("event_time_ms").to_numpy()
        live = rules.pending.restore(start + gone, keys_N2[gone:], event_N[gone:], base_N[gone:], bits)
        pieces.append(Piece(start, columns, live, bytes=columns.nbytes))
    return [piece for piece in pieces if piece.live]


def _start_of(part: str) -> int:
    return int(part.split("-")[1])


def _rows(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _encoder(values: list[Any]) -> Encode:
    return lambda: zlib.compress(msgspec.msgpack.encode(values, enc_hook=_bytes_of), 1)


def _plain_of(data: bytes) -> list[Any]:
    try:
        plain: list[Any] = msgspec.msgpack.decode(zlib.decompress(data))
    except (zlib.error, msgspec.DecodeError) as error:
        raise Damaged(f"a part of {len(data)} bytes: {error}") from error
    return plain


def _bytes_of(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if callable(value):
        return value()
    raise NotImplementedError(f"{type(value).__name__} is not part of a state")


def _array(raw: bytes, kind: type, width: int = 0) -> Any:
    flat: Any = np.frombuffer(raw, kind)
    return flat.reshape(-1, width) if width else flat


def _rows_of(plain: list[Any]) -> Rows:
    keys, numbers, counts = plain
    number_R = _array(numbers, np.int64)
    entries = len(counts) // 8 // max(1, len(number_R))
    return Rows(_array(keys, np.uint64, 2), number_R, _array(counts, np.int64).reshape(len(number_R), entries))


def totals_of(plain: Mapping[str, Any]) -> tuple[Totals, list[Lane], dict[str, int]]:
    """Return, of a manifest, what became of all rows so far, the tasks with their feedback in the order of
    `Totals.tasks`, and the rows of each type of feedback, repeats left out.
    """
    impressions, feedback, repeated_in_log, bad_records, too_late = [*plain["totals"], 0][:5]
    told = zip(_array(plain["counts"], np.int64, 9).tolist(), [tuple(lane) for lane in plain["lanes"]], strict=True)
    kept = [(TaskCounts(*row), lane) for row, lane in told if lane[1]]
    totals = Totals(impressions, feedback, repeated_in_log, bad_records, too_late, [counts for counts, _ in kept])
    answers = {of["name"]: count for of, count in zip(plain["feedback"], plain["answers"], strict=True)}
    return totals, [lane for _, lane in kept], answers
