"""A pipeline in memory and one Delta table for tests of the ledger: the real join with its account, seals everywhere.

What a stage does is done in pieces of any size, so that the boundaries of records, commits and steps do not meet. A
fault is planted by changing what a stage took before it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from join_world import PROJECT as SHOP
from join_world import records as records_of
from join_world import traffic
from stream_world import Blobs

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.log.fenced_memory import FencedMemory, WriterEpochs
from headrace.backends.log.memory import MemoryLog
from headrace.contract.config import Config, IngestConfig, JoinConfig, LedgerConfig, LogConfig
from headrace.contract.formats.events import Punctuation, encode_batch, encode_punctuation
from headrace.contract.formats.positions import START, Position, Positions, order_of, orders
from headrace.contract.formats.sample import format_position
from headrace.contract.formats.seals import HEADER
from headrace.contract.formats.steps import Step, StepRange, encode_step
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Record
from headrace.contract.project import Project, Task
from headrace.kernels.sample_ids import id_hashes, sum_of
from headrace.replay.ledger.ledger import Ledger
from headrace.replay.ledger.take_stock import Mode, take_stock
from headrace.stream.join.join import JoinState
from headrace.stream.join.state import StateWriter
from headrace.stream.rule_changes import ensure_first
from headrace.stream.shell.account import Account, fresh_account
from headrace.trainer.identity import recipe_digest
from headrace.trainer.source.stored import stored_order

PARTITIONS = 2
EAGER = Task(name="soon", feedback="click", window_ms=400, policy="eager")
PROJECT = msgspec.structs.replace(SHOP, tasks=(*SHOP.tasks[:2], EAGER)).checked()
CONFIG = Config(
    join=JoinConfig(early_feedback_ms=400, resolved_ms=1_600, repeat_horizon_ms=3_200),
    ingest=IngestConfig(silent_ms=300_000),
    ledger=LedgerConfig(full_records_max=1, behind_max_ms=3_600_000),
    log=LogConfig(partitions=PARTITIONS),
)
TOPICS = Topics()
Change = Callable[[pa.Table], pa.Table]


def begin_rules(log: MemoryLog, project: Project = PROJECT) -> None:
    """Write the rules that the log begins with, as the first stage does."""
    ensure_first(FencedMemory(log, TOPICS.rules, "rules", WriterEpochs()), project, now_ms=0, pause=lambda _: None)


@cache
def events(seed: int, partition: int, steps: int) -> tuple[Record, ...]:
    """Return a partition's events, its gateway's totals among them, with ids of its own. Made once for all worlds."""
    made, rows = [], 0
    for record in records_of(traffic(seed * 10 + partition, steps), Random(seed)):
        kind = record.headers["kind"]
        if kind == "punctuation":
            promise = msgspec.json.decode(record.value or b"", type=Punctuation)
            counts = {"read": rows, "appended": rows, "dead_lettered": 0, "repeated": 0}
            promise = msgspec.structs.replace(promise, gateway=f"g{partition}", bye=False, counts=counts)
            record = msgspec.structs.replace(record, value=encode_punctuation(promise))
        elif kind in ("impression", "feedback"):
            batch = pa.ipc.open_stream(record.value).read_all().to_batches()[0]
            rows += batch.num_rows
            names = [pc.binary_join_element_wise(f"p{partition}", batch[n], "-") for n in ("event_id", "request_id")]
            for name, column in zip(("event_id", "request_id"), names, strict=True):
                batch = batch.set_column(batch.schema.get_field_index(name), batch.schema.field(name), column)
            record = msgspec.structs.replace(record, value=encode_batch(batch))
        made.append(msgspec.structs.replace(record, partition=partition))
    return tuple(made)


class World:
    """All that the stages and the ledger share."""

    def __init__(self, folder: Path, seed: int = 1, steps: int = 250) -> None:
        self.log, self.blobs, self.random = MemoryLog(lambda: 0), Blobs(), Random(seed)
        self.log.admin().ensure_topics(TOPICS.specs(PARTITIONS))
        begin_rules(self.log)
        self.lake = DeltaLake(str(folder / "lake"), partitions=PARTITIONS, hash_ids=id_hashes)
        self.waiting = {p: events(seed, p, steps) for p in range(PARTITIONS)}
        self.states = [JoinState(PROJECT, CONFIG.join, silent_ms=300_000, partition=p) for p in range(PARTITIONS)]
        self.accounts: list[Account] = [fresh_account() for _ in range(PARTITIONS)]
        self.samples: dict[int, list[pa.RecordBatch]] = {p: [] for p in range(PARTITIONS)}
        """What the topic holds."""
        self.stored = dict.fromkeys(range(PARTITIONS), START)
        self.taken: dict[str, dict[int, Position]] = {}
        self.numbers: dict[str, int] = {}

    def append(self, partition: int, count: int) -> None:
        """Let gateways append the next events of a partition, and the join take them."""
        taken, self.waiting[partition] = self.waiting[partition][:count], self.waiting[partition][count:]
        begin = self.log.begins[TOPICS.events, partition] + len(self.log.partitions(TOPICS.events)[partition])
        made = [msgspec.structs.replace(r, offset=begin + n) for n, r in enumerate(taken)]
        for record in made:
            self.log.append(TOPICS.events, partition, record.value, None, record.headers)
        state, account = self.states[partition], self.accounts[partition]
        while made:
            piece, made = made[: (size := self.random.randint(1, 9))], made[size:]
            above = state.offset
            emitted = state.take_all(piece)
            account.take_records(piece, above)
            if emitted is None:
                continue
            headers = {
                "after": format_position(emitted.after),
                "last": format_position(emitted.last),
                HEADER: account.take_samples(emitted.batch, state.watermark.time_ms),
            }
            self.log.append(TOPICS.samples, partition, encode_batch(emitted.batch), None, headers)
            self.samples[partition].append(emitted.batch)

    def snapshot(self, topic_id: str = "") -> None:
        """Store the join's states, as the stage does."""
        for partition, state in enumerate(self.states):
            if state.offset < 0:
                continue
            snapshot = StateWriter(state).take()
            snapshot.plain |= {"topic_id": topic_id, "account": self.accounts[partition].to_plain()}
            self.blobs.put(f"state/stream/g1/{partition}/{snapshot.offset:020d}", snapshot.manifest())

    def between(self, partition: int, after: Position, rows: int) -> tuple[pa.Table, Position]:
        """Return at most so many samples beyond a position, and where they end."""
        batches = self.samples[partition]
        if not batches:
            return pa.table({}), after
        table = pa.Table.from_batches(batches)
        order_N = orders(table["offset"].to_numpy(), table["rank"].to_numpy())
        found = table.filter(pa.array(order_N > order_of(after))).slice(0, rows)
        return found, _last(found, after)

    def store(self, rows: int = 10**6, change: Change = lambda rows: rows, partitions: Sequence[int] = (0, 1)) -> None:
        """Let the sink commit what it has not stored yet, changed by a fault."""
        tables, moves = [], {}
        for partition in partitions:
            found, upto = self.between(partition, self.stored[partition], rows)
            if upto > self.stored[partition]:
                tables.append(found)
                moves[partition] = upto
        if moves:
            changed = change(pa.concat_tables(tables)).combine_chunks()
            self.lake.append(
                changed.to_batches(), {p: self._record_behind(p, upto) for p, upto in moves.items()}, moves
            )
            self.stored |= moves

    def _record_behind(self, partition: int, upto: Position) -> int:
        lasts = [_last(pa.Table.from_batches([batch]), START) for batch in self.samples[partition]]
        return sum(last <= upto for last in lasts)

    def learn(
        self,
        rows: int = 10**6,
        change: Change = lambda rows: rows,
        *,
        run: str = "r1",
        heads: Sequence[str] = ("click",),
        shift: int = 0,
    ) -> None:
        """Let a run take its next samples of each partition in one step; `change` what it learns, `shift` where."""
        at, ranges = self.taken.setdefault(run, {}), []
        for partition in range(PARTITIONS):
            after = at.get(partition, START)
            found, upto = self.between(partition, after, rows)
            if upto == after:
                continue
            if shift and not ranges:
                after = Position(after.offset + shift, after.rank)
                shifted, _ = self.between(partition, after, 10**6)
                found = shifted.filter(
                    pa.array(orders(shifted["offset"].to_numpy(), shifted["rank"].to_numpy()) <= order_of(upto))
                )
            ours = change(found.filter(pc.is_in(found["task"], value_set=pa.array(list(heads)))))
            ranges.append(ranged(ours, kind="live", partition=partition, after=_pair(after), upto=_pair(upto)))
            at[partition] = upto
        self.write_step(run, tuple(ranges))

    def learn_lake(self, *, run: str = "r1", heads: Sequence[str] = ("click",), rows: int = 40) -> None:
        """Let a run that begins take all of the lake, in steps, and stand at the lake's positions then."""
        state = self.lake.state()
        assert state is not None
        stored = stored_order(self.lake.read(state.version), tuple(heads))
        for start in range(0, stored.num_rows, rows):
            part = stored.slice(start, rows)
            stop = start + part.num_rows
            if stop == stored.num_rows:
                self.taken[run] = dict(state.positions.by_partition)
            self.write_step(run, (ranged(part, kind="stored", version=state.version, start=start, stop=stop),))

    def write_step(self, run: str, ranges: tuple[StepRange, ...], heads: Sequence[str] = ("click",)) -> Step:
        """Record the next step of a run."""
        number = self.numbers[run] = self.numbers.get(run, 0) + 1
        step = Step(
            model=PROJECT.name,
            run=run,
            step=number,
            ranges=ranges,
            positions=Positions(1, self.taken.get(run, {})).to_json(),
            recipe=recipe_digest(PROJECT) if run == "r1" else "another",
        )
        self.log.append(TOPICS.steps, 0, encode_step(step), None, {})
        return step

    def draw(self, mode: Mode = "seals", **kwargs: object) -> Ledger:
        """Draw the ledger."""
        reader = self.log.reader()
        return take_stock(PROJECT, CONFIG, TOPICS, reader, self.lake, blobs=self.blobs, mode=mode, **kwargs)  # type: ignore[arg-type]


def figures(ledger: Ledger) -> dict[str, object]:
    """Return what two drawings of one pipeline have in common, however they were made."""
    plain = msgspec.to_builtins(ledger)
    told = ("drawn_from", "sealed", "reread", "not_sealed", "behind_ms", "behind_max_ms", "events_begin")
    return {name: value for name, value in plain.items() if name not in told}


def without(row: int) -> Change:
    """Lose one sample."""
    return lambda rows: pa.concat_tables([rows.slice(0, row), rows.slice(row + 1)])


def repeated(row: int) -> Change:
    """Take one sample twice."""
    return lambda rows: pa.concat_tables([rows, rows.slice(row, 1)])


def exchanged(row: int) -> Change:
    """Take the id of the sample after it for one sample's own: as many, and not the same."""

    def change(rows: pa.Table) -> pa.Table:
        ids = rows["event_id"].to_pylist()
        ids[row] = next(each for each in ids if each != ids[row])
        return rows.set_column(rows.schema.get_field_index("event_id"), rows.schema.field("event_id"), pa.array(ids))

    return change


def ranged(rows: pa.Table, **fields: object) -> StepRange:
    """Return a range with the seal of its rows."""
    return StepRange(rows=rows.num_rows, sum=sum_of(id_hashes(rows)), **fields)  # type: ignore[arg-type]


def _pair(position: Position) -> tuple[int, int]:
    return position.offset, position.rank


def _last(rows: pa.Table, otherwise: Position) -> Position:
    return Position(rows["offset"][-1].as_py(), rows["rank"][-1].as_py()) if rows.num_rows else otherwise
