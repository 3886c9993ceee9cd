"""The stream stage: one pure join a partition, its samples to Kafka, its state to the store.

Records are applied as many at once as wait. The samples that they resolved are sent with `after`, `last` and `spec`.
The state becomes durable, every `join.snapshot_ms`, as `headrace.stream.shell.durable_state` says:

1. Snapshot: take the state at its offsets, and count the records that were sent up to then.
2. Deliver: wait until all of these records have their receipts.
3. Store: put the snapshot's new parts, then its manifest, which makes it whole.
4. Acknowledge: let Faust commit up to the snapshot's offsets. Then delete old manifests, and the parts that only they
   needed.

A state that sent samples which their topic has lost since is left, for an older one, or for the log's beginning: what
is sent again has the same positions, and readers drop what they have.

The rules that impressions are read by come from the log: those of change 1, then each change where it lies. What the
project on disk declares is only compared with them.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import msgspec
import pyarrow.compute as pc

from headrace.contract.formats.events import FEEDBACK, encode_batch
from headrace.contract.formats.positions import Position
from headrace.contract.formats.sample import format_position
from headrace.contract.formats.samples_topic.kept_samples import SENDER, Sent
from headrace.contract.formats.seals import HEADER
from headrace.contract.interfaces.log import Record, check_topic
from headrace.contract.metrics import Name
from headrace.contract.rules import Rules, differences, rules_of
from headrace.process.waits import Waits
from headrace.stream.join.join import JoinState
from headrace.stream.join.outcome import Emitted, TaskCounts
from headrace.stream.join.payload import Spill
from headrace.stream.join.state import StateWriter, load, part_names, read_manifest
from headrace.stream.shell.account import Account, fresh_account, load_account
from headrace.stream.shell.dependencies import StageDependencies
from headrace.stream.shell.durable_state import (
    DurableState,
    Outgoing,
    StateSnapshot,
    StateStore,
    await_stored,
)
from headrace.stream.shell.engine import Engine
from headrace.stream.shell.kept_log import KeptLog, can_go_back, kept_log, mark_of
from headrace.stream.shell.unreadable_events import tell_unreadable
from headrace.stream.stored_rules import FIRST_RULES

log = logging.getLogger("headrace.stream")

RECORD_ROWS = 20_000
"""Most samples in one record; an expiry of a backlog is cut."""
METRICS_S = 1.0
_TOTALS: tuple[tuple[Name, str], ...] = (
    ("positives_total", "positives"),
    ("negatives_total", "negatives"),
    ("feedback_duplicate_total", "duplicate"),
    ("feedback_late_total", "late"),
    ("feedback_orphan_total", "orphans"),
)


@dataclass
class _Partition:
    number: int
    state: JoinState
    writer: StateWriter
    durable: DurableState
    shown: list[TaskCounts]
    """What the metrics have counted so far."""
    topic_id: str = ""
    account: Account = field(default_factory=fresh_account)
    first_rules: Mapping[str, Any] = field(default_factory=dict)
    """Those that the log begins with, for who looks later whether the `rules` topic still says them."""
    shown_too_late: int = 0
    mark: Sequence[int] = ()
    """The record that the state contains last, as `mark_of` gives it; empty while that is not known."""
    sent: Sent | None = None
    """What the state that this worker began with had sent last; None where that is not known."""
    sender: str = ""
    """What this worker's samples say of who sent them."""

    def snapshot(self) -> None:
        """Begin a snapshot, unless the state has been stored as it is."""
        self.durable.begin({self.number: self.state.offset}, self._take)

    def _take(self) -> StateSnapshot:
        taken = self.writer.take()
        # By the growth rules: a state without it is of a topic whose id nobody noted.
        taken.plain["topic_id"] = self.topic_id
        taken.plain[FIRST_RULES] = self.first_rules
        taken.plain["account"] = self.account.to_plain()
        taken.plain["mark"] = list(self.mark)
        # Encoded when the samples have their receipts.
        taken.plain["sent"] = self._sent_last
        offsets, name = {self.number: taken.offset}, f"{taken.offset:020d}"
        return StateSnapshot(offsets, name, taken.manifest, taken.fresh, taken.names)

    def _sent_last(self) -> list[Any]:
        sent = Sent(self.durable.ends_at, self.sender) if self.durable.ends_at >= 0 else self.sent
        return [] if sent is None else msgspec.to_builtins(sent)


class _Restored(NamedTuple):
    state: JoinState
    writer: StateWriter
    account: Account
    mark: Sequence[int] = ()
    sent: Sent | None = None


class StreamStage:
    """The shell around `JoinState`; see the module for the protocol."""

    name = "stream"
    has_one_owner = False
    durable_state = DurableState

    def __init__(self, deps: StageDependencies, *, spill: Spill | None = None, declared: Rules | None = None) -> None:
        """Keep what waits in `spill`, or in memory without one.

        `declared` is what the project on disk says, where that is not `deps.project`, whose rules the log begins with.
        """
        self.deps, self.spill = deps, spill
        self.topic = deps.topics.events
        self.declared = rules_of(deps.project) if declared is None else declared
        """After a change of rules, what the worker would find on disk if it had found what was in force before."""
        self.engine: Engine | None = None
        self.partitions: dict[int, _Partition] = {}
        self._waits = Waits(deps.clock)
        self._store = StateStore(deps.blobs, self._waits)
        self._failure: BaseException | None = None
        self._metrics_due_s = 0.0

    async def begin(self, partition: int) -> int | None:
        """Restore the newest readable state."""
        every_ms, generation = self.deps.config.join.snapshot_ms, self.deps.topics.generation
        durable = self.durable_state(
            self.deps,
            self._store,
            self,
            folder=f"state/stream/g{generation}/{partition}",
            parts_folder=f"state/stream-parts/g{generation}/{partition}",
            every_ms=every_ms,
            # Partitions that begin together take turns.
            first_ms=every_ms * (1 + partition % 4 / 4),
        )
        with kept_log(self.deps.open_reader) as kept:
            check = None if kept is None else partial(self._check, partition, durable, kept)
            restored = await durable.restore(read_manifest, partial(self._load, partition), part_names, check)
            lost = f"{self.deps.topics.samples}/{partition}"
            goes_back = durable.is_ahead and await can_go_back(
                *(kept, self._waits, self.deps, [partition]), lost=lost, stage=self.name
            )
        if restored is None:
            state = self._new_state(partition)
            restored = _Restored(state, StateWriter(state), fresh_account())
        state, writer, account, mark, sent = restored
        durable.stored = {partition: state.offset}
        self.partitions[partition] = _Partition(
            partition,
            state,
            writer,
            durable,
            state.totals.tasks,
            self.deps.topic_id,
            account,
            msgspec.to_builtins(rules_of(self.deps.project)),
            state.totals.too_late,
            mark,
            sent,
            secrets.token_hex(4),
        )
        self._tell_rules(partition, state, None)
        return state.offset + 1 if state.offset >= 0 or goes_back else None

    async def take_all(self, records: Sequence[Record]) -> None:
        """Join records of one partition, in order, and send what they resolved."""
        partition = self.partitions[records[0].partition]
        before, above = partition.state.rules, partition.state.offset
        bad = partition.state.row_totals()[-1]
        emitted = partition.state.take_all(records)
        if records[-1].offset == partition.state.offset:
            partition.mark = mark_of(records[-1])
        if partition.state.rules.number != before.number:
            self._tell_rules(partition.number, partition.state, before.declared)
        self.deps.metrics.add("records_read_total", len(records))
        tell_unreadable(records, partition.state.row_totals()[-1] - bad, self.deps.metrics)
        partition.account.take_records(records, above)
        if emitted is not None:
            pieces = _pieces(emitted)
            # Before anything waits: a snapshot has the samples of the state in its account.
            watermark_ms = partition.state.watermark.time_ms
            seals = [partition.account.take_samples(piece.batch, watermark_ms) for piece in pieces]
            await partition.durable.send(len(pieces), self._outgoing(partition.number, partition.sender, pieces, seals))
            self.deps.metrics.add("samples_emitted_total", emitted.batch.num_rows)
            if (waited_s := _since_feedback_s(records, emitted, self.deps.clock.now_ms())) is not None:
                self.deps.metrics.observe("hop_joined_seconds", waited_s)

    async def tick(self) -> None:
        """Run receipts, begin snapshots that are due, show numbers."""
        self.deps.producer.poll(0.0)
        if self._failure is not None:
            raise self._failure
        self._waits.check()
        for partition in self.partitions.values():
            if partition.durable.is_due():
                partition.snapshot()
        now_s = self.deps.clock.monotonic()
        if now_s >= self._metrics_due_s:
            self._metrics_due_s = now_s + METRICS_S
            self._show()

    def drop(self, partitions: set[int]) -> None:
        """Forget revoked partitions; what they sent is sent again by the new owner, with the same positions."""
        for number in partitions:
            partition = self.partitions.pop(number, None)
            if partition is not None:
                partition.state.payload.clear()
                partition.durable.cancel()

    async def finish(self) -> None:
        """Store the state of every partition. Raises what stopped the stage: nothing is stored then."""
        if self._failure is not None:
            raise self._failure
        for partition in self.partitions.values():
            partition.snapshot()
        await await_stored((partition.durable for partition in self.partitions.values()), self.deps.producer)
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

    def _tell_rules(self, partition: int, state: JoinState, before: Rules | None) -> None:
        """Log what the partition is read by; `before` are the rules until now, unless the worker just began."""
        rules = state.rules.declared
        log.info("partition %d is read by rules %s (change %d)", partition, rules.digest(), state.rules.number)
        # A worker that was in line with the log before a change has the project of before: nothing hangs on that.
        if before == self.declared:
            self.declared = rules
        if lines := differences(rules, self.declared):
            log.warning(
                "partition %d: the project that this worker was started with (%s) differs from the rules in the log, "
                "and the log counts. It would change:\n  %s\n`headrace spec apply` puts it in force.",
                partition,
                self.declared.digest(),
                "\n  ".join(lines),
            )

    def _check(self, partition: int, durable: DurableState, kept: KeptLog, plain: Mapping[str, Any]) -> None:
        """Look whether the log holds what a state was made of, and what it sent. An older state does not say which."""
        check_topic(plain.get("topic_id", ""), self.deps.topic_id, self.topic)
        samples = self.deps.topics.samples
        if plain.get("mark"):
            kept.check_read(self.topic, partition, plain["mark"])
        if plain.get("sent"):
            kept.check_sent(samples, partition, Sent(*plain["sent"]), Position(*plain["last"]))
        durable.reached[samples, partition] = kept.ends_at(samples)[partition] - 1

    def _load(self, partition: int, plain: Mapping[str, Any], part: Callable[[str], bytes | None]) -> _Restored:
        check_topic(plain.get("topic_id", ""), self.deps.topic_id, self.topic)
        state, sent = self._new_state(partition), plain.get("sent")
        writer = load(state, plain, part)
        account = load_account(plain, state.last)
        return _Restored(state, writer, account, plain.get("mark", ()), Sent(*sent) if sent else None)

    def _new_state(self, partition: int) -> JoinState:
        config = self.deps.config
        silent_ms = config.ingest.silent_ms
        return JoinState(self.deps.project, config.join, silent_ms=silent_ms, partition=partition, spill=self.spill)

    def _outgoing(self, partition: int, sender: str, pieces: list[Emitted], seals: list[str]) -> Iterator[Outgoing]:
        for piece, seal in zip(pieces, seals, strict=True):
            headers = {
                "after": format_position(piece.after),
                "last": format_position(piece.last),
                "spec": ",".join(pc.unique(piece.batch.column("spec")).to_pylist()),
                HEADER: seal,
                SENDER: sender,
            }
            yield Outgoing(self.deps.topics.samples, partition, encode_batch(piece.batch), headers=headers)

    def _show(self) -> None:
        partitions, metrics = list(self.partitions.values()), self.deps.metrics
        if not partitions:
            return
        metrics.set("pending_impressions", sum(p.state.waiting for p in partitions))
        metrics.set("pending_feedback", sum(len(p.state.early) for p in partitions))
        metrics.set("watermark_ms", min(p.state.watermark.time_ms for p in partitions))
        metrics.set("rules_number", min(p.state.rules.number for p in partitions))
        metrics.set("rules_differ", float(any(p.state.rules.declared != self.declared for p in partitions)))
        for partition in partitions:
            tasks = partition.state.totals.tasks
            # A task that has just been declared begins with what came before it, which is no news.
            for (task, _), now, before in zip(partition.state.tasks, tasks, partition.shown, strict=False):
                for name, count in _TOTALS:
                    grown = getattr(now, count) - getattr(before, count)
                    if grown:
                        metrics.add(name, grown, task=task)
            partition.shown = tasks
            too_late = partition.state.totals.too_late
            metrics.add("events_too_late_total", too_late - partition.shown_too_late)
            partition.shown_too_late = too_late
        if self.engine is not None:
            metrics.set("lag_records", self.engine.lag())


def _since_feedback_s(records: Sequence[Record], emitted: Emitted, now_ms: int) -> float | None:
    """Return how long ago the broker took the newest feedback that resolved a sample of these; None for none."""
    newest = next((r for r in reversed(records) if r.headers.get("kind") == FEEDBACK), None)
    if newest is None or not pc.any(pc.equal(emitted.batch.column("offset"), newest.offset)).as_py():
        return None
    return max(0, now_ms - newest.timestamp_ms) / 1_000


def _pieces(emitted: Emitted) -> list[Emitted]:
    rows = emitted.batch.num_rows
    if rows <= RECORD_ROWS:
        return [emitted]
    offset_N, rank_N = emitted.batch.column("offset"), emitted.batch.column("rank")
    pieces: list[Emitted] = []
    after = emitted.after
    for start in range(0, rows, RECORD_ROWS):
        part = emitted.batch.slice(start, RECORD_ROWS)
        end = start + part.num_rows - 1
        last = Position(offset_N[end].as_py(), rank_N[end].as_py())
        pieces.append(Emitted(part, after, last))
        after = last
    return pieces
