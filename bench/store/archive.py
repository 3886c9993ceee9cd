"""What the archive of `events` costs: CPU of the sink's process and bytes an event, at rest and at a rate.

Method: a Kafka of its own, a folder or an HDFS of its own, and `headrace sink` of the demo shop under the supervisor,
its upkeep included. A producer in a process of its own appends what gateways do: every 50 ms a record of impressions
and one of clicks a partition, and ten promises a second. At rest the promises alone come. The peer is the same sink
with `archive.events = false`, over the same records. CPU seconds are the processes' own and their children's.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.figures import Figure, show

from headrace.backends.archive.delta import DeltaArchive
from headrace.backends.archive.files import listed
from headrace.backends.log.kafka import KafkaProducer
from headrace.cli.tools.project_try import made_up
from headrace.contract.config import port
from headrace.contract.formats.events import (
    Punctuation,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.formats.topics import Topics
from headrace.deploy.local import stack as local_stack
from headrace.deploy.local.layout import CHECKOUT, HOST, Layout
from headrace.deploy.local.readiness import quiet_clients
from headrace.deploy.local.supervise import Supervisor
from headrace.examples.shop.shop import PROJECT

BASE = 23_450
PARTITIONS = 2
RECORD_S = 0.05
SETTLED_S = 5.0


def produce(brokers: str, rate: int, seconds: float) -> None:
    """Append `rate` impressions a second, a tenth as many clicks, and promises."""
    producer, epoch = KafkaProducer(brokers), time.time_ns() // 1_000_000
    topic, each = Topics().events, round(rate * RECORD_S / PARTITIONS)
    impressions = made_up(impression_schema(PROJECT), 2_000)
    clicks = made_up(feedback_schema(PROJECT, PROJECT.feedback[0]), 2_000)
    start, counts = time.monotonic(), {"read": 0, "appended": 0, "dead_lettered": 0, "repeated": 0}
    for number in range(round(seconds / RECORD_S)):
        at = number * each % 1_900
        for partition in range(PARTITIONS):
            told = {"gateway": "host-1", "epoch": str(epoch), "seq": str(number), "late": "set-aside"}
            if each:
                value = encode_batch(impressions.slice(at, each))
                producer.send(topic, partition, value, headers={"kind": "impression", **told})
                if number % 10 == 0:
                    value = encode_batch(clicks.slice(at, each))
                    producer.send(topic, partition, value, headers={"kind": "feedback", "type": "click", **told})
            if number % 2 == 0:
                counts |= {"read": number * each, "appended": number * each}
                promise = Punctuation("host-1", epoch, time.time_ns() // 1_000_000, counts=counts, by_record=True)
                producer.send(topic, partition, encode_punctuation(promise), headers={"kind": "punctuation", **told})
        producer.poll(0.0)
        time.sleep(max(0.0, start + (number + 1) * RECORD_S - time.monotonic()))
    if left := producer.flush(60):
        raise SystemExit(f"{left} records got no receipt")


@contextmanager
def stack(store: str, base: int, *, archives: bool) -> Iterator[Layout]:
    """Yield Kafka, the store and the sink, running."""
    home = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    project = shutil.copytree(CHECKOUT / "examples" / "shop", home / "shop")
    with (project / "headrace.toml").open("a") as toml:
        toml.write(f"\n[archive]\nevents = {str(archives).lower()}\n")
    on_hdfs = store == "hdfs"
    layout = Layout(
        home=home,
        port_base=base,
        brokers=f"{HOST}:{port('kafka', base)}",
        store=f"hdfs://{HOST}:{port('namenode', base)}/headrace" if on_hdfs else f"file:{home}/store",
        webhdfs=f"http://{HOST}:{port('namenode_http', base)}" if on_hdfs else None,
        project=project,
        own_kafka=True,
        own_hdfs=on_hdfs,
    )
    try:
        local_stack.start(layout, Topics().specs(PARTITIONS), print, stages=("sink",))
        yield layout
    finally:
        local_stack.stop(layout, print)
        shutil.rmtree(home, ignore_errors=True)


def cpu_s(layout: Layout) -> dict[str, float]:
    """Return CPU seconds of each process and of its children that ended."""
    found = {}
    for name, pid in Supervisor(layout).pids().items():
        times = psutil.Process(pid).cpu_times()
        found[name] = times.user + times.system + times.children_user + times.children_system
    return found


def stored(layout: Layout) -> tuple[int, int]:
    """Return bytes and records of the archive; nothing where there is none."""
    archive = DeltaArchive(f"{layout.store.removeprefix('file:')}/lake/events", Topics().events)
    table = archive.open()
    files = [] if table is None else listed(table)
    return sum(file.size for file in files), sum(file.rows for file in files)


def phase(layout: Layout, rate: int, seconds: float, what: str) -> Iterator[Figure]:
    """Append at a rate and yield what it cost; it lasts whole minutes, so that as many rounds fall into each."""
    command = [sys.executable, __file__, "--child", layout.brokers, str(rate), str(seconds)]
    size, rows = stored(layout)
    child = subprocess.Popen(command)
    time.sleep(SETTLED_S)
    before, begin_s = cpu_s(layout), time.monotonic()
    child.wait()
    # The last round, which takes what came since the one before.
    time.sleep(60.0 if stored(layout)[1] or rows else 0.0)
    took_s, used = time.monotonic() - begin_s, cpu_s(layout)
    name = f"archive_{what}_{rate if rate else 'at_rest'}"
    for process, spent_s in sorted(used.items()):
        if process in ("sink", "kafka", "namenode", "datanode"):
            yield Figure(f"{name}_cpu_{process}", round(spent_s - before[process], 2), f"s in {took_s:.0f} s")
    bytes_, rows = (now - then for now, then in zip(stored(layout), (size, rows), strict=True))
    if rows:
        yield Figure(f"{name}_bytes_a_record", round(bytes_ / rows, 1), "bytes")
        if rate:
            yield Figure(f"{name}_bytes_an_event", round(bytes_ / (rate * 1.1 * seconds), 1), "bytes")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=["hdfs", "file"], default="file")
    parser.add_argument("--rate", type=int, default=500, help="impressions/s")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each phase")
    parser.add_argument("--base", type=int, default=BASE, help="PORT_BASE")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        produce(args.child[0], int(args.child[1]), float(args.child[2]))
        return
    found: list[Figure] = []
    quiet_clients()
    for what in ("on", "off"):
        with stack(args.store, args.base, archives=what == "on") as layout:
            for rate in (0, args.rate):
                found += phase(layout, rate, args.seconds, what)
                print(f"{what}, {rate} impressions/s: done", flush=True)
    show(found)


if __name__ == "__main__":
    main()
