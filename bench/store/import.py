"""History into the lake, `headrace lake import`: rows/s, by the clock and by the CPU, and peak memory, beside pyarrow
writing the same samples.

Method: impressions of examples/store and the clicks of a tenth of them, over 30 days and over 3, as Parquet in any
order; how far apart events lie decides how much is settled together. The import runs in a process of its own, compiled
before. The peer reads the samples that the lake has then, and writes them as one Parquet file: the floor of any import.
Figures are medians of the rounds; memory is the process's highest resident size, libraries included.
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
import pyarrow.parquet as parquet

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.figures import Figure, show

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.imports import Imports
from headrace.contract.config import Config
from headrace.contract.privacy import Privacy
from headrace.examples.store.project import PROJECT
from headrace.kernels.sample_ids import id_hashes, seal_of
from headrace.stream.history.importer import Importer, ImportRequest, Parts
from headrace.stream.history.mapping import read_mapping

BEGIN_MS, DAY_MS = 1_795_564_800_000, 86_400_000
MAPPING = '[impressions]\nfiles = "shown.parquet"\n[feedback.click]\nfiles = "clicks.parquet"\n'


def write_history(folder: Path, rows: int, days: float) -> None:
    """Write impressions and clicks of so many days, in any order."""
    rng = np.random.default_rng(1)
    time_N = BEGIN_MS + (rng.random(rows) * days * DAY_MS).astype(np.int64)
    number_N = np.arange(rows).astype(str)
    shown = {
        "event_id": np.char.add("i", number_N),
        "request_id": number_N,
        "user_id": rng.integers(0, 100_000, rows),
        "item_id": rng.zipf(1.3, rows) % 10_000,
        "price": rng.random(rows),
        "event_time_ms": time_N,
    }
    clicked_N = np.flatnonzero(rng.random(rows) < 0.1)
    clicks = {name: shown[name][clicked_N] for name in ("request_id", "user_id", "item_id")}
    clicks["event_id"] = np.char.add("c", number_N[clicked_N])
    clicks["event_time_ms"] = time_N[clicked_N] + rng.integers(100, 9_000, len(clicked_N))
    folder.mkdir()
    parquet.write_table(pa.table(shown), folder / "shown.parquet")
    parquet.write_table(pa.table(clicks), folder / "clicks.parquet")
    (folder / "history.toml").write_text(MAPPING)


def side(name: str, folder: Path) -> tuple[float, float, float]:
    """Do it once here; return seconds, CPU seconds and peak MiB."""
    lake = DeltaLake(str(folder / "lake"), partitions=Config().log.partitions, hash_ids=id_hashes)
    begin, begin_cpu = time.monotonic(), time.process_time()
    if name == "import":
        parts = Parts(
            project=PROJECT,
            config=Config(),
            privacy=Privacy(PROJECT),
            imports=Imports(lake, seal_of),
            held_ids=lambda version, begin_ms, end_ms: pa.array([], pa.string()),
            now_ms=lambda: BEGIN_MS + 100 * DAY_MS,
            first_live_ms=lambda: None,
        )
        history = read_mapping(folder / "history.toml", PROJECT)
        Importer(parts, ImportRequest(history=history, folder=folder, work=folder / "work")).run()
    else:
        parquet.write_table(lake.read(), folder / "floor.parquet", compression="zstd")
    return time.monotonic() - begin, time.process_time() - begin_cpu, _peak_mib()


def _peak_mib() -> float:
    # Not ru_maxrss, which a child takes over from the process that started it.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measured(name: str, folder: Path) -> tuple[float, float, float]:
    """Do it in a process of its own."""
    command = [sys.executable, __file__, "--side", name, str(folder)]
    took = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(took[-3]), float(took[-2]), float(took[-1])


def main() -> None:
    """Run all rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50,000 impressions, one round")
    parser.add_argument("--side", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(*side(args.side[0], Path(args.side[1])))
        return
    rows, rounds = (50_000, 1) if args.quick else (1_000_000, 3)
    figures = []
    with tempfile.TemporaryDirectory() as home:
        write_history(Path(home) / "first", 1_000, 0.1)
        measured("import", Path(home) / "first")
        for what, days in (("month", 30.0), ("three_days", 3.0)):
            found: dict[str, list[tuple[float, float, float]]] = {"import": [], "floor": []}
            for turn in range(rounds):
                folder = Path(home) / f"{what}-{turn}"
                write_history(folder, rows, days)
                for name, each in found.items():
                    each.append(measured(name, folder))
            rate = {name: 1.1 * rows / statistics.median(s for s, _, _ in each) for name, each in found.items()}
            cpu = {name: 1.1 * rows / statistics.median(s for _, s, _ in each) for name, each in found.items()}
            peak = {name: statistics.median(mib for _, _, mib in each) for name, each in found.items()}
            for kind, unit, by in (("rate", "rows/s", rate), ("cpu", "rows/CPU s", cpu), ("peak_memory", "MiB", peak)):
                one, floor = by["import"], by["floor"]
                figures.append(Figure(f"import_{what}_{kind}", round(one), unit, "pyarrow", round(floor), one / floor))
    show(figures)


if __name__ == "__main__":
    main()
