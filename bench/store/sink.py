"""Which rate of samples the sink follows, from the real topic to the lake.

Method: a Kafka of its own, an HDFS of its own (or a folder), and `headrace sink` of the demo shop under the
supervisor, its upkeep included. A producer in a process of its own appends samples as the stream does: a record a
partition every 50 ms, each row with an id and numbers of its own, all made before the clock starts. For every rate,
rows that are in the topic and not yet in the lake are counted four times a second. A sink that commits every 3 s is
never at 0: what waits is what came since the last commit began, and while one is written. It follows when what waits
does not grow: `slope` is the rise of the median from the middle third of the run to the last one, per second, as a
share of the rate. Then the sink stops, a backlog is appended, and the sink's pace through it is its limit. CPU seconds
are the processes' own.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.figures import Figure, show

from headrace.backends.log.kafka import KafkaProducer, KafkaReader
from headrace.contract.config import port
from headrace.contract.formats.events import encode_batch
from headrace.contract.formats.sample import sample_schema
from headrace.contract.formats.topics import Topics
from headrace.deploy.local import stack as local_stack
from headrace.deploy.local.layout import CHECKOUT, HOST, Layout
from headrace.deploy.local.readiness import quiet_clients
from headrace.deploy.local.supervise import Supervisor
from headrace.examples.shop.shop import PROJECT

BASE = 23_350
PARTITIONS = 2
RECORD_S = 0.05
POOL = 64
"""Batches that take turns, each with numbers of its own: more rows than two commits hold at the highest rate."""
LOOK_S = 0.25
READY_S = 90.0


class Samples:
    """Records of one partition, as the stream writes them."""

    def __init__(self, partition: int, rows: int, begin: int) -> None:
        self.partition, self.rows, self.number = partition, rows, begin
        self._begin, self._begin_ms = begin, time.time_ns() // 1_000_000
        self._rng, self._schema = np.random.default_rng(partition), sample_schema(PROJECT)
        self._pool = [{f.name: self._column(f) for f in self._schema} for _ in range(POOL)]

    def record(self) -> tuple[bytes, dict[str, str]]:
        """Return the next record's value and headers."""
        n, last = self.number, self.rows - 1
        now_ms = self._begin_ms + round(1000 * RECORD_S * (n - self._begin))
        columns = dict(self._pool[n % POOL])
        columns["offset"] = pa.array(np.full(self.rows, n, np.int64))
        columns["event_time_ms"] = pa.array(now_ms - np.arange(self.rows, dtype=np.int64) % 50)
        columns["event_id"] = columns["request_id"] = pa.array(
            [f"{self.partition}-{n:08d}-{i}" for i in range(self.rows)]
        )
        batch = pa.RecordBatch.from_arrays([columns[name] for name in self._schema.names], schema=self._schema)
        self.number += 1
        # The record before a producer's first one may have had fewer rows.
        after = f"{n - 1}:{last if n > self._begin else 0}" if n else "-1:-1"
        return encode_batch(batch), {"after": after, "last": f"{n}:{last}", "spec": PROJECT.features.digest()}

    def _column(self, field: pa.Field) -> pa.Array:
        rng, rows = self._rng, self.rows
        fixed: dict[str, Callable[[], Any]] = {
            "partition": lambda: np.full(rows, self.partition),
            "rank": lambda: np.arange(rows),
            "task": lambda: [PROJECT.tasks[0].name] * rows,
            "label": lambda: rng.random(rows) < 0.1,
            "weight": lambda: np.ones(rows),
            "spec": lambda: [PROJECT.features.digest()] * rows,
            "key": lambda: rng.integers(0, 100_000, rows).astype(str),
        }
        if field.name in fixed:
            return pa.array(fixed[field.name]()).cast(field.type)
        if pa.types.is_list(field.type):
            width = PROJECT.features.slots if field.name == "slots" else PROJECT.features.numerics
            values = rng.integers(0, 2**62, rows * width) if field.name == "slots" else rng.random(rows * width)
            offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * width)
            return pa.ListArray.from_arrays(offsets, pa.array(values).cast(field.type.value_type))
        if pa.types.is_string(field.type):
            return pa.array(rng.integers(0, 1_000, rows).astype(str)).cast(field.type)
        return pa.array(rng.integers(0, 100_000, rows)).cast(field.type)


def produce(brokers: str, rows: int, begin: int, records: int, paced: bool) -> None:
    """Make `records` records a partition, from record `begin` on, say so, wait for a line, and append them.

    One a partition each RECORD_S where it is paced.
    """
    producer = KafkaProducer(brokers)
    parts = [Samples(partition, rows, begin) for partition in range(PARTITIONS)]
    made = [[part.record() for part in parts] for _ in range(records)]
    print("made", flush=True)
    sys.stdin.readline()
    start = time.monotonic()
    for number, each in enumerate(made):
        for partition, (value, headers) in enumerate(each):
            producer.send(Topics().samples, partition, value, headers=headers)
        producer.poll(0.0)
        if paced:
            time.sleep(max(0.0, start + (number + 1) * RECORD_S - time.monotonic()))
        elif number % 50 == 0:
            producer.flush(60)
    if left := producer.flush(60):
        raise SystemExit(f"{left} records got no receipt")


@contextmanager
def stack(store: str) -> Iterator[Layout]:
    """Yield Kafka, the store and the sink, running."""
    home = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    on_hdfs = store == "hdfs"
    layout = Layout(
        home=home,
        port_base=BASE,
        brokers=f"{HOST}:{port('kafka', BASE)}",
        store=f"hdfs://{HOST}:{port('namenode', BASE)}/headrace" if on_hdfs else f"file:{home}/store",
        webhdfs=f"http://{HOST}:{port('namenode_http', BASE)}" if on_hdfs else None,
        project=CHECKOUT / "examples" / "shop",
        own_kafka=True,
        own_hdfs=on_hdfs,
    )
    try:
        local_stack.start(layout, Topics().specs(PARTITIONS), print, stages=("sink",))
        yield layout
    finally:
        local_stack.stop(layout, print)
        shutil.rmtree(home, ignore_errors=True)


class Bench:
    """What is known from outside: rows in the topic, rows in the lake, CPU of each process."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.supervisor = layout, Supervisor(layout)
        self._reader = KafkaReader(layout.brokers)
        self.records = 0
        """Records of each partition that were asked for until now."""
        self._rows: list[tuple[int, int]] = []
        self._stored_before = 0.0

    def metric(self, name: str) -> float:
        """Return a number of the sink, 0 where it has none yet."""
        url = f"http://{HOST}:{self.layout.port('metrics_sink')}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        wanted = re.compile(rf"headrace_sink_{name}(\{{.*\}})? (.+)")
        return next((float(found[2]) for line in lines if (found := wanted.fullmatch(line))), 0.0)

    def produce(self, rows: int, records: int, *, paced: bool) -> subprocess.Popen[str]:
        """Start a producer of records of `rows` rows; returns when it begins to append."""
        words = [self.layout.brokers, rows, self.records, records, int(paced)]
        self._rows += [(self.records, rows)]
        self.records += records
        command = [sys.executable, __file__, "--child", *map(str, words)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        child.stdin.write("\n")
        child.stdin.flush()
        return child

    def appended(self) -> int:
        """Return how many rows the topic has."""
        ends = self._reader.end_offsets(Topics().samples).values()
        following = [*(begin for begin, _ in self._rows[1:]), self.records]
        return sum(
            max(0, min(end, stop) - begin) * rows
            for end in ends
            for (begin, rows), stop in zip(self._rows, following[: len(self._rows)], strict=True)
        )

    def stored(self) -> float:
        """Return how many rows the lake has, by what the sink has told over all its lives."""
        return self._stored_before + self.metric("rows_stored_total")

    def cpu_s(self) -> dict[str, float]:
        """Return CPU seconds of each process and of its children, of those that ended too."""
        found = {}
        for name, pid in self.supervisor.pids().items():
            times = psutil.Process(pid).cpu_times()
            found[name] = times.user + times.system + times.children_user + times.children_system
        return found

    def stop_sink(self) -> None:
        """Stop the sink and remember what it stored."""
        self._stored_before = self.stored()
        self.supervisor.end(("sink",))

    def drained(self, patience_s: float) -> float:
        """Wait until the lake has all of the topic; return the seconds it took."""
        begin = time.monotonic()
        while (left := self.appended() - self.stored()) > 0:
            if time.monotonic() - begin > patience_s:
                raise RuntimeError(f"{left:,.0f} rows wait after {patience_s:.0f} s")
            time.sleep(0.1)
        return time.monotonic() - begin


def follow(bench: Bench, rate: int, seconds: float) -> Iterator[Figure]:
    """Append at one rate and yield what waited."""
    rows, records = round(rate * RECORD_S / PARTITIONS), round(seconds / RECORD_S)
    commits, spent_s = bench.metric("commit_seconds_count"), bench.metric("commit_seconds_sum")
    before, waiting = bench.appended(), list[float]()
    with bench.produce(rows, records, paced=True) as producer:
        cpu, begin = bench.cpu_s(), time.monotonic()
        while producer.poll() is None:
            waiting.append(bench.appended() - bench.stored())
            time.sleep(LOOK_S)
    took_s, appended = time.monotonic() - begin, bench.appended() - before
    used = {name: s - cpu.get(name, 0.0) for name, s in bench.cpu_s().items()}
    bench.drained(60.0)
    commits = bench.metric("commit_seconds_count") - commits
    middle, last = (waiting[len(waiting) * i // 3 : len(waiting) * (i + 1) // 3] for i in (1, 2))
    slope = (statistics.median(last) - statistics.median(middle)) / (seconds / 3) / rate
    name = f"sink_at_{rate}"
    yield Figure(f"{name}_appended", round(appended / took_s), "rows/s")
    yield Figure(f"{name}_waiting_p50", round(statistics.median(waiting[len(waiting) // 3 :]) / rate, 2), "s")
    yield Figure(f"{name}_waiting_max", round(max(waiting) / rate, 2), "s")
    yield Figure(f"{name}_slope", round(100 * slope, 2), "%")
    yield Figure(f"{name}_commit", round((bench.metric("commit_seconds_sum") - spent_s) / commits, 2), "s")
    for process, cpu_s in sorted(used.items()):
        yield Figure(f"{name}_cpu_{process}", round(cpu_s / took_s, 2), "cores")


def catch_up(bench: Bench, rows: int) -> Iterator[Figure]:
    """Append a backlog while the sink is away and yield its pace through it, from its first commit to its last."""
    bench.stop_sink()
    size = 625
    with bench.produce(size, rows // size // PARTITIONS, paced=False) as producer:
        producer.wait()
    before = bench.appended() - rows
    bench.supervisor.begin(("sink",))
    until, first, at = time.monotonic() + READY_S, 0.0, 0.0
    while time.monotonic() < until and not first:
        time.sleep(0.1)
        try:
            stored = bench.stored()
        except OSError:
            continue
        if stored > before + 1:
            first, at = stored, time.monotonic()
    cpu = bench.cpu_s()
    bench.drained(300.0)
    took_s, pids = time.monotonic() - at, bench.cpu_s()
    yield Figure("sink_backlog", round((bench.appended() - first) / took_s), "rows/s")
    for process in ("sink", "kafka", "namenode", "datanode"):
        if process in pids:
            yield Figure(f"sink_backlog_cpu_{process}", round((pids[process] - cpu[process]) / took_s, 2), "cores")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="15 s at 25,000 rows/s and a backlog of 300,000 rows")
    parser.add_argument("--store", choices=["hdfs", "file"], default="hdfs")
    parser.add_argument("--rates", default="25000,40000", help="rows/s, one after the other")
    parser.add_argument("--seconds", type=float, default=75.0, help="at each rate; an upkeep comes every 60 s")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        brokers, rows, begin, records, paced = args.child
        produce(brokers, int(rows), int(begin), int(records), paced == "1")
        return
    rates, seconds, backlog = [int(rate) for rate in args.rates.split(",")], args.seconds, 2_000_000
    if args.quick:
        rates, seconds, backlog = [25_000], 15.0, 300_000
    found: list[Figure] = []
    quiet_clients()
    with stack(args.store) as layout:
        bench = Bench(layout)
        for rate in rates:
            found += follow(bench, rate, seconds)
            print(f"{rate:,} rows/s: done", flush=True)
        found += catch_up(bench, backlog)
    show(found)


if __name__ == "__main__":
    main()
