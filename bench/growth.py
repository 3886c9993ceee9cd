"""How the tables grow from 1 million rows to 100 million: time per sample, bytes per row, the longest stall.

Method: one thread, one table of dimension 8 with row-wise Adagrad: 56 bytes of payload a row (key 8, last use 4, nine
values 36, two sums of squares 8). It grows by 512 new keys a call; a call's time beyond the median call is its stall.
At each size it takes batches of 512 samples x 26 slots, every id equally likely, the worst case for a cache: rows
looked up, gathered, updated, one part swept for expiry (nothing expires). `step` is the same through DeepFM
(MLP 64-32), whose dense part is measured once, beside a small table, and added. Times are the thread's CPU time, which
neighbours on the machine hardly lengthen; stalls are given by the wall, too. Memory is counted by the table and seen in
what the process holds (anonymous pages). A ratio is the left figure over the right one.

The peer is a table of the same records that doubles by copying, as NumPy or a hash map of C++ would: its stall is
measured where it has to double on the way to the same size (memory of two copies: up to 10 million rows only).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from harness.figures import Figure, show

from headrace.contract.project import Recipe
from headrace.contract.spec import Categorical, FeatureSpec
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.learner import make_learner
from headrace.trainer.model.tables.group import SlotTable, Tables
from headrace.trainer.model.tables.optimizers import Kind, Optimizer
from headrace.trainer.model.tables.row_index import SWEEPS
from headrace.trainer.model.tables.table import Table

DIM, SLOTS, BATCH, CHUNK = 8, 26, 512, 512
SIZES = (1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000)
DAY_MS = 86_400_000
DOUBLES_UP_TO = 10_000_000


def keys_of(numbers: np.ndarray) -> np.ndarray:
    """Return well spread ids: an odd factor maps numbers to distinct 64-bit keys."""
    return numbers.astype(np.int64) * np.int64(-7_046_029_254_386_353_131)


def anonymous_bytes() -> int:
    """Return the process's own memory, files that are mapped left out."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


class Stalls:
    """Times of many calls: by the wall and by the thread's CPU time."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __enter__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.cpu.append(time.thread_time() - self._cpu)
        self.wall.append(time.perf_counter() - self._wall)

    def longest(self) -> tuple[float, float]:
        """Return how much longer than the median the longest call took, (wall, CPU)."""
        return tuple(max(times) - statistics.median(times) for times in (self.wall, self.cpu))


def grow(table: Table, to: int) -> Stalls:
    """Insert new keys up to a size."""
    stalls, now_B = Stalls(), np.full(1, 40 * DAY_MS)
    for begin in range(len(table), to, CHUNK):
        keys = keys_of(np.arange(begin, min(begin + CHUNK, to)))
        with stalls:
            table.rows_for(keys, now_B)
    return stalls


def sample_seconds(tables: Tables, batches: int) -> tuple[float, Stalls]:
    """Return the median CPU time a sample, and the times of the sweeps."""
    rng, times, sweeps = np.random.default_rng(1), [], Stalls()
    now_B = np.full(BATCH, 40 * DAY_MS)
    grad_UV = rng.normal(size=(BATCH * SLOTS, 1 + DIM)).astype(np.float32)
    for _ in range(batches):
        keys_BF = keys_of(rng.integers(0, len(tables), (BATCH, SLOTS)))
        before = time.thread_time()
        ids = tables.distinct_ids(keys_BF, now_B)
        tables.gather(ids)
        tables.update(ids, grad_UV[: len(ids.keys_U)], now_B)
        with sweeps:
            tables.expire(40 * DAY_MS)
        times.append((time.thread_time() - before) / BATCH)
    return statistics.median(times), sweeps


def dense_seconds(batches: int) -> float:
    """Return the median CPU time a sample of DeepFM's dense part, forward and backward."""
    import torch

    torch.set_num_threads(1)
    features = FeatureSpec(features=tuple(Categorical(field=f"f{i}") for i in range(SLOTS)))
    learner = make_learner(Recipe(dim=DIM), features)
    rng, times = np.random.default_rng(2), []
    zeros_B = np.zeros(BATCH, np.float32)
    for _ in range(batches):
        slots_BF = keys_of(rng.integers(1, 1_000, (BATCH, SLOTS)))
        label_B = rng.integers(0, 2, BATCH).astype(np.float32)
        batch = Batch(slots_BF, np.zeros((BATCH, 0), np.float32), label_B, zeros_B + 1, zeros_B.astype(np.int64))
        table, before = learner.table, time.thread_time()
        learner.learn(batch)
        whole = time.thread_time() - before
        # The same rows once more, without the dense part.
        before = time.thread_time()
        ids = table.distinct_ids(slots_BF, batch.event_time_ms_B)
        table.update(ids, table.gather(ids), batch.event_time_ms_B)
        times.append((whole - (time.thread_time() - before)) / BATCH)
    return statistics.median(times)


def doubling_stall(rows: int, bytes_per_row: int) -> float:
    """Return the longest stall of a table that doubles by copying on its way to so many rows."""
    longest, held = 0.0, np.ones((1024, bytes_per_row // 4), np.float32)
    while len(held) < rows:
        before = time.thread_time()
        wider = np.empty((2 * len(held), held.shape[1]), np.float32)
        wider[: len(held)] = held
        longest = max(longest, time.thread_time() - before)
        wider[len(held) :] = 1
        held = wider
    return longest


def mass_expiry(table: Table) -> Stalls:
    """Let everything expire at once, and return the times of the sweeps that remove it."""
    sweeps = Stalls()
    for _ in range(SWEEPS):
        with sweeps:
            table.expire(100 * DAY_MS)
    if len(table):
        raise RuntimeError(f"{len(table)} rows outlived a whole sweep")
    return sweeps


def against(name: str, value: float, unit: str, peer: str, peer_value: float) -> Figure:
    """Return a figure beside another; the ratio is ours over theirs."""
    return Figure(name, round(value, 2), unit, peer, round(peer_value, 2), round(value / peer_value, 3))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 3 million rows")
    parser.add_argument("--rows", type=int, default=0, help="stop at so many rows (default 100 million)")
    parser.add_argument("--optimizer", default="adagrad_row", choices=["adagrad_row", "adagrad", "ftrl", "adam"])
    args = parser.parse_args()
    most = args.rows or (3_000_000 if args.quick else SIZES[-1])
    kind: Kind = args.optimizer
    dense = dense_seconds(60)
    warm, tables = (
        Tables([SlotTable(DIM, Optimizer(kind))] * SLOTS, seed=7, scale=0.01, expire_after_ms=30 * DAY_MS)
        for _ in range(2)
    )
    grow(warm.tables[0], 10_000)
    sample_seconds(warm, 20)
    table = tables.tables[0]
    empty, first, figures, longest = anonymous_bytes(), 0.0, [], (0.0, 0.0)
    for size in [size for size in SIZES if size <= most]:
        stalls = grow(table, size)
        longest = tuple(map(max, longest, stalls.longest()))
        held = anonymous_bytes() - empty
        seconds, sweeps = sample_seconds(tables, 100 if args.quick else 300)
        first = first or seconds
        name = f"{size // 1_000_000}m"
        figures += [
            against(f"{name}_us_per_sample_tables", seconds * 1e6, "us", "1m", first * 1e6),
            against(f"{name}_us_per_sample_step", (seconds + dense) * 1e6, "us", "1m", (first + dense) * 1e6),
            against(f"{name}_bytes_per_row", table.nbytes / size, "B", "payload", table.bytes_per_row),
            against(f"{name}_resident_per_row", held / size, "B", "payload", table.bytes_per_row),
            Figure(f"{name}_rows_made_per_second", round(CHUNK / statistics.median(stalls.cpu)), "rows/s"),
            Figure(f"{name}_longest_stall", round(stalls.longest()[1] * 1e3, 2), "ms"),
            Figure(f"{name}_longest_stall_wall", round(stalls.longest()[0] * 1e3, 2), "ms"),
            Figure(f"{name}_longest_sweep", round(max(sweeps.cpu) * 1e3, 2), "ms"),
        ]
        print(f"{size:>11,} rows: {seconds * 1e6:.2f} us a sample, {held / size:.1f} B a row", flush=True)
    doubled = doubling_stall(min(most, DOUBLES_UP_TO), table.bytes_per_row)
    figures.append(against("longest_stall_while_growing", longest[1] * 1e3, "ms", "doubling", doubled * 1e3))
    rows = len(table)
    sweeps = mass_expiry(table)
    figures += [
        Figure("expired_rows_per_second", round(rows / sum(sweeps.cpu)), "rows/s"),
        Figure("longest_sweep_of_mass_expiry", round(max(sweeps.cpu) * 1e3, 2), "ms"),
    ]
    show(figures)


if __name__ == "__main__":
    main()
