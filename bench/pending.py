"""Memory and latency of the join with 1 and 10 million impressions that wait for feedback.

Method: the pure join in a process of its own, pieces spilled to files as the stage does. It fills up to the number,
then clicks come for impressions drawn from all of them, 20 a record as at 1,000 clicks/s, each once; latency is the
time from a record's bytes to its samples' bytes, with impressions coming in between. Memory is what the process holds
for itself (anonymous pages) beyond what it held when it was empty, so files that are mapped do not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parent))

from harness.figures import Figure, show

from headrace.backends.spill_file import FileSpill
from headrace.contract.config import JoinConfig
from headrace.contract.formats.events import (
    Punctuation,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.interfaces.log import Record
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, Counter, FeatureSpec, Numeric, Rate
from headrace.stream.join.join import JoinState

FIELDS = {"user_id": "int64", "item_id": "int64", "category": "int64", "query": "string", "price": "float64"}
PROJECT = Project(
    impression=ImpressionType(tag="i", key="user_id", fields=FIELDS),
    feedback=(FeedbackType(name="click", tag="c"),),
    tasks=(Task(name="click", feedback="click", window_ms=86_400_000),),
    features=FeatureSpec(
        counters=(Counter(name="user", key="user_id"),),
        features=(
            *(Categorical(field=name) for name in ("user_id", "item_id", "category", "query")),
            Numeric(field="price"),
            Rate(of="counter.user.click", over="counter.user.impression"),
        ),
    ),
).checked()
ROWS, CLICKS, START_MS = 2_000, 20, 1_700_000_000_000
# Ids are remembered apart from what waits, by a horizon of their own: a minute here, so that this measures what waits.
CONFIG = JoinConfig(pending_max=20_000_000, repeat_horizon_ms=60_000, resolved_ms=60_000, payload_bytes=134_217_728)


class Filler:
    """Records of one partition, in order."""

    def __init__(self, rate: int) -> None:
        self._rng, self._rate = np.random.default_rng(1), rate
        self._offset = self.shown = 0
        self._shown_schema = impression_schema(PROJECT)
        self._click_schema = feedback_schema(PROJECT, PROJECT.feedback[0])

    def _record(self, value: bytes, **headers: str) -> Record:
        self._offset += 1
        return Record("events", 0, self._offset, None, value, headers, 0)

    def _now_ms(self) -> int:
        return START_MS + self.shown * 1000 // self._rate

    def time(self) -> Record:
        """Return a punctuation."""
        return self._record(encode_punctuation(Punctuation("g", 1, self._now_ms())), kind="punctuation")

    def impressions(self, rows: int) -> Record:
        """Return the next impressions."""
        rng, names = self._rng, [f"request-{self.shown + i:012d}" for i in range(rows)]
        user_N = rng.integers(0, 100_000, rows)
        columns = {
            "event_id": names, "request_id": names, "place": np.zeros(rows, np.int32),
            "key": [str(user) for user in user_N], "event_time_ms": np.full(rows, self._now_ms()), "user_id": user_N,
            "item_id": rng.integers(0, 1_000_000, rows), "category": rng.integers(0, 50, rows),
            "query": [f"query {i}" for i in rng.integers(0, 10_000, rows)], "price": rng.random(rows),
        }  # fmt: skip
        self.shown += rows
        return self._record(_encoded(columns, self._shown_schema, rows), kind="impression")

    def clicks(self, of: np.ndarray) -> Record:
        """Return clicks on these impressions."""
        names = [f"request-{i:012d}" for i in of]
        columns = {
            "event_id": [f"{name}/click" for name in names], "request_id": names,
            "place": np.zeros(len(of), np.int32), "key": ["1"] * len(of),
            "event_time_ms": np.full(len(of), self._now_ms()), "user_id": np.ones(len(of), np.int64),
        }  # fmt: skip
        return self._record(_encoded(columns, self._click_schema, len(of)), kind="feedback", type="click")


def _encoded(columns: dict[str, object], schema: pa.Schema, rows: int) -> bytes:
    arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(rows, f.type) for f in schema]
    return encode_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def anonymous_bytes() -> int:
    """Return the process's own memory, files that are mapped left out."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def run(pending: int) -> dict[str, float]:
    """Fill, click, and return the figures."""
    with tempfile.TemporaryDirectory() as folder:
        join = JoinState(PROJECT, CONFIG, silent_ms=10_000, partition=0, spill=FileSpill(Path(folder) / "spill"))
        filler = Filler(rate=20_000)
        for _ in range(3):
            join.take_all([filler.impressions(ROWS), filler.time(), filler.clicks(np.arange(3))])
        empty = anonymous_bytes()
        begin = time.process_time()
        taken = 0.0
        while filler.shown < pending:
            records = [filler.impressions(ROWS), filler.time()]
            before = time.process_time()
            join.take_all(records)
            taken += time.process_time() - before
        pa.default_memory_pool().release_unused()
        held = anonymous_bytes() - empty
        order = np.random.default_rng(2).permutation(np.arange(10_000, pending))
        times = []
        for i in range(200):
            join.take_all([filler.impressions(200), filler.time()])
            record = filler.clicks(order[i * CLICKS : (i + 1) * CLICKS])
            before = time.perf_counter()
            emitted = join.take(record)
            if emitted is None or emitted.batch.num_rows != CLICKS:
                raise RuntimeError("clicks on impressions that wait gave no samples")
            encode_batch(emitted.batch)
            times.append(time.perf_counter() - before)
        columns = (*join.pending.arrays.ring, *join.pending.arrays[1:])
        tables = sum(column.nbytes for column in columns if isinstance(column, np.ndarray))
        join.payload.clear()
        return {
            "held": held, "tables": tables / len(join.pending), "fill": filler.shown / taken,
            "p50": float(np.percentile(times, 50)), "p99": float(np.percentile(times, 99)),
            "seconds": time.process_time() - begin,
        }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 million only")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args.one)))
        return
    figures = []
    for pending in (1_000_000,) if args.quick else (1_000_000, 10_000_000):
        done = subprocess.run([sys.executable, __file__, "--one", str(pending)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        name = f"pending_{pending // 1_000_000}m"
        figures += [
            Figure(f"{name}_memory", round(found["held"] / 2**20), "MiB"),
            Figure(f"{name}_index_bytes_each", round(found["tables"], 1), "B"),
            Figure(f"{name}_feedback_to_sample_p50", round(found["p50"] * 1e3, 2), "ms"),
            Figure(f"{name}_feedback_to_sample_p99", round(found["p99"] * 1e3, 2), "ms"),
            Figure(f"{name}_filled_per_cpu_second", round(found["fill"]), "events/s"),
        ]
    show(figures)


if __name__ == "__main__":
    main()
