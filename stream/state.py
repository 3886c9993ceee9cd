"""Snapshots of a join's state: one self-contained blob, msgpack around one Arrow stream of what waits. Pure.

The blob carries the offset it was taken at, the last emitted position and a digest of what the state depends on; a
state of another digest is refused, since going on with it would not be what the log says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import zlib
from typing import Any

import msgspec
import pyarrow as pa

from headrace.contract.errors import InvariantBroken
from headrace.contract.events import encode_batch
from headrace.contract.positions import Position
from headrace.contract.project import Project
from headrace.stream.join import Early, JoinState, Source, TaskCounts, Waiting

VERSION = 1


def dependence(project: Project) -> str:
    """Return a digest of all declarations that a join's state depends on."""
    return hashlib.sha256(
        msgspec.json.encode([project.impression, project.feedback, project.tasks, project.features])
    ).hexdigest()[:16]


def encode_state(state: JoinState) -> bytes:
    """Return the whole state; `decode_state` goes on from it exactly."""
    sources: list[pa.RecordBatch] = []
    waiting: list[list[Any]] = []
    by_source: dict[int, list[tuple[bytes, Waiting]]] = {}
    for key, w in state.waiting.items():
        by_source.setdefault(w.source, []).append((key, w))
    for source, items in by_source.items():
        sources.append(state.sources[source].batch.take(pa.array([w.row for _, w in items], pa.int64())))
        waiting += [[k, w.offset, w.record_row, w.event_time_ms, w.base_ms, w.open, w.positive] for k, w in items]
    rows = pa.concat_batches(sources) if sources else None
    totals = dataclasses.asdict(state.totals)
    plain = {
        "v": VERSION,
        "needs": dependence(state.project),
        "partition": state.partition,
        "offset": state.offset,
        "last": list(state.last),
        "watermark": state.watermark.to_plain(),
        "totals": totals,
        "locals": [c.to_plain() for c in state.locals],
        "aggregates": state.aggregates.to_plain(),
        "seen": state.seen.to_plain(),
        "resolved": state.resolved.to_plain(),
        "waiting": waiting,
        "rows": b"" if rows is None else encode_batch(rows),
        "early": [
            [k, n, [[e.feedback_id, e.event_time_ms, e.deadline_ms] for e in es]] for (k, n), es in state.early.items()
        ],
    }
    return zlib.compress(msgspec.msgpack.encode(plain), 1)


def load_state(state: JoinState, data: bytes) -> None:
    """Make a fresh `state` what was encoded. Raises `InvariantBroken` when it belongs to other declarations."""
    plain = msgspec.msgpack.decode(zlib.decompress(data))
    if plain["v"] != VERSION or plain["needs"] != dependence(state.project) or plain["partition"] != state.partition:
        raise InvariantBroken(
            f"the stored state of partition {plain['partition']} is of format {plain['v']} and declarations "
            f"{plain['needs']}; this is {VERSION} and {dependence(state.project)}. Raise log.generation to begin anew."
        )
    state.offset, state.last = plain["offset"], Position(*plain["last"])
    state.watermark.load_plain(plain["watermark"])
    totals = plain["totals"]
    for name in ("impressions", "feedback", "repeated_in_log", "bad_records"):
        setattr(state.totals, name, totals[name])
    state.totals.tasks = [TaskCounts(**counts) for counts in totals["tasks"]]
    for counter, kept in zip(state.locals, plain["locals"], strict=True):
        counter.load_plain(kept)
    state.aggregates.load_plain(plain["aggregates"])
    state.seen.load_plain(plain["seen"])
    state.resolved.load_plain(plain["resolved"])
    _load_waiting(state, plain)
    state.early = {(k, n): [Early(*e) for e in es] for k, n, es in plain["early"]}
    state.early_rows = sum(len(es) for es in state.early.values())
    state.deadlines = [(e.deadline_ms, k, n) for (k, n), es in state.early.items() for e in es]
    heapq.heapify(state.deadlines)


def _load_waiting(state: JoinState, plain: dict[str, Any]) -> None:
    if not plain["waiting"]:
        return
    with pa.ipc.open_stream(pa.py_buffer(plain["rows"])) as reader:
        batch = reader.read_next_batch()
    tasks = len(state.project.tasks)
    answered = 0
    for row, (key, offset, record_row, time_ms, base_ms, open_, positive) in enumerate(plain["waiting"]):
        state.waiting[key] = Waiting(0, row, offset, record_row, time_ms, base_ms, open_, positive)
        for task in range(tasks):
            if open_ >> task & 1:
                expiry_ms = base_ms + state.project.tasks[task].window_ms
                state.expiries.append((expiry_ms, offset, record_row, task, key))
            else:
                answered += 1
    heapq.heapify(state.expiries)
    state.sources[0] = Source(batch, batch.num_rows * tasks - answered)
    state.next_source = 1
