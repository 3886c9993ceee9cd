"""The aggregate stage: settled counters into every partition of `events`, and all of them to `features`.

It reads all partitions of `events` and skips its own records. What a grid point settled is written: counters over other
keys than the partition's to every partition of `events` (epoch first, then time), and every counter's buckets to
`features`, keyed "<counter>/<key>"; an emptied key is deleted. The state becomes durable, every
`aggregate.snapshot_ms`, as `headrace.stream.shell.durable_state` says; it has no parts:

1. Snapshot: take the state at its offsets, and count the records that were sent up to then.
2. Deliver: wait until all of these records have their receipts, and make sure that no other aggregator took over.
3. Store: put the snapshot's manifest, which makes it whole.
4. Acknowledge: let Faust commit up to the snapshot's offsets. Then delete old manifests.

A state whose counters `features` has lost since is left for an older one, or for the log's beginning.

A restart settles the points after its state once more, under a higher epoch and with equal values. Of several
aggregators one owns all partitions and the others wait (`headrace.stream.shell.one_owner`); one that was declared dead
and writes on has a lower epoch (`headrace.stream.aggregate.epochs`), and is ignored.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import pyarrow as pa

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.events import AGGREGATE, AGGREGATE_SCHEMA, encode_batch
from headrace.contract.interfaces.log import Record, check_topic
from headrace.process.waits import Waits
from headrace.stream.aggregate.core import AggregatorState, Settled
from headrace.stream.aggregate.epochs import Epochs, epoch_of, headers_of
from headrace.stream.join.state import Damaged
from headrace.stream.shell.dependencies import StageDependencies
from headrace.stream.shell.durable_state import (
    AheadOfLog,
    DurableState,
    Outgoing,
    StateSnapshot,
    StateStore,
    await_stored,
)
from headrace.stream.shell.engine import Engine
from headrace.stream.shell.kept_log import KeptLog, can_go_back, kept_log, mark_of
from headrace.stream.shell.unreadable_events import tell_unreadable

RECORD_ROWS = 5_000


class AggregateStage:
    """The shell around `AggregatorState`; see the module for the protocol."""

    name = "aggregate"
    has_one_owner = True
    durable_state = DurableState

    def __init__(self, deps: StageDependencies) -> None:
        self.deps = deps
        self.topic = deps.topics.events
        self.engine: Engine | None = None
        self.state: AggregatorState | None = None
        self.epoch = 0
        self._epochs: Epochs | None = None
        self._waits = Waits(deps.clock)
        self.durable = self.durable_state(
            deps,
            StateStore(deps.blobs, self._waits),
            self,
            folder=f"state/aggregate/g{deps.topics.generation}",
            every_ms=deps.config.aggregate.snapshot_ms,
            confirm=self._confirm,
        )
        self._marks: dict[int, Sequence[int]] = {}
        """Of each partition the record that the state contains last, as `mark_of` gives it."""
        self._goes_back = False
        self._metrics_due_s = 0.0
        self._failure: BaseException | None = None

    async def begin(self, partition: int) -> int | None:
        """Restore the newest readable state, common to all partitions."""
        if self.state is None:
            self.state = await self._restore()
        offset = self.state.offsets[partition]
        return offset + 1 if offset >= 0 or self._goes_back else None

    async def take_all(self, records: Sequence[Record]) -> None:
        """Take records of one partition, in order."""
        bad = 0 if self.state is None else self.state.bad_records
        for record in records:
            await self.take(record)
        tell_unreadable(records, 0 if self.state is None else self.state.bad_records - bad, self.deps.metrics)

    async def take(self, record: Record) -> None:
        """Count one record and write what it settled."""
        if self.state is None:
            raise InvariantBroken("a partition was taken away while others stay: restart, state is restored.")
        self.deps.metrics.add("records_read_total")
        if record.headers.get("kind") == AGGREGATE:
            if self._epochs is not None:
                self._epochs.check(epoch_of(record))
            self.state.offsets[record.partition] = record.offset
            self._marks[record.partition] = mark_of(record)
            return
        self._marks[record.partition] = mark_of(record)
        settled = self.state.take(record)
        if settled:
            await self._write(settled)

    async def tick(self) -> None:
        """Run receipts; begin a snapshot that is due."""
        self.deps.producer.poll(0.0)
        if self._failure is not None:
            raise self._failure
        self._waits.check()
        if self.state is None:
            return
        if self.durable.is_due():
            self._snapshot(self.state)
        now_s = self.deps.clock.monotonic()
        if self.engine is not None and now_s >= self._metrics_due_s:
            self._metrics_due_s = now_s + 1.0
            self.deps.metrics.set("lag_records", self.engine.lag())
            self.deps.metrics.set("watermark_ms", min(w.time_ms for w in self.state.watermarks))

    def drop(self, partitions: set[int]) -> None:
        """Forget the state: it is restored with the next assignment."""
        if partitions:
            self.state = None
            self.durable.cancel()

    async def _confirm(self) -> None:
        if self._epochs is not None:
            await self._epochs.confirm()

    async def finish(self) -> None:
        """Store the state. Raises what stopped the stage: nothing is stored then."""
        if self._failure is not None:
            raise self._failure
        if self.state is not None:
            self._snapshot(self.state)
        await await_stored([self.durable], self.deps.producer)
        if self._failure is not None:
            raise self._failure

    def acknowledge(self, offsets: Mapping[int, int]) -> None:
        """Let Faust commit up to these offsets: what they led to is durable."""
        for partition, offset in offsets.items():
            if self.engine is not None:
                self.engine.acknowledge(partition, offset)

    def fail(self, error: BaseException) -> None:
        """Stop the stage with this error at its next tick, the first one that came."""
        self._failure = self._failure or error

    async def _restore(self) -> AggregatorState:
        self._marks = {}
        with kept_log(self.deps.open_reader) as kept:
            check = None if kept is None else partial(self._check, kept)
            state = await self.durable.restore(_read, self._load, check=check)
            partitions, lost = range(self.deps.config.log.partitions), self.deps.topics.features
            self._goes_back = self.durable.is_ahead and await can_go_back(
                *(kept, self._waits, self.deps, partitions), lost=lost, stage=self.name
            )
        if state is None:
            state = self._new_state()
        epoch = state.epoch_seen + 1
        if self.deps.open_reader is not None:
            self._epochs = Epochs(self.deps.producer, self.deps.open_reader, self.topic, self._waits)
            await self._epochs.claim(state.epoch_seen, state.offsets)
            epoch = self._epochs.epoch
        self.epoch = state.epoch_seen = epoch
        self.durable.stored = dict(enumerate(state.offsets))
        return state

    def _new_state(self) -> AggregatorState:
        config = self.deps.config
        return AggregatorState(
            self.deps.project,
            config.log.partitions,
            grid_ms=config.aggregate.grid_ms,
            silent_ms=config.ingest.silent_ms,
            horizon_ms=config.join.repeat_horizon_ms,
        )

    def _check(self, kept: KeptLog, plain: Mapping[str, Any]) -> None:
        """Look whether the log holds what a state was made of, and what it wrote. An older state does not say which."""
        check_topic(plain.get("topic_id", ""), self.deps.topic_id, self.topic)
        for partition, mark in plain.get("marks", ()):
            kept.check_read(self.topic, partition, mark)
        features, reached = self.deps.topics.features, plain.get("features_reached", -1)
        if (end := kept.ends_at(features)[0]) <= reached:
            raise AheadOfLog(f"{features}/0 ends at {end}, and offset {reached} of it had been confirmed")
        self.durable.reached[features, 0] = end - 1

    def _load(self, plain: dict[str, Any], _part: Callable[[str], bytes | None]) -> AggregatorState:
        check_topic(plain.get("topic_id", ""), self.deps.topic_id, self.topic)
        state = self._new_state()
        state.load_plain(plain)
        self._marks = dict(plain.get("marks", ()))
        return state

    def _snapshot(self, state: AggregatorState) -> None:
        """Begin a snapshot, unless the state has been stored as it is."""
        offsets = dict(enumerate(state.offsets))

        def take() -> StateSnapshot:
            plain = {**state.to_plain(), "topic_id": self.deps.topic_id, "marks": list(self._marks.items())}
            packed = {name: msgspec.Raw(msgspec.msgpack.encode(value)) for name, value in plain.items()}

            def encode() -> bytes:
                # All of its records have their receipts by now: it is known how far `features` goes.
                reached = self.durable.reached.get((self.deps.topics.features, 0), -1)
                return zlib.compress(msgspec.msgpack.encode({**packed, "features_reached": reached}), 1)

            # Offsets only grow, and so does their sum: names sort in the order of the log.
            return StateSnapshot(offsets, f"{sum(offsets.values()) + len(offsets):020d}", encode)

        self.durable.begin(offsets, take)

    async def _write(self, settled: list[Settled]) -> None:
        partitions = range(self.deps.config.log.partitions)
        shared = [s for s in settled if s.is_shared]
        pieces = [shared[start : start + RECORD_ROWS] for start in range(0, len(shared), RECORD_ROWS)]
        count = len(pieces) * len(partitions) + len(settled)
        await self.durable.send(count, self._outgoing(partitions, pieces, settled))
        self.deps.metrics.add("aggregates_written_total", len(settled))

    def _outgoing(
        self, partitions: Sequence[int], pieces: list[list[Settled]], settled: list[Settled]
    ) -> Iterator[Outgoing]:
        for rows in pieces:
            columns = [
                pa.array([s.counter for s in rows], pa.string()),
                pa.array([s.key for s in rows], pa.string()),
                pa.array([s.as_of_ms for s in rows], pa.int64()),
                pa.array([self.epoch] * len(rows), pa.int64()),
                pa.array([s.counts for s in rows], pa.list_(pa.float32())),
            ]
            value = encode_batch(pa.RecordBatch.from_arrays(columns, schema=AGGREGATE_SCHEMA))
            headers = headers_of(self.epoch)
            for partition in partitions:
                yield Outgoing(self.deps.topics.events, partition, value, headers=headers)
        for item in settled:
            body = {
                "counter": item.counter,
                "key": item.key,
                "as_of_ms": item.as_of_ms,
                "epoch": self.epoch,
                "bucket_ms": item.bucket_ms,
                "buckets": {str(b): counts for b, counts in item.buckets.items()},
            }
            value_or_gone = msgspec.json.encode(body) if item.buckets else None
            key = f"{item.counter}/{item.key}".encode()
            # A deleted key has no value to say it in.
            said = {"epoch": str(self.epoch), "as_of_ms": str(item.as_of_ms)}
            yield Outgoing(self.deps.topics.features, 0, value_or_gone, key=key, headers=said)


def _read(data: bytes) -> dict[str, Any]:
    """Return what a stored state says. Raises `Damaged`."""
    try:
        plain: dict[str, Any] = msgspec.msgpack.decode(zlib.decompress(data))
    except (zlib.error, msgspec.DecodeError) as error:
        raise Damaged(f"a state of {len(data)} bytes: {error}") from error
    return plain
