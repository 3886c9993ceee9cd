"""Events/s of join and features through Faust, from broker to broker, on one core, beside the same job per event.

Method: a broker of its own holds the events before the clock starts: 4 partitions, three impressions to one click,
500 rows a record for ours, a JSON record an event for the peers (bench/peers/stream.py). Each side runs on core 0
alone, the broker and the observer on the others. Sides take turns; figures are medians. Two rates, from the first
tenth of the samples to the last one: by the wall, and per second of CPU, which a busy machine disturbs less.

`--peer quix=PYTHON` and `--peer bytewax=PYTHON` add an engine that lies in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parent))

from harness.broker import broker
from harness.figures import beside, show

from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.backends.log.kafka import KafkaProducer, KafkaReader
from headrace.cli.project_folder import load_project
from headrace.contract.errors import Overloaded
from headrace.contract.formats.events import (
    Punctuation,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Record, TopicSpec
from headrace.contract.project import Project
from headrace.deploy.local.layout import Layout

PARTITIONS = 4
RECORD_ROWS = 500
START_MS = 1_700_000_000_000
PROJECT_FILE = """
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, Counter, Cross, FeatureSpec, Numeric, Rate

FIELDS = {"user_id": "int64", "item_id": "int64", "category": "int64", "device": "string", "query": "string",
          "price": "float64"}
PROJECT = Project(
    name="bench",
    impression=ImpressionType(tag="bench.impression", key="user_id", fields=FIELDS),
    feedback=(FeedbackType(name="click", tag="bench.click", fields={"item_id": "int64"}),),
    tasks=(Task(name="click", feedback="click", window_ms=10_000),),
    features=FeatureSpec(
        counters=(Counter(name="user", key="user_id", counts=("impression", "click")),),
        features=(
            *(Categorical(field=name) for name in ("user_id", "item_id", "category", "device", "query")),
            Cross(fields=("user_id", "category")),
            Numeric(field="price"),
            Rate(of="counter.user.click", over="counter.user.impression"),
        ),
    ),
).checked()
"""


class Traffic:
    """Events of one partition, a record's worth at a time, the same for every side."""

    def __init__(self, project: Project, partition: int) -> None:
        self._rng = np.random.default_rng(partition)
        self._partition, self._number, self._time_ms = partition, 0, START_MS
        self._impressions = impression_schema(project)
        self._clicks = feedback_schema(project, project.feedback[0])

    def step(self) -> tuple[pa.RecordBatch, pa.RecordBatch, int]:
        """Return impressions, the clicks on a third of them, and the time that has passed then."""
        rng, rows = self._rng, RECORD_ROWS
        names = [f"{self._partition}-{self._number + i:012d}" for i in range(rows)]
        self._number += rows
        user_N = rng.integers(0, 5_000, rows) * PARTITIONS + self._partition
        columns: dict[str, Any] = {
            "event_id": names,
            "request_id": names,
            "place": np.zeros(rows, np.int32),
            "key": [str(user) for user in user_N],
            "event_time_ms": self._time_ms + np.arange(rows) // 5,
            "user_id": user_N,
            "item_id": rng.integers(0, 100_000, rows),
            "category": rng.integers(0, 50, rows),
            "device": [("phone", "desk", "pad")[i] for i in rng.integers(0, 3, rows)],
            "query": [f"q{i}" for i in rng.integers(0, 10_000, rows)],
            "price": np.round(rng.random(rows) * 100, 2),
        }
        self._time_ms += rows // 5
        shown = _batch(columns, self._impressions, rows)
        clicked = np.sort(rng.choice(rows, rows // 3, replace=False))
        clicks = {name: np.asarray(columns[name])[clicked] for name in self._clicks.names if name in columns}
        clicks["event_id"] = [f"{names[i]}/click" for i in clicked]
        clicks["event_time_ms"] = clicks["event_time_ms"] + 50
        return shown, _batch(clicks, self._clicks, len(clicked)), self._time_ms


def _batch(columns: dict[str, Any], schema: pa.Schema, rows: int) -> pa.RecordBatch:
    arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(rows, f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def fill(layout: Layout, events: int) -> tuple[int, int]:
    """Append the events for both sides; return how many there are and how many samples they make."""
    _, project = load_project(layout.project)
    producer = KafkaProducer(layout.brokers, linger_ms=20.0)
    topics = Topics()

    def send(topic: str, partition: int, value: bytes, headers: dict[str, str] | None = None) -> None:
        while True:
            try:
                producer.send(topic, partition, value, headers=headers)
                return
            except Overloaded:
                producer.poll(0.05)

    count = samples = 0
    traffic = [Traffic(project, partition) for partition in range(PARTITIONS)]
    while count < events:
        for partition, each in enumerate(traffic):
            shown, clicks, now_ms = each.step()
            last = count + shown.num_rows + clicks.num_rows >= events and count < events
            now_ms += 1_000_000 if last or count >= events else 0
            punctuation = Punctuation("bench", 1, now_ms)
            send(topics.events, partition, encode_batch(shown), {"kind": "impression"})
            send(topics.events, partition, encode_batch(clicks), {"kind": "feedback", "type": "click"})
            send(topics.events, partition, encode_punctuation(punctuation), {"kind": "punctuation"})
            for kind, batch in (("impression", shown), ("click", clicks)):
                for row in batch.to_pylist():
                    send("plain", partition, json.dumps({"kind": kind, **row}).encode())
            send("plain", partition, json.dumps({"kind": "time", "time_ms": now_ms}).encode())
            count += shown.num_rows + clicks.num_rows
            samples += shown.num_rows
    for partition in range(PARTITIONS):
        end = Punctuation("bench", 1, START_MS + 10**9)
        send(topics.events, partition, encode_punctuation(end), {"kind": "punctuation"})
        send("plain", partition, json.dumps({"kind": "time", "time_ms": START_MS + 10**9}).encode())
    producer.flush(60)
    return count, samples


def nudge(brokers: str, number: int) -> None:
    """Append the punctuation that a gateway would: a stage restores at a partition's first new record."""
    producer = KafkaProducer(brokers)
    for partition in range(PARTITIONS):
        end = encode_punctuation(Punctuation("bench", 1, START_MS + 10**9 + number))
        producer.send(Topics().events, partition, end, headers={"kind": "punctuation"})
    producer.flush(60)


def measure(
    layout: Layout, command: list[str], env: dict[str, str], topic: str, count_of: Callable[[Record], int],
    events: int, samples: int,
) -> tuple[float, float]:  # fmt: skip
    """Run one side on core 0 until all samples are there; return events/s by the wall and by its CPU."""
    reader = KafkaReader(layout.brokers)
    reader.assign({(topic, p): end for p, end in reader.end_offsets(topic).items()})
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        seen = psutil.Process(process.pid)
        seen.cpu_affinity([0])
        got, begin = 0, (0.0, 0.0, 0)
        deadline = time.monotonic() + 600
        while got < samples:
            records = reader.poll(10_000, 0.2)
            got += sum(map(count_of, records))
            now = time.monotonic(), sum(seen.cpu_times()[:2]), got
            if begin[2] == 0 and got >= samples // 10:
                begin = now
            if process.poll() is not None or now[0] > deadline:
                words = process.stderr.read() if process.poll() is not None and process.stderr else "too slow"
                raise RuntimeError(f"{command}: {got} of {samples} samples, then: {words[-2000:]}")
        share = (got - begin[2]) / samples * events
        return share / (now[0] - begin[0]), share / (now[1] - begin[1])
    finally:
        process.terminate()
        process.wait(timeout=30)
        reader.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 120,000 events instead of three of 600,000")
    parser.add_argument("--peer", action="append", default=[], metavar="ENGINE=PYTHON")
    parser.add_argument("--port-base", type=int, default=24_300)
    args = parser.parse_args()
    rounds, wanted = (1, 120_000) if args.quick else (3, 600_000)
    peers = {"faust": sys.executable} | dict(peer.split("=", 1) for peer in args.peer)
    rates: dict[str, list[tuple[float, float]]] = {}
    with broker(args.port_base, PROJECT_FILE, PARTITIONS) as layout:
        admin = KafkaAdmin(layout.brokers)
        admin.ensure_topics([TopicSpec(name, PARTITIONS) for name in ("plain", *(f"out-{peer}" for peer in peers))])
        events, samples = fill(layout, wanted)
        print(f"{events:,} events that make {samples:,} samples")
        env = os.environ | {"PORT_BASE": str(args.port_base), "HEADRACE_BROKERS": layout.brokers}
        plain = str(Path(__file__).parent / "peers" / "stream.py")
        for number in range(rounds):
            # A generation of its own makes a stage begin anew; the topics' names stay those of the first one.
            state = layout.home / f"round-{number}"
            ours = env | {"HEADRACE_STORE": f"file:{state}", "HEADRACE_HOME": str(state)}
            command = [str(Path(sys.executable).with_name("headrace")), "stream", "--project", str(layout.project)]
            nudge(layout.brokers, number)
            rates.setdefault("headrace", []).append(
                measure(layout, command, ours, Topics().samples, _rows, events, samples)
            )
            for peer, python in peers.items():
                words = [python, plain, peer, layout.brokers, "plain", str(PARTITIONS), f"out-{peer}"]
                one = {"BENCH_GROUP": f"{peer}-{number}"}
                rates.setdefault(peer, []).append(
                    measure(layout, words, env | one, f"out-{peer}", lambda _: 1, events, samples)
                )
            for name, found in rates.items():
                print(f"round {number + 1}: {name}: {found[-1][0]:,.0f} events/s, {found[-1][1]:,.0f} a CPU second")
    show(list(beside("stream_events", rates, "faust", "per event")))


def _rows(record: Record) -> int:
    with pa.ipc.open_stream(
        pa.py_buffer(record.value), options=pa.ipc.IpcReadOptions(included_fields=[0], use_threads=False)
    ) as reader:
        return sum(batch.num_rows for batch in reader)


if __name__ == "__main__":
    main()
