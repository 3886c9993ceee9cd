"""What recording a step costs the trainer: samples/s with steps recorded one by one, and in groups beside learning.

Method: a broker of its own has 8 partitions of seeded samples, and a store on disk has the same ones as a lake. A
trainer with everything that it has in production (Kafka's transactions, checkpoints, deltas) learns a backlog of
either, in steps of 32, 512 and 8,192 rows: once with `train.group_steps = 0`, which records each step once the one
before it is learnt, and once with the default. A last pair learns single rows that come one by one, each when the one
before was learnt: what a lone step takes from the reading of its row to the end of its learning.
Each side is a process of its own and a model of its own, sides take turns, figures are medians of the rounds. `record`
is the time from the beginning of a transaction to its read back, in whatever thread, shared by its steps; its CPU
time is that of this thread alone, without the threads of Kafka's client, which `cpu_us` has.

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
ROWS = (32, 512, 8_192)
RECORD, WARM_STEPS = 16_384, 20


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


def trainer_of(side: str, recipe: str, rows: int, brokers: str, lake: str, store: str) -> tuple[Trainer, Timed]:
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
            config=TrainConfig(group_steps=SIDES[side], wait_ms=1),
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


def backlog(trainer: Trainer, writer: Timed, seconds: float) -> dict[str, float]:
    """Learn what there is, for so long at most."""
    while trainer.learner.step < WARM_STEPS:
        trainer.turn()
    steps, learnt, cpu, wall = trainer.learner.step, trainer.learnt, time.process_time(), time.perf_counter()
    writer.seconds, writer.cpu, writer.transactions, ended = 0.0, 0.0, 0, wall
    while ended - wall < seconds and trainer.turn():
        ended = time.perf_counter()
    done = trainer.learner.step - steps
    return {
        "per_second": (trainer.learnt - learnt) / (ended - wall),
        "step_us": (ended - wall) / done * 1e6,
        "cpu_us": (time.process_time() - cpu) / done * 1e6,
        "record_us": writer.seconds / done * 1e6,
        "record_cpu_us": writer.cpu / done * 1e6,
        "steps": done,
        "steps_a_transaction": done / max(1, writer.transactions),
    }


def lone(trainer: Trainer, brokers: str, topic: str, seconds: float) -> dict[str, float]:
    """Send single rows, each when the one before is learnt; return the milliseconds from sending to learning."""
    while trainer.turn() or trainer.source.lag(trainer.deps.reader.end_offsets(topic)):
        pass  # What the side before has sent.
    producer, took, last = KafkaProducer(brokers, linger_ms=0.0), list[float](), trainer.positions.at(0)
    number = (last.offset + 1) * 64 // PARTITIONS
    for _ in range(WARM_STEPS + int(25 * seconds)):
        row = samples(number * PARTITIONS, 1, 500.0)
        new = Position(row["offset"][0].as_py(), row["rank"][0].as_py())
        headers = {"after": format_position(last), "last": format_position(new), "spec": ""}
        last, number, began = new, number + 1, time.perf_counter()
        producer.send(topic, 0, encode_batch(row), headers=headers)
        producer.flush(5.0)
        while not trainer.turn():
            pass
        took.append(time.perf_counter() - began)
    kept = took[WARM_STEPS:]
    return {"lone_ms": statistics.median(kept) * 1e3, "lone_p95_ms": statistics.quantiles(kept, n=20)[-1] * 1e3}


def main() -> int:
    """Print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute or two")
    parser.add_argument("--base", type=int, default=26_000, help="first port of the broker")
    parser.add_argument("--recipe", choices=RECIPES, default="logistic")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help="rows a step")
    parser.add_argument("--samples", type=int, help="in the topic, and in the lake")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    seconds, rounds = args.seconds or (2.0 if args.quick else 8.0), args.rounds or (1 if args.quick else 3)
    if args.side:
        side, kind, rows, brokers, lake = args.side
        trainer, writer = trainer_of(
            side, args.recipe, int(rows), brokers, lake if kind == "lake" else "", f"{lake}-store"
        )
        found = backlog(trainer, writer, seconds) if kind != "lone" else lone(trainer, brokers, TOPICS.samples, seconds)
        print(json.dumps(found), flush=True)
        os._exit(0)  # The readers of the lake and of Kafka have threads that an orderly end may meet at work.
    count = args.samples or (400_000 if args.quick else 1_000_000)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        uri = str(Path(folder) / "lake")
        fill(uri, count, 500.0)
        batches = (samples(first, RECORD, 500.0) for first in range(0, count, RECORD))
        with broker(args.base, "", PARTITIONS) as layout:
            cases = [(kind, rows) for rows in args.rows for kind in ("lake", "live")]
            for kind, rows in [("lone", 32), *cases]:
                if (kind, rows) == cases[0]:
                    send_samples(layout.brokers, TOPICS.samples, batches)
                found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
                for each in range(rounds):
                    for side in SIDES if each % 2 == 0 else reversed(SIDES):
                        how = ["--recipe", args.recipe, "--seconds", str(seconds), "--side", side, kind, str(rows)]
                        ran = [sys.executable, __file__, *how, layout.brokers, uri]
                        out = subprocess.run(ran, check=True, stdout=subprocess.PIPE, text=True).stdout
                        found[side].append(json.loads(out.splitlines()[-1]))
                for name in found["group"][0]:
                    ours, before = (statistics.median(r[name] for r in found[side]) for side in ("group", "alone"))
                    ratio = round(ours / before, 2) if before else 0.0
                    unit = {"per_second": "samples/s", "lone_ms": "ms", "lone_p95_ms": "ms"}.get(name, "a step")
                    figures.append(
                        Figure(f"{kind}_{rows}_{name}", round(ours, 2), unit, "alone", round(before, 2), ratio)
                    )
    show(figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
