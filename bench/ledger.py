"""The ledger: a day at 25,000 events/s drawn from its seals; full and from seals on a small real log.

Method. **The day**: 8 partitions; of 25,000 events/s 18,750 are impressions and make a sample each, joined 20 passes a
second and partition, learnt in steps of 4,096 rows. All steps of the day are real records, written to a file before the
clock runs; the 13.8 million records of samples are made when they are asked for, which is when a drawing looks at one;
the lake says its seal. Then a minute more is appended and it is drawn again. Memory is how much the process grew while
it drew. **Small**: the shop's events through the real join into a log in memory and a real Delta table, drawn in full,
from seals, and from seals again. **Hot path**: what sealing adds to a record, and to a step beside the step itself.

`--quick` takes two hours in place of a day.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parent))

from harness.figures import Figure, show

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.log.memory import MemoryLog
from headrace.contract.config import Config, LedgerConfig, LogConfig, TrainConfig
from headrace.contract.formats.events import (
    Punctuation,
    batch_from_rows,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.formats.positions import START, Position, Positions
from headrace.contract.formats.sample import conform, format_position
from headrace.contract.formats.seals import HEADER, SUM_MASK, PartitionSeal, RecordSeal, Seal, encode_seal, whole
from headrace.contract.formats.steps import Step, StepRange, encode_step
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Pieces
from headrace.contract.interfaces.blobs import whole as in_one
from headrace.contract.interfaces.log import Record
from headrace.contract.rules import change_of, encode_change
from headrace.examples.shop import traffic
from headrace.examples.shop.shop import PROJECT
from headrace.kernels.sample_ids import id_hashes, seal_of
from headrace.replay.ledger.ledger import Ledger
from headrace.replay.ledger.take_stock import Mode, take_stock
from headrace.stream.join.join import JoinState
from headrace.stream.join.state import StateWriter
from headrace.stream.shell.account import fresh_account
from headrace.trainer.identity import recipe_digest
from headrace.trainer.model.learner import learner_for
from headrace.trainer.source.batch import to_batch
from headrace.trainer.source.judged import judge_of

PARTITIONS = 8
EVENTS_PER_S, SAMPLES_PER_S = 25_000, 18_750
PASSES_PER_S = 20
STEP_ROWS = 4_096
TASK = PROJECT.recipe.heads[0]
HASH = 0x9E3779B97F4A7C15
"""Every sample of the made-up day has this hash: sums are those of numbers, and a drawing can't tell."""
TOPICS = Topics()
MINUTE_S = 60


def seal(samples: int) -> Seal:
    return Seal(samples, samples * HASH & SUM_MASK)


@dataclass
class Day:
    """So many seconds of a pipeline, as far as a drawing looks at it: a log's reader, a lake and a store in one."""

    seconds: int
    file: BinaryIO
    step_rows: int = STEP_ROWS

    def __post_init__(self) -> None:
        self.rows = SAMPLES_PER_S // (PARTITIONS * PASSES_PER_S)
        """Samples in a record."""
        self.cuts = [0]
        self.assigned: dict[tuple[str, int], int] = {}
        self.blobs: dict[str, bytes] = {}
        self.steps = 0

    @property
    def records(self) -> int:
        return self.seconds * PASSES_PER_S

    def write(self, seconds: int) -> None:
        """Go on for so many seconds: write their steps, and the join's states at the end of them."""
        self.seconds += seconds
        share = self.step_rows // PARTITIONS // self.rows
        while (self.steps + 1) * share <= self.records:
            first, last = self.steps * share - 1, (self.steps + 1) * share - 1
            after, upto = self.position(first), self.position(last)
            held = seal(share * self.rows)
            ranges = tuple(
                StepRange("live", 0, p, after, upto, rows=held.count, sum=held.sum) for p in range(PARTITIONS)
            )
            self.steps += 1
            step = Step(
                model=PROJECT.name,
                run="r0000019a00000000",
                step=self.steps,
                ranges=ranges,
                positions={str(p): [*upto] for p in range(PARTITIONS)},
                recipe=recipe_digest(PROJECT),
            )
            self.file.seek(self.cuts[-1])
            self.file.write(data := encode_step(step))
            self.cuts.append(self.cuts[-1] + len(data))
        for partition in range(PARTITIONS):
            self.blobs[f"state/stream/g1/{partition}/{self.records - 1:020d}"] = self.state(partition)

    def position(self, record: int) -> Position:
        return Position(record, self.rows - 1) if record >= 0 else START

    def state(self, partition: int) -> bytes:
        samples = self.records * self.rows
        impressions = samples
        feedback = impressions // 3
        account = fresh_account()
        account.tasks = {TASK: seal(samples)}
        account.said = {"g": {1: {"read": 0, "appended": 0, "dead_lettered": 0, "repeated": 0}}}
        counts = [impressions, samples // 4, samples - samples // 4, 0, samples // 4, 0, feedback - samples // 4, 0, 0]
        plain = {
            "offset": self.records - 1,
            "last": list(self.position(self.records - 1)),
            "totals": [impressions, feedback, 0, 0],
            "counts": np.array([counts], np.int64).tobytes(),
            "lanes": [[TASK, "click"]],
            "feedback": [{"name": "click"}],
            "answers": [feedback],
            "watermark": [self.seconds * 1000, [], []],
            "topic_id": "",
            "account": account.to_plain(),
        }
        return zlib.compress(msgspec.msgpack.encode(plain), 1)

    # A reader of the log

    def begin_offsets(self, topic: str) -> dict[int, int]:
        return dict.fromkeys(range(PARTITIONS if topic in (TOPICS.events, TOPICS.samples) else 1), 0)

    def end_offsets(self, topic: str) -> dict[int, int]:
        if topic == TOPICS.steps:
            return {0: self.steps}
        if topic == TOPICS.rules:
            return {0: 1}
        return dict.fromkeys(self.begin_offsets(topic), self.records if topic in (TOPICS.events, TOPICS.samples) else 0)

    def assign(self, offsets: Mapping[tuple[str, int], int]) -> None:
        self.assigned = dict(offsets)

    def position_of(self, topic: str, partition: int) -> int:
        return self.assigned[topic, partition]

    def poll(self, records_max: int, timeout_s: float) -> Sequence[Record]:
        for (topic, partition), start in self.assigned.items():
            stop = min(self.end_offsets(topic)[partition], start + (records_max if topic == TOPICS.steps else 1))
            if start < stop:
                self.assigned[topic, partition] = stop
                return [self.record(topic, partition, offset) for offset in range(start, stop)]
        return []

    def record(self, topic: str, partition: int, offset: int) -> Record:
        if topic == TOPICS.rules:
            value = encode_change(change_of(PROJECT, 1, now_ms=0))
            return Record(topic, partition, offset, None, value, {}, 0)
        if topic == TOPICS.steps:
            self.file.seek(self.cuts[offset])
            return Record(topic, 0, offset, None, self.file.read(self.cuts[offset + 1] - self.cuts[offset]), {}, 0)
        sealed = RecordSeal(since=(-1, -1), watermark_ms=offset * 50, tasks={TASK: seal((offset + 1) * self.rows)})
        headers = {
            "after": format_position(self.position(offset - 1)),
            "last": format_position(self.position(offset)),
            HEADER: encode_seal(sealed),
        }
        return Record(topic, partition, offset, None, b"", headers, 0)

    def close(self) -> None:
        """Nothing is open."""

    # A lake

    def state_of_lake(self, version: int | None = None) -> Any:
        positions = dict.fromkeys(range(PARTITIONS), self.position(self.records - 1))
        return SimpleNamespace(version=self.records, positions=Positions(1, positions), retained_before_ms=0)

    def seals(self) -> tuple[dict[int, PartitionSeal], int]:
        samples, upto = self.records * self.rows, self.position(self.records - 1)
        return {p: PartitionSeal(START, upto, seal(samples)) for p in range(PARTITIONS)}, samples * PARTITIONS

    # A store

    def put(self, name: str, data: bytes | Pieces) -> None:
        self.blobs[name] = in_one(data)

    def get(self, name: str) -> bytes | None:
        return self.blobs.get(name)

    def list(self, prefix: str) -> list[str]:
        return sorted(name for name in self.blobs if name.rsplit("/", 1)[0] == prefix)

    def draw(self) -> tuple[Ledger, float, float]:
        """Draw; return the ledger, seconds, and MiB that the process grew."""
        reader = SimpleNamespace(
            **{name: getattr(self, name) for name in ("begin_offsets", "end_offsets", "assign", "poll", "close")},
            position=self.position_of,
        )
        lake = SimpleNamespace(state=self.state_of_lake, seals=self.seals)
        config = Config(log=LogConfig(partitions=PARTITIONS), ledger=LedgerConfig(full_records_max=1))
        memory, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        ledger = take_stock(PROJECT, config, TOPICS, reader, lake, blobs=self, mode="seals")  # type: ignore[arg-type]
        took_s = time.process_time() - begun
        if not ledger.closes or ledger.drawn_from != "seals":
            raise SystemExit(f"the made-up day does not close: {ledger}")
        return ledger, took_s, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024


def measure_day(seconds: int, folder: Path, what: str) -> Iterator[Figure]:
    with (folder / "steps").open("w+b") as file:
        day = Day(0, file)
        begun = time.perf_counter()
        day.write(seconds)
        print(f"{day.steps:,} steps written in {time.perf_counter() - begun:.0f} s, {day.cuts[-1] / 1e6:,.0f} MB")
        ledger, took_s, grown = day.draw()
        events = seconds * EVENTS_PER_S
        print(
            f"{events:,} events, {ledger.samples:,} samples, {ledger.models.popitem()[1].steps:,} steps: {took_s:.1f} s"
        )
        yield Figure(f"ledger_{what}_from_seals", round(took_s, 2), "s of one core")
        yield Figure(f"ledger_{what}_memory_growth", round(grown, 1), "MiB")
        day.write(MINUTE_S)
        yield Figure(f"ledger_a_minute_after_{what}", round(day.draw()[1], 3), "s of one core")


class Small:
    """The shop's events in a log in memory, joined, stored in a real Delta table, and learnt."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.log, self.lake = MemoryLog(), DeltaLake(str(folder / "lake"), partitions=1, hash_ids=id_hashes)
        self.log.admin().ensure_topics(TOPICS.specs(1))
        self.log.append(TOPICS.rules, 0, encode_change(change_of(PROJECT, 1, now_ms=0)), None, {})
        self.blobs: dict[str, bytes] = {}
        self.state, self.account = JoinState(PROJECT, Config().join, silent_ms=10_000, partition=0), fresh_account()
        self.visits = list(traffic.synthetic(PROJECT.impression.fields, rows=rows).visits())
        self.step, self.taken, self.records = 0, START, 0

    def advance(self, first: int, count: int) -> None:
        """Let `count` visits happen."""
        start_ms, batches, ranges = 1_800_000_000_000, [], []
        for at in range(first, first + count, 500):
            visits = self.visits[at : at + 500]
            now_ms = start_ms + 10 * (at + 500)
            key = {"place": 0, "key": "k"}
            ids = [{"event_id": f"e{v.row}", "request_id": f"e{v.row}"} | key for v in visits]
            shown = [
                {**v.fields, **i, "event_time_ms": start_ms + 10 * v.row} for v, i in zip(visits, ids, strict=True)
            ]
            clicks = [{**i, "event_id": f"c{v.row}", "event_time_ms": now_ms} for v, i in zip(visits, ids, strict=True)]
            clicks = [c for c, v in zip(clicks, visits, strict=True) if v.clicked]
            promise = encode_punctuation(Punctuation("g", 1, now_ms, counts={"read": 1}))
            sent = (
                ({"kind": "impression"}, encode_batch(batch_from_rows(shown, impression_schema(PROJECT)))),
                (
                    {"kind": "feedback", "type": "click"},
                    encode_batch(batch_from_rows(clicks, feedback_schema(PROJECT, PROJECT.feedback[0]))),
                ),
                ({"kind": "punctuation"}, promise),
            )
            for headers, value in sent:
                offset = self.log.append(TOPICS.events, 0, value, None, headers)
                record = Record(TOPICS.events, 0, offset, None, value, headers, 0)
                emitted = self.state.take(record)
                self.account.take_records([record], offset - 1)
                if emitted is None:
                    continue
                told = {"after": format_position(emitted.after), "last": format_position(emitted.last)}
                told[HEADER] = self.account.take_samples(emitted.batch, self.state.watermark.time_ms)
                self.log.append(TOPICS.samples, 0, encode_batch(emitted.batch), None, told)
                self.records += 1
                batches.append(emitted.batch)
                held = whole(seal_of(emitted.batch))
                ranges.append(StepRange("live", 0, 0, self.taken, emitted.last, rows=held.count, sum=held.sum))
                self.taken = emitted.last
        self.lake.append(batches, {0: self.records}, {0: self.taken})
        self.step += 1
        made = Step(model=PROJECT.name, run="r1", step=self.step, ranges=tuple(ranges), positions={"0": [*self.taken]})
        self.log.append(TOPICS.steps, 0, encode_step(made), None, {})
        snapshot = StateWriter(self.state).take()
        snapshot.plain |= {"topic_id": "", "account": self.account.to_plain()}
        self.blobs[f"state/stream/g1/0/{snapshot.offset:020d}"] = snapshot.manifest()

    def draw(self, mode: Mode) -> tuple[Ledger, float]:
        """Draw; return the ledger and seconds."""
        store = SimpleNamespace(
            get=self.blobs.get,
            put=self.blobs.__setitem__,
            list=lambda prefix: sorted(name for name in self.blobs if name.rsplit("/", 1)[0] == prefix),
        )
        begun = time.perf_counter()
        config = Config(log=LogConfig(partitions=1))
        ledger = take_stock(PROJECT, config, TOPICS, self.log.reader(), self.lake, blobs=store, mode=mode)  # type: ignore[arg-type]
        if not ledger.closes:
            raise SystemExit(f"the small log does not close: {ledger}")
        return ledger, time.perf_counter() - begun


def measure_small(folder: Path, rows: int) -> Iterator[Figure]:
    small = Small(folder, rows)
    piece = rows // 20
    for first in range(0, rows - piece, piece):
        small.advance(first, piece)
    small.draw("full")
    full, full_s = small.draw("full")
    sealed, first_s = small.draw("seals")
    small.advance(rows - piece, piece)
    again, again_s = small.draw("seals")
    assert sealed.drawn_from == again.drawn_from == "seals" and full.samples == sealed.samples < again.samples
    print(f"{full.appended:,} events, {full.samples:,} samples")
    yield Figure("ledger_small_full", round(full_s, 3), "s")
    yield Figure(
        "ledger_small_from_seals", round(first_s, 3), "s", "in full", round(full_s, 3), round(full_s / first_s, 1)
    )
    yield Figure(
        "ledger_small_5_percent_more", round(again_s, 3), "s", "in full", round(full_s, 3), round(full_s / again_s, 1)
    )


def measure_hot_path(small: Sequence[pa.RecordBatch]) -> Iterator[Figure]:
    batch = pa.concat_batches(list(small)).slice(0, 2_000)
    record = batch.slice(0, 200)
    table = conform(pa.Table.from_batches([batch]), batch.schema)
    learner, judge = learner_for(PROJECT, TrainConfig()), judge_of(PROJECT)
    pairs: tuple[tuple[str, Any, str, Any], ...] = (
        ("seal_of_200_samples", lambda: seal_of(record), "encode them", lambda: encode_batch(record)),
        ("judge_2000_samples", lambda: judge(batch), "learn them", lambda: learner.learn(to_batch(table, PROJECT))),
    )
    for name, ours, peer, theirs in pairs:
        ours_us, theirs_us = timed(ours), timed(theirs)
        yield Figure(name, round(ours_us, 1), "us", peer, round(theirs_us, 1), round(theirs_us / ours_us, 1))


def timed(work: Any) -> float:
    """Return the least of seven, each of some calls, in microseconds: the machine has other things to do."""
    work()
    best = float("inf")
    for _ in range(7):
        begun = time.perf_counter()
        for _ in range(20):
            work()
        best = min(best, (time.perf_counter() - begun) / 20 * 1e6)
    return best


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two hours in place of a day")
    args = parser.parse_args()
    seconds, what = (7_200, "two_hours") if args.quick else (86_400, "a_day")
    with tempfile.TemporaryDirectory() as folder:
        figures = [*measure_day(seconds, Path(folder), what)]
        small = Small(Path(folder) / "hot", 4_000)
        small.advance(0, 4_000)
        rows = [r for r in small.lake.read().to_batches() if r.num_rows]
        figures += measure_small(Path(folder), 20_000 if args.quick else 200_000)
        figures += measure_hot_path(rows)
    show(figures)


if __name__ == "__main__":
    main()
