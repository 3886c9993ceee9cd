"""What a swap costs whoever asks: answer times of requests that overlap one, beside those of steady phases.

A stage of real processes (`bench/harness/swap_stage.py`) answers POST /v1/rank while a version comes each second:
deltas of one chain, then whole snapshots, each of another run. Requests are sent when they are due, whether or not the
ones before were answered, and each time counts from when it was due (no coordinated omission). Steady and swapping
phases take turns, so that whatever else this machine does falls on both.

All candidates of a version score alike, by its step: an answer whose scores differ, or are not its version's, is mixed.
A request overlaps a swap when any of its time lies between the record's arrival and the end of the second copy's write.

    python bench/serving/swap.py --quick
    python bench/serving/swap.py --swaps 1000 --rate 300 --workers 2
    python bench/serving/swap.py --rows 14000000  # 17 values: a snapshot of 1 GB, two copies of 1.5 GB with their index
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import math
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import psutil
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import swap_stage
from harness.figures import Figure, show
from harness.swap_stage import DIM, PROJECT

from headrace.contract.formats.snapshot import FORMAT, Manifest, Weights, encode_manifest, encode_weights
from headrace.stream.features.featurize import featurize
from headrace.trainer.model.scoring import shapes_of

USERS, ITEMS = 200, 1_000
SPEC, RECIPE = PROJECT.features, PROJECT.recipe


def level(run: str, step: int) -> float:
    """Return the linear weight of every row of a version: a function of it alone."""
    return ((step * 7 + 50 * (run == "b")) % 101 - 50) / 100


def score_of(version: str) -> float:
    """Return what each candidate scores: both slots have one weight, and all else is 0."""
    run, _, step = version.rpartition("-")
    return 1 / (1 + math.exp(-2 * level(run, int(step))))


def hot_keys() -> np.ndarray:
    """Return the keys that requests ask for: int64 [K]."""
    count = max(USERS, ITEMS)
    numbers = pa.array(range(count), pa.int64())
    zero = pa.array([0.0] * count, pa.float32())
    columns = {"user": numbers, "item": numbers, "price": pa.array([0.0] * count, pa.float64())}
    return np.unique(featurize({**columns, **dict.fromkeys(SPEC.counter_columns(), zero)}, SPEC)[0])


class Versions:
    """Writes records and blobs of versions into the stage's folder."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.hot_K = folder, hot_keys()
        rng = np.random.default_rng(1)
        others_K = rng.integers(1, 2**62, max(0, rows - len(self.hot_K)))
        self.all_K = np.unique(np.concatenate([self.hot_K, others_K]))
        self.dense = {name: np.zeros(shape, np.float32) for name, shape in shapes_of(RECIPE, SPEC).items()}

    def _weights(self, keys_K: np.ndarray, run: str, step: int) -> Weights:
        values_KV = np.zeros((len(keys_K), 1 + DIM), np.float32)
        values_KV[:, 0] = level(run, step)
        return Weights(keys_K, values_KV, self.dense)

    def snapshot(self, run: str) -> str:
        """Write the snapshot of a run's step 0; return its file."""
        version = f"{run}-0"
        manifest = Manifest(
            kind="snapshot", model=PROJECT.name, run=run, step=0, version=version, dim=DIM, spec=SPEC.digest(),
            spec_json=msgspec.json.encode(SPEC).decode(), recipe_json=msgspec.json.encode(RECIPE).decode(),
            blob=f"blob-{run}", format=FORMAT,
        )  # fmt: skip
        data = encode_weights(self._weights(self.all_K, run, 0), manifest)
        (self.folder / manifest.blob).write_bytes(data)
        manifest = msgspec.structs.replace(manifest, sha256=hashlib.sha256(data).hexdigest())
        (self.folder / f"snapshot-{run}").write_bytes(b'{"kind":"snapshot"}\n' + encode_manifest(manifest))
        return f"snapshot-{run}"

    def delta(self, run: str, step: int) -> str:
        """Write the delta to a step; return its file."""
        manifest = Manifest(
            kind="delta", model=PROJECT.name, run=run, step=step, version=f"{run}-{step}", base=f"{run}-{step - 1}",
            chain=f"{run}-0", seq=step, spec=SPEC.digest(), dim=DIM, format=FORMAT,
        )  # fmt: skip
        headers = {"version": manifest.version, "base": manifest.base, "chain": manifest.chain, "rows": manifest.rows}
        data = encode_weights(self._weights(self.hot_K, run, step), manifest)
        name = f"delta-{step}"
        (self.folder / name).write_bytes(msgspec.json.encode(headers) + b"\n" + data)
        return name


@dataclass
class Answers:
    """What one phase's requests brought: (due, answered, reader) each, and what went wrong."""

    times: list[tuple[float, float, str]] = field(default_factory=list)
    failed: int = 0
    mixed: int = 0


class Load:
    """Sends requests when they are due."""

    def __init__(self, port: int, rate: float, candidates: int) -> None:
        self.port, self.rate, self.idle = port, rate, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()
        rng = Random(1)
        self.bodies = []
        for i in range(64):
            ask = {
                "request_id": f"r-{i}",
                "context": {"user": rng.randrange(USERS)},
                "candidates": [{"item": rng.randrange(ITEMS), "price": 1.5} for _ in range(candidates)],
            }
            body = msgspec.json.encode(ask)
            head = f"POST /v1/rank HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            self.bodies.append(head.encode() + body)

    async def connect(self, connections: int) -> None:
        """Open so many connections, as processes take them."""
        for _ in range(connections):
            self.idle.append(await asyncio.open_connection("127.0.0.1", self.port))

    async def phase(self, seconds: float) -> Answers:
        """Send for so long; return when all are answered."""
        answers, asked = Answers(), list[asyncio.Task[None]]()
        begin = time.monotonic()
        for number in range(int(seconds * self.rate)):
            due = begin + number / self.rate
            await asyncio.sleep(due - time.monotonic())
            asked.append(asyncio.create_task(self._ask(number, due, answers)))
        await asyncio.gather(*asked)
        return answers

    async def _ask(self, number: int, due: float, answers: Answers) -> None:
        try:
            async with asyncio.timeout(20):
                # The one that has rested longest: all processes get their share.
                pair = self.idle.pop(0) if self.idle else await asyncio.open_connection("127.0.0.1", self.port)
                pair[1].write(self.bodies[number % len(self.bodies)])
                head = await pair[0].readuntil(b"\r\n\r\n")
                fields = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
                body = await pair[0].readexactly(int(fields["content-length"]))
            answers.times.append((due, time.monotonic(), fields.get("x-reader", "")))
            self.idle.append(pair)
            if not head.startswith(b"HTTP/1.1 200"):
                answers.failed += 1
                return
            said = msgspec.json.decode(body)
            wanted = score_of(said["version"])
            answers.mixed += any(abs(score - wanted) > 1e-5 for score in said["scores"])
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            answers.failed += 1


class Stage:
    """The stage, and what it says of its swaps."""

    def __init__(self, folder: Path, workers: int, port: int) -> None:
        command = [sys.executable, swap_stage.__file__, str(folder), str(workers), str(port)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = self.process.stdout.readline().split()
        self.port, self.region = int(said[0]), Path(said[1])

    def tell(self, file: str) -> None:
        """Let a record come."""
        assert self.process.stdin is not None
        self.process.stdin.write(file + "\n")
        self.process.stdin.flush()

    def swapped(self) -> tuple[float, float]:
        """Wait for a swap; return when its record came and when it was done."""
        assert self.process.stdout is not None
        began, ended = self.process.stdout.readline().split()
        return float(began), float(ended)

    def memory(self) -> dict[str, float]:
        """Return the memory of all processes without what they share, and that of the region: MB."""
        first = psutil.Process(self.process.pid)
        infos = [each.memory_info() for each in (first, *first.children())]
        own = sum(info.rss - info.shared for info in infos) / 1e6
        return {"own": own, "region": self.region.stat().st_blocks * 512 / 1e6}


async def swap_each(stage: Stage, files: list[str], seconds: float, swaps: list[tuple[float, float]]) -> None:
    """Let versions come at equal distances; the next one waits for the one before."""
    begin, loop = time.monotonic(), asyncio.get_running_loop()
    for number, file in enumerate(files):
        await asyncio.sleep(begin + seconds * number / len(files) - time.monotonic())
        stage.tell(file)
        swaps.append(await loop.run_in_executor(None, stage.swapped))


def p(times: list[float], share: float) -> float:
    """Return a percentile in ms."""
    return float(np.quantile(times, share)) * 1_000 if times else 0.0


async def measure(stage: Stage, load: Load, kind: str, rounds: list[list[str]], seconds: float) -> list[Figure]:
    """Return the figures of one kind of swap: for each round a steady phase, then one with its swaps."""
    steady, swapping, swaps = Answers(), Answers(), list[tuple[float, float]]()
    before = stage.memory()
    for files in rounds:
        for into in (steady, swapping):
            found, _ = await asyncio.gather(
                load.phase(seconds), swap_each(stage, files if into is swapping else [], seconds, swaps)
            )
            into.times += found.times
            into.failed += found.failed
            into.mixed += found.mixed
    after = stage.memory()
    overlaps = [(due, done, who) for due, done, who in swapping.times if any(b <= done and due <= e for b, e in swaps)]
    calm = [done - due for due, done, _ in steady.times]
    during = [done - due for due, done, _ in overlaps]
    by_first = {first: [d - due for due, d, who in overlaps if (who == "0") is first] for first in (True, False)}
    took = [ended - began for began, ended in swaps]
    figures = [
        Figure(f"{kind}.swaps", len(swaps), "swaps"),
        Figure(f"{kind}.swap_p50", p(took, 0.5), "ms"),
        Figure(f"{kind}.swap_max", max(took) * 1_000, "ms"),
        Figure(f"{kind}.requests_overlapping", len(during), "requests"),
        Figure(f"{kind}.steady_p50", p(calm, 0.5), "ms"),
        Figure(f"{kind}.steady_p99", p(calm, 0.99), "ms"),
        Figure(f"{kind}.overlapping_p50", p(during, 0.5), "ms"),
        Figure(f"{kind}.overlapping_p99", p(during, 0.99), "ms"),
        Figure(f"{kind}.p99_over_steady", p(during, 0.99) / p(calm, 0.99), "x"),
        Figure(f"{kind}.p50_over_steady", p(during, 0.5) / p(calm, 0.5), "x"),
        Figure(f"{kind}.failed", steady.failed + swapping.failed, "requests"),
        Figure(f"{kind}.mixed", steady.mixed + swapping.mixed, "answers"),
        Figure(f"{kind}.own_memory_before", before["own"], "MB"),
        Figure(f"{kind}.own_memory_after", after["own"], "MB"),
        Figure(f"{kind}.region_before", before["region"], "MB"),
        Figure(f"{kind}.region_after", after["region"], "MB"),
    ]
    for first, name in ((True, "the_updating_process"), (False, "the_others")):
        if by_first[first]:
            figures.append(Figure(f"{kind}.overlapping_p99_of_{name}", p(by_first[first], 0.99), "ms"))
    return figures


def main() -> int:
    """Run it and show the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less than a minute: 20 deltas and 10 snapshots")
    parser.add_argument("--swaps", type=int, help="of each kind, one a second (1,000)")
    parser.add_argument("--rate", type=float, help="requests/s (quick 40, else 300)")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--rows", type=int, help="rows of 17 values (quick 200,000, else 2,000,000)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two swaps")
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    counts = (20, 10) if args.quick and not args.swaps else (args.swaps or 1_000,) * 2
    rate, rows = args.rate or (40 if args.quick else 300), args.rows or (200_000 if args.quick else 2_000_000)
    every = 0.5 if args.quick else args.every
    folder = Path(tempfile.mkdtemp(prefix="headrace-bench-swap-"))
    stage: Stage | None = None
    try:
        versions = Versions(folder, rows)
        first, _ = (versions.snapshot(run) for run in "ab")
        deltas = [versions.delta("a", step) for step in range(1, 1 + counts[0])]
        snapshots = [f"snapshot-{'ba'[i % 2]}" for i in range(counts[1])]
        stage = Stage(folder, args.workers, args.port)
        stage.tell(first)
        stage.swapped()
        load = Load(stage.port, rate, args.candidates)
        what = f"{args.workers} processes, {rate:g} requests/s of {args.candidates} candidates, a swap each {every:g} s"
        print(f"{rows:,} rows, {what}", flush=True)

        async def run(stage: Stage) -> list[Figure]:
            await load.connect(8 * args.workers)
            await load.phase(3.0)
            figures: list[Figure] = []
            for kind, files in (("delta", deltas), ("full", snapshots)):
                size = max(1, min(20, len(files) // 2))
                rounds = [files[at : at + size] for at in range(0, len(files), size)]
                figures += await measure(stage, load, kind, rounds, size * every)
            return figures

        show(asyncio.run(run(stage)))
    finally:
        if stage is not None:
            stage.process.terminate()
            stage.process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
