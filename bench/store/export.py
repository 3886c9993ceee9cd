"""Point-in-time export of one hour of the lake: impressions/s and peak memory, beside deltalake -> pandas -> Parquet.

Method: samples of bench/store/lake.py's shape (a task each, 28 columns) in a folder's lake, compacted. Sides take
turns, each in a process of its own; figures are medians of the rounds. The peer reads the table whole, sorts it by
event time and writes it with pandas: it joins no labels, names no features, and writes no manifest. Memory is the
process's highest resident size, libraries included.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.figures import Figure, show

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.upkeep import Done, Upkeep
from headrace.contract.formats.positions import Position
from headrace.contract.formats.sample import list_column, sample_schema
from headrace.contract.project import Project
from headrace.examples.store.project import PROJECT
from headrace.stream.export.export import ExportRequest, export_samples
from headrace.stream.features.featurize import featurize

DAY_MS, HOUR_MS = 1_795_564_800_000, 3_600_000
COMMIT_ROWS = 100_000


def commit_rows(project: Project, number: int, rows: int) -> pa.RecordBatch:
    """Return one commit's samples, of times all over the hour."""
    rng = np.random.default_rng(number)
    schema = sample_schema(project)
    number_N = np.arange(rows) + number * rows
    found = {
        "partition": np.zeros(rows, np.int32),
        "offset": np.full(rows, number),
        "rank": np.arange(rows, dtype=np.int32),
        "event_id": number_N.astype(str),
        "request_id": number_N.astype(str),
        "place": np.zeros(rows, np.int32),
        "key": rng.integers(0, 100_000, rows).astype(str),
        "event_time_ms": DAY_MS + rng.integers(0, HOUR_MS, rows),
        "impression_offset": number_N,
        "impression_row": np.zeros(rows, np.int32),
        "task": np.full(rows, project.tasks[0].name),
        "label": (rng.random(rows) < 0.1).astype(np.float32),
        "weight": np.ones(rows, np.float32),
        "user_id": rng.integers(0, 100_000, rows),
        "item_id": rng.integers(0, 10_000, rows),
        "price": rng.random(rows),
        "spec": np.full(rows, project.features.digest()),
    }
    arrays = {name: pa.array(values).cast(schema.field(name).type) for name, values in found.items()}
    for name in project.features.counter_columns():
        arrays[name] = pa.array(rng.poisson(3, rows).astype(np.float32))
    slots_NF, numeric_ND = featurize(arrays, project.features)
    arrays |= {"slots": list_column(slots_NF, pa.int64()), "numeric": list_column(numeric_ND, pa.float32())}
    columns = [arrays[f.name] if f.name in arrays else pa.nulls(rows, f.type) for f in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def side(name: str, lake: str, out: Path) -> tuple[float, float]:
    """Do it once here; return seconds and peak MiB."""
    begin = time.monotonic()
    if name == "export":
        table = DeltaLake(lake, partitions=1)
        request = ExportRequest(begin_ms=DAY_MS, end_ms=DAY_MS + HOUR_MS, version=table.open().version())
        export_samples(table, PROJECT, out, request)
    else:
        from deltalake import DeltaTable

        frame = DeltaTable(lake).to_pandas().sort_values(["event_time_ms", "partition", "offset", "rank"])
        frame.to_parquet(out, compression="zstd", index=False)
    return time.monotonic() - begin, _peak_mib()


def _peak_mib() -> float:
    # Not ru_maxrss, which a child takes over from the process that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    """Run all rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="500,000 samples, three rounds")
    parser.add_argument("--side", nargs=3, metavar=("NAME", "LAKE", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(*side(args.side[0], args.side[1], Path(args.side[2])))
        return
    commits, rounds = (5, 3) if args.quick else (20, 5)
    with tempfile.TemporaryDirectory() as folder:
        lake = DeltaLake(f"{folder}/lake", partitions=1)
        for number in range(commits):
            rows = commit_rows(PROJECT, number, COMMIT_ROWS)
            lake.append([rows], {0: number + 1}, {0: Position(number, COMMIT_ROWS - 1)})
        Upkeep(lake).compact(Done(), files_min=2)
        found: dict[str, list[tuple[float, float]]] = {"export": [], "pandas": []}
        for turn in range(rounds):
            for name, measured in found.items():
                command = [sys.executable, __file__, "--side", name, lake.uri, f"{folder}/{name}-{turn}"]
                took = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                measured.append((float(took[0]), float(took[1])))
    total = commits * COMMIT_ROWS
    rate = {name: total / statistics.median(s for s, _ in each) for name, each in found.items()}
    peak = {name: statistics.median(mib for _, mib in each) for name, each in found.items()}
    show(
        [
            Figure(
                f"export_{what}", round(by["export"]), unit, "pandas", round(by["pandas"]), by["export"] / by["pandas"]
            )
            for what, unit, by in (("rate", "impressions/s", rate), ("peak_memory", "MiB", peak))
        ]
    )


if __name__ == "__main__":
    main()
