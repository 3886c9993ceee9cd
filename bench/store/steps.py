"""What recording a step costs the trainer: samples/s with steps recorded one by one, and in groups beside learning.

Method: a broker of its own has 8 partitions of seeded samples, and a store on disk has the same ones as a lake. A
trainer with Kafka's transactions and all that it has in production (but one checkpoint and snapshot only, at its
beginning) learns a backlog of either, in steps of 32, 512 and 8,192 rows. The sides take turns every few steps of one
process, so that they share what else the machine does: `alone` is `train.group_steps = 0`, which records each step once
the one before it is learnt, `group` the default. Figures are medians of these slices. Lastly single rows come one by
one, each when the one before was learnt: how long one takes from its sending to the end of its step, sides in turn.

`record` is the time from the beginning of a transaction to its read back, in whatever thread, shared by its steps; its
CPU time is that of this thread alone, without the threads of Kafka's client, which `cpu` has.

    python bench/store/steps.py --base 26000
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.broker import broker
from harness.figures import Figure, show
from store.handover import PARTITIONS, PROJECT, TOPICS, fill, samples

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.clock import SystemClock
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.log.fenced_kafka import FencedKafka
from headrace.backends.log.kafka import KafkaProducer, KafkaReader
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import TrainConfig
from headrace.contract.formats.events import encode_batch
from headrace.contract.formats.positions import Position
from headrace.contract.formats.sample import format_position
from headrace.process.call_watch import CallWatch
from headrace.trainer.dependencies import Dependencies
from headrace.trainer.recipes import deepfm, logistic
from headrace.trainer.run import Trainer

SIDES = {"alone": 0, "group": TrainConfig().group_steps}
RECIPES = {"logistic": logistic, "deepfm": deepfm}
SLICE, IDLE_MAX = 3, 20
ROWS = {32: 64, 512: 32, 8_192: SLICE}
"""Rows of a step, and how many steps a side has at a time."""
RECORD, WARM_STEPS = 16_384, 10


class Timed:
    """Passes calls on to a fenced writer and adds up how long they take."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.seconds, self.cpu, self.transactions = inner, 0.0, 0.0, 0

    def open(self) -> None:
        self._inner.open()

    def append(self, *values: bytes) -> None:
        self._timed(self._inner.append, *values)
        self.transactions += 1

    def read(self, *args: Any, **named: Any) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = self._timed(self._inner.read, *args, **named)
        return found

    def close(self) -> None:
        self._inner.close()

    def _timed(self, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        found = call(*args, **named)
        self.seconds += time.perf_counter() - wall
        self.cpu += time.thread_time() - cpu
        return found


def send_samples(brokers: str, topic: str, batches: Iterable[Any]) -> None:
    """Append samples to the topic, each partition's in order."""
    producer, last = KafkaProducer(brokers, linger_ms=0.0), dict.fromkeys(range(PARTITIONS), Position(-1, -1))
    for batch in batches:
        for p in range(PARTITIONS):
            rows = batch.take(list(range(p, batch.num_rows, PARTITIONS)))
            new = Position(rows["offset"][-1].as_py(), rows["rank"][-1].as_py())
            headers = {"after": format_position(last[p]), "last": format_position(new), "spec": ""}
            producer.send(topic, p, encode_batch(rows), headers=headers)
            last[p] = new
        producer.flush(30.0)


def trainer_of(recipe: str, rows: int, brokers: str, lake: str, store: str) -> tuple[Trainer, Timed]:
    """Return a trainer of a model of its own that has recovered."""
    project = msgspec.structs.replace(
        PROJECT,
        name=f"m{time.time_ns():x}",
        recipe=msgspec.structs.replace(RECIPES[recipe](), batch_rows=rows),
    ).checked()
    writer = Timed(FencedKafka(brokers, TOPICS.steps, f"steps-{project.name}"))
    trainer = Trainer(
        Dependencies(
            project=project,
            config=TrainConfig(wait_ms=1, checkpoint_ms=3_600_000, snapshot_ms=3_600_000),
            topics=TOPICS,
            reader=KafkaReader(brokers),
            producer=KafkaProducer(brokers),
            steps_writer=writer,
            blobs=FileBlobs(Path(store) / project.name),
            metrics=MemoryMetrics(),  # type: ignore[arg-type]
            clock=SystemClock(),
            stop=threading.Event(),
            calls=CallWatch(),
            lake=DeltaLake(lake, partitions=PARTITIONS) if lake else None,
        )
    )
    trainer.recover()
    return trainer, writer


def backlog(trainer: Trainer, writer: Timed, slice_steps: int, slices: int) -> list[dict[str, dict[str, float]]]:
    """Learn so many slices of each side, or what there is; return a slice's figures by side."""
    found: list[dict[str, dict[str, float]]] = []
    while trainer.learner.step < WARM_STEPS:
        trainer.turn()
    for number in range(slices):
        pair: dict[str, dict[str, float]] = {}
        for side in SIDES if number % 2 else reversed(SIDES):
            trainer.ahead.steps_max = 0
            while not trainer.ahead.is_empty:
                trainer.turn()
            trainer.ahead.steps_max = SIDES[side]
            before, learnt = trainer.learner.step, trainer.learnt
            writer.seconds, writer.cpu, writer.transactions = 0.0, 0.0, 0
            cpu, wall = time.process_time(), time.perf_counter()
            idle = 0
            while trainer.learner.step < before + slice_steps and idle < IDLE_MAX:
                idle = 0 if trainer.turn() else idle + 1
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            steps = trainer.learner.step - before
            if steps < slice_steps:
                return found
            pair[side] = {
                "per_second": (trainer.learnt - learnt) / wall,
                "step_ms": wall / steps * 1e3,
                "cpu_ms": cpu / steps * 1e3,
                "record_ms": writer.seconds / steps * 1e3,
                "record_cpu_ms": writer.cpu / steps * 1e3,
                "steps_a_transaction": steps / max(1, writer.transactions),
            }
        found.append(pair)
    return found


def lone(trainer: Trainer, brokers: str, topic: str, rows: int) -> list[dict[str, dict[str, float]]]:
    """Send single rows, each when the one before is learnt; return the ms from sending to the step's end, by side."""
    producer, last, found = KafkaProducer(brokers, linger_ms=0.0), Position(-1, -1), list[dict[str, dict[str, float]]]()
    for number in range(WARM_STEPS + rows):
        pair: dict[str, dict[str, float]] = {}
        for turn, side in enumerate(SIDES if number % 2 else reversed(SIDES)):
            trainer.ahead.steps_max = SIDES[side]
            row = samples((2 * number + turn) * PARTITIONS, 1, 500.0)
            new = Position(row["offset"][0].as_py(), row["rank"][0].as_py())
            headers = {"after": format_position(last), "last": format_position(new), "spec": ""}
            last, began = new, time.perf_counter()
            producer.send(topic, 0, encode_batch(row), headers=headers)
            producer.flush(5.0)
            while not trainer.turn():
                pass
            pair[side] = {"ms": (time.perf_counter() - began) * 1e3}
        found.append(pair)
    return found[WARM_STEPS:]


def main() -> int:
    """Print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute or two")
    parser.add_argument("--base", type=int, default=26_000, help="first port of the broker")
    parser.add_argument("--recipe", choices=RECIPES, default="logistic")
    parser.add_argument("--slices", type=int, help="how often each side has its turn")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    slices = args.slices or (4 if args.quick else 20)
    if args.case:
        kind, rows, brokers, lake = args.case
        trainer, writer = trainer_of(args.recipe, int(rows), brokers, lake if kind == "lake" else "", f"{lake}-store")
        if kind == "lone":
            print(json.dumps(lone(trainer, brokers, TOPICS.samples, 10 * slices)), flush=True)
        else:
            print(json.dumps(backlog(trainer, writer, ROWS[int(rows)], slices)), flush=True)
        os._exit(0)  # The readers of the lake and of Kafka have threads that an orderly end may meet at work.
    count = (2 * slices * SLICE + WARM_STEPS + 20) * max(ROWS)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        uri = str(Path(folder) / "lake")
        fill(uri, count, 500.0)
        batches = (samples(first, RECORD, 500.0) for first in range(0, count, RECORD))
        with broker(args.base, "", PARTITIONS) as layout:
            for kind, rows in [("lone", 32), *((kind, rows) for rows in ROWS for kind in ("lake", "live"))]:
                if (kind, rows) == ("lake", min(ROWS)):
                    send_samples(layout.brokers, TOPICS.samples, batches)
                case = ["--recipe", args.recipe, "--slices", str(slices), "--case", kind, str(rows)]
                ran = [sys.executable, __file__, *case, layout.brokers, uri]
                out = subprocess.run(ran, check=True, stdout=subprocess.PIPE, text=True).stdout
                found = json.loads(out.splitlines()[-1])
                print(kind, rows, found[-1:], flush=True)
                for name in found[0]["group"]:
                    ours, before = (
                        statistics.median(pair[side][name] for pair in found) for side in ("group", "alone")
                    )
                    ratio = statistics.median(pair["group"][name] / max(pair["alone"][name], 1e-9) for pair in found)
                    unit = {"per_second": "samples/s", "steps_a_transaction": "steps"}.get(name, "ms")
                    label = f"{kind}_{rows}_{name}" if kind != "lone" else f"lone_row_{name}"
                    figures.append(Figure(label, round(ours, 3), unit, "alone", round(before, 3), round(ratio, 2)))
    show(figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
