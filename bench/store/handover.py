"""From the lake to live: samples/s that the trainer gets from a stored version, the memory it takes, and the time
between the last stored sample and the first live one.

Method: a lake of seeded samples (35 columns, 12 features, positives soon and negatives when their window ends, 2 % of
the rows hours late, 8 partitions) is read in the order of the recipe, a batch of 4,096 after the other: by
`StoredRows`, piece by piece with `--bytes` for them, and by reading the whole version and sorting it, as Headrace did
before and as who reads Delta into pandas does. Once the batches are only taken, once a logistic regression learns them.
Each side is a process of its own, sides take turns, figures are medians of the rounds. Memory is the most that the
process had resident, less what it had before the lake was opened. Files are in the page cache.

    python bench/store/handover.py --rows 8000000
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.figures import Figure, show

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.upkeep import Done, Upkeep
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import TrainConfig
from headrace.contract.formats.events import encode_batch
from headrace.contract.formats.positions import Position
from headrace.contract.formats.sample import conform, format_position, list_column, sample_schema
from headrace.contract.formats.topics import Topics
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, FeatureSpec
from headrace.trainer.model.learner import learner_for
from headrace.trainer.recipes import logistic
from headrace.trainer.source.batch import to_batch
from headrace.trainer.source.columns import stored_columns
from headrace.trainer.source.source import Source
from headrace.trainer.source.stored import StoredRows, stored_order

FIELDS = tuple(f"field_{i:02d}" for i in range(12))
PROJECT = Project(
    name="handover",
    impression=ImpressionType(tag="shown", key="field_00", fields=dict.fromkeys(FIELDS, "string")),
    feedback=(FeedbackType(tag="click", name="click"),),
    tasks=(Task(name="click", feedback="click", window_ms=600_000),),
    features=FeatureSpec(features=tuple(Categorical(field=name) for name in FIELDS)),
    recipe=logistic(),
)
TOPICS = Topics(1)
SCHEMA = sample_schema(PROJECT)
PARTITIONS, BATCH, COMMIT = 8, 4_096, 512_000
BEGIN_MS = 1_795_564_800_000
SIDES = ("pieces", "whole")


def samples(first: int, rows: int, rate: float) -> pa.RecordBatch:
    """Return samples in the order in which the log resolves them, `rate` a second of event time."""
    rng = np.random.default_rng(first)
    known_N = BEGIN_MS + ((first + np.arange(rows)) * 1_000 / rate).astype(np.int64)
    label_N = rng.random(rows) < 0.1
    late_N = np.where(rng.random(rows) < 0.02, rng.integers(0, 3 * 3_600_000, rows), 0)
    at_N = known_N - np.where(label_N, 20_000, 600_000) - late_N
    number_N = first + np.arange(rows)
    slots_NF = rng.integers(0, 1 << 20, (rows, len(FIELDS))) * 0x9E3779B9 + 1
    texts = pa.array([f"value {i}" for i in range(1_000)])
    names = pa.array([f"{n:016x}" for n in number_N])
    columns: dict[str, pa.Array] = {
        "partition": pa.array((number_N % PARTITIONS).astype(np.int32)),
        "offset": pa.array(number_N // 64),
        "rank": pa.array((number_N % 64).astype(np.int32)),
        "event_id": names,
        "request_id": names,
        "place": pa.array(np.zeros(rows, np.int32)),
        "key": names,
        "event_time_ms": pa.array(at_N),
        "impression_offset": pa.array(number_N // 64),
        "impression_row": pa.array((number_N % 64).astype(np.int32)),
        "task": pa.array(["click"] * rows),
        "label": pa.array(label_N.astype(np.float32)),
        "weight": pa.array(np.ones(rows, np.float32)),
        "version": pa.array(["v1"] * rows),
        "slots": list_column(slots_NF, pa.int64()),
        "numeric": list_column(np.zeros((rows, 0), np.float32), pa.float32()),
        "spec": pa.array([PROJECT.features.digest()] * rows),
        "correction": pa.array(np.zeros(rows, np.bool_)),
        **{name: texts.take(pa.array(rng.integers(0, 1_000, rows))) for name in FIELDS},
    }
    arrays = [columns[f.name] if f.name in columns else pa.nulls(rows, f.type) for f in SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def fill(uri: str, rows: int, rate: float) -> None:
    """Write a lake of so many samples."""
    lake = DeltaLake(uri, partitions=PARTITIONS)
    for first in range(0, rows, COMMIT):
        batch = samples(first, min(COMMIT, rows - first), rate)
        last = {p: Position((first + batch.num_rows - 1) // 64, 63) for p in range(PARTITIONS)}
        lake.append([batch], dict.fromkeys(range(PARTITIONS), first // COMMIT + 1), last)
    Upkeep(lake).compact(Done(), files_min=1)


def batches_of(side: str, uri: str, order: str, bytes_max: int) -> Iterator[pa.Table]:
    """Yield the version's samples in order."""
    lake = DeltaLake(uri, partitions=PARTITIONS)
    version = lake.open().version()
    if side == "whole":
        rows = stored_order(conform(lake.read(version), SCHEMA), ("click",), order)  # type: ignore[arg-type]
        yield from (rows.slice(at, BATCH) for at in range(0, rows.num_rows, BATCH))
        return
    columns = stored_columns(PROJECT)
    stored = StoredRows(lake, columns, ("click",), "bench", order=order, bytes_max=bytes_max, background=True)  # type: ignore[arg-type]
    stored.open(version)
    while not stored.is_done:
        stored.read_ahead(BATCH)
        yield stored.take(stored.propose(BATCH))


def measure(side: str, uri: str, order: str, bytes_max: int, learn: bool) -> dict[str, float]:
    """Take, and maybe learn, all samples of one side."""
    learner = learner_for(PROJECT, TrainConfig())
    learner.learn(to_batch(pa.Table.from_batches([samples(0, BATCH, 1_000)]), PROJECT))
    before = resident_mb("VmRSS")
    wall, cpu, rows = time.perf_counter(), time.process_time(), 0
    for batch in batches_of(side, uri, order, bytes_max):
        rows += batch.num_rows
        if learn:
            learner.learn(to_batch(batch, PROJECT))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    most = resident_mb("VmHWM")
    return {"rows": rows, "per_second": rows / wall, "cpu_us": cpu / rows * 1e6, "mb": most - before}


def resident_mb(name: str) -> float:
    """Return what this process has resident, or with `VmHWM` had at most. `ru_maxrss` would be that of its parent too,
    who wrote the lake."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) / 1024


def seconds_to_live(uri: str) -> float:
    """Return the time from the last stored sample to the first live one that can be taken, from a log in memory."""
    lake, log = DeltaLake(uri, partitions=PARTITIONS), MemoryLog(lambda: 0)
    log.admin().ensure_topics(TOPICS.specs(PARTITIONS))
    state = lake.state()
    assert state is not None
    row = samples(0, 1, 1_000)
    for p in range(PARTITIONS):
        for offset in range(state.next_offsets[p] + 1):
            new = Position(state.positions.at(p).offset + 1 + offset, 0)
            row = row.set_column(0, SCHEMA.field(0), pa.array([p], pa.int32()))
            row = row.set_column(1, SCHEMA.field(1), pa.array([new.offset]))
            after = state.positions.at(p) if offset == state.next_offsets[p] else Position(-1, -1)
            headers = {"after": format_position(after), "last": format_position(new), "spec": ""}
            log.producer().send(TOPICS.samples, p, encode_batch(row), headers=headers)
    source = Source(PROJECT, log.reader(), TOPICS.samples, generation=1, metrics=MemoryMetrics(), lake=lake)
    source.begin(None)
    ended = 0.0
    while source.is_stored:
        source.poll(0.0)
        if source.ready_rows():
            source.take(source.propose(BATCH))
        ended = time.perf_counter()
    while not source.ready_rows():
        source.poll(0.01)
    return time.perf_counter() - ended


def main() -> int:
    """Print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute at most")
    parser.add_argument("--rows", type=int, help="samples in the lake (4,000,000)")
    parser.add_argument("--rate", type=float, default=500.0, help="samples a second of event time")
    parser.add_argument("--bytes", type=int, default=256 << 20, help="train.lake_bytes")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, uri, order, learn = args.side
        print(json.dumps(measure(side, uri, order, args.bytes, learn == "learn")))
        return 0
    rows, rounds = args.rows or (300_000 if args.quick else 4_000_000), args.rounds or (1 if args.quick else 3)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        uri = str(Path(folder) / "lake")
        fill(uri, rows, args.rate)
        for order in ("event_time", "position"):
            for kind in ("take", "learn"):
                found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
                for each in range(rounds):
                    for side in SIDES if each % 2 == 0 else SIDES[::-1]:
                        ran = [sys.executable, __file__, "--bytes", str(args.bytes), "--side", side, uri, order, kind]
                        out = subprocess.run(ran, check=True, capture_output=True, text=True).stdout
                        found[side].append(json.loads(out.splitlines()[-1]))
                for name, unit in (("per_second", "samples/s"), ("cpu_us", "us/sample"), ("mb", "MB")):
                    ours, theirs = (statistics.median(r[name] for r in found[side]) for side in SIDES)
                    ratio = round(ours / theirs, 2) if theirs else 0.0
                    figures.append(
                        Figure(f"{kind}_{order}_{name}", round(ours, 2), unit, "read whole", round(theirs, 2), ratio)
                    )
        figures.append(Figure("lake_end_to_live", round(seconds_to_live(uri), 3), "s"))
    show(figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
