"""A checkpoint beside the training: how long steps stand still, how old the newest checkpoint is, how long a restart
takes, bytes written; beside `torch.save` and torch's distributed checkpoint (`async_save`) of the same arrays.

Method: a table of `--rows` rows (56 bytes each) learns batches of `--batch` samples; ids are drawn from a power law
over all rows. Each side in turn, round after round: so many seconds without a checkpoint, then as many while one
checkpoint after the other is written into a folder, `--pause` seconds from begin to begin at least. A step's time is
what lies between the ends of two steps, so a stall is in it; the stall alone is what `begin` takes. CPU is that of the
learning thread, which others on the machine do not move. `torch.save` and `async_save` get `state()` as tensors: `save`
in the thread that learns, `async_save` in torch's own. RPO is the longest time from a begin to the end of the
checkpoint that follows it: what a kill at the worst moment takes back. Restoring is timed in the same process, from the
page cache. `first` is our first checkpoint, of everything; the others hold what changed.

    python bench/store/checkpoint.py --rows 16000000
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.figures import Figure, show

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.formats.positions import Cursor, Positions
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, FeatureSpec
from headrace.trainer.commit.checkpoint import Meta, newest_checkpoint
from headrace.trainer.commit.checkpointer import Checkpointer, Moment, made_here
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.learner import TableLearner, make_learner
from headrace.trainer.recipes import deepfm

SLOTS = 8
FIELDS = tuple(f"field_{i}" for i in range(SLOTS))
PROJECT = Project(
    name="bench",
    impression=ImpressionType(tag="shown", key="field_0", fields=dict.fromkeys(FIELDS, "int64")),
    feedback=(FeedbackType(tag="click", name="click"),),
    tasks=(Task(name="click", feedback="click", window_ms=600_000),),
    features=FeatureSpec(features=tuple(Categorical(field=name) for name in FIELDS)),
    recipe=deepfm(dim=8, hidden=(64, 32)),
)
SIDES = ("headrace", "torch_save", "torch_async")


def batch_of(rng: np.random.Generator, samples: int, rows: int, at: int) -> Batch:
    """Return samples whose ids follow a power law over all rows: half of them among the first 1/1,000."""
    ids = (rows * rng.random((samples, SLOTS)) ** 10).astype(np.int64)
    slots_BF = (ids * SLOTS + np.arange(SLOTS)) // SLOTS * 0x9E3779B9 + 1
    label_B = (rng.random(samples) < 0.1).astype(np.float32)
    ones_B = np.ones(samples, np.float32)
    return Batch(slots_BF, np.empty((samples, 0), np.float32), label_B, ones_B, np.full(samples, at, np.int64))


def filled(rows: int) -> TableLearner:
    """Return a learner with so many rows."""
    learner = make_learner(PROJECT.recipe, PROJECT.features)
    for first in range(0, rows, 1_000_000):
        ids = np.arange(first, min(first + 1_000_000, rows), dtype=np.int64)
        learner.table.tables[0].rows_for((ids * 0x9E3779B9 + 1)[:, None])  # type: ignore[attr-defined]
    learner.learn(batch_of(np.random.default_rng(0), 256, rows, 1_000))
    return learner


class Headrace:
    """Our checkpointer, in a thread of its own."""

    def __init__(self, learner: TableLearner, folder: Path) -> None:
        self.learner, self.metrics, self.blobs = learner, MemoryMetrics(), FileBlobs(folder)
        self.saved_bytes = 0
        self.checkpointer = Checkpointer(PROJECT, learner, self.blobs, self.metrics, made_here(1))

    def begin(self) -> None:
        meta = Meta(run="r", step=self.learner.step, steps_offset=self.learner.step, recipe="x", cursor=Cursor())
        self.checkpointer.begin(Moment(meta, Positions(1), {}, {}))

    def is_busy(self) -> bool:
        self.checkpointer.check()
        self.saved_bytes = max(self.saved_bytes, self.checkpointer._watch.saved_bytes)
        return self.checkpointer.is_busy

    def written(self) -> int:
        return int(self.metrics.counters.get(("checkpoint_bytes_total", ""), 0))

    def restore(self, into: TableLearner) -> None:
        found = newest_checkpoint(self.blobs, PROJECT.name, recipe="x")
        if found is None:
            raise SystemExit("there is no checkpoint to restore")
        into.load(found.learner, found.rows)

    def end(self) -> None:
        self.checkpointer.close(600.0)
        self.checkpointer._watch.end()


class TorchSave:
    """`torch.save` of the whole state, in the thread that learns."""

    def __init__(self, learner: TableLearner, folder: Path) -> None:
        self.learner, self.path, self.bytes = learner, folder / "checkpoint.pt", 0

    def tensors(self) -> dict[str, torch.Tensor]:
        state = self.learner.state()
        return {name: torch.from_numpy(np.ascontiguousarray(array).copy()) for name, array in state.items()}

    def begin(self) -> None:
        part = self.path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(self.tensors(), file)
        part.replace(self.path)
        self.bytes += self.path.stat().st_size

    def is_busy(self) -> bool:
        return False

    def written(self) -> int:
        return self.bytes

    def restore(self, into: TableLearner) -> None:
        into.load({name: tensor.numpy() for name, tensor in torch.load(self.path).items()})

    def end(self) -> None:
        """Nothing is under way."""


class TorchAsync(TorchSave):
    """`torch.distributed.checkpoint.async_save` of the same tensors."""

    def __init__(self, learner: TableLearner, folder: Path) -> None:
        super().__init__(learner, folder)
        self.folder, self.number, self.future = folder, 0, None
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def begin(self) -> None:
        self.number += 1
        self.future: Any = dcp.async_save(self.tensors(), checkpoint_id=str(self.folder / str(self.number)))

    def is_busy(self) -> bool:
        if self.future is None or not self.future.done():
            return self.future is not None
        self.future.result()
        at = self.folder / str(self.number)
        self.bytes += sum(path.stat().st_size for path in at.iterdir())
        shutil.rmtree(self.folder / str(self.number - 1), ignore_errors=True)
        self.future = None
        return False

    def restore(self, into: TableLearner) -> None:
        state = self.tensors()
        for tensor in state.values():
            tensor.zero_()
        dcp.load(state, checkpoint_id=str(self.folder / str(self.number)))
        into.load({name: tensor.numpy() for name, tensor in state.items()})

    def end(self) -> None:
        if self.future is not None:
            self.future.result()
            self.is_busy()


MAKERS: dict[str, Callable[[TableLearner, Path], Any]] = {
    "headrace": Headrace,
    "torch_save": TorchSave,
    "torch_async": TorchAsync,
}


class Steps:
    """The times of the steps of one measurement, and of the checkpoints beside them."""

    def __init__(self, learner: TableLearner, batches: list[Batch]) -> None:
        self._learner, self._batches = learner, batches
        self.walls: list[float] = []
        self.cpus: list[float] = []
        self.stalls: list[float] = []
        self.stall_cpus: list[float] = []
        self.rpo: list[float] = []
        self._begun: list[float] = []
        self._waits = False

    def run(self, seconds: float, side: Any = None, pause_s: float = 0.0, checkpoints: int = 0) -> dict[str, float]:
        """Learn for so long and, with a side, until so many checkpoints are stored; return the figures."""
        first = side.written() if side is not None else 0
        began = last = time.perf_counter()
        while last - began < seconds or (side is not None and (len(self.stalls) < checkpoints or self._waits)):
            cpu = time.thread_time()
            self._learner.learn(self._batches[len(self.walls) % len(self._batches)])
            self.cpus.append(time.thread_time() - cpu)
            if side is not None:
                self._look(side, pause_s, is_over=last - began >= seconds and len(self.stalls) >= checkpoints)
            now = time.perf_counter()
            self.walls.append(now - last)
            last = now
        return {
            "stall_max_ms": max(self.stalls, default=0.0) * 1_000,
            "stall_cpu_max_ms": max(self.stall_cpus, default=0.0) * 1_000,
            "step_p99_ms": float(np.quantile(self.walls, 0.99)) * 1_000,
            "step_max_ms": max(self.walls) * 1_000,
            "step_cpu_ms": statistics.mean(self.cpus) * 1_000,
            "steps_per_second": len(self.walls) / (last - began),
            "rpo_s": max(self.rpo, default=0.0),
            "bytes_each": (side.written() - first) / max(len(self.stalls), 1) if side is not None else 0.0,
        }

    def _look(self, side: Any, pause_s: float, *, is_over: bool) -> None:
        """Note a checkpoint that was stored, and begin the next one when it is due."""
        busy = side.is_busy()
        if self._waits and not busy:
            # Just before it was stored, a kill took back what came since the begin of the one before.
            self.rpo.append(time.perf_counter() - self._begun[-2 if len(self._begun) > 1 else -1])
            self._waits = False
        if not busy and not is_over and (not self._begun or time.perf_counter() - self._begun[-1] >= pause_s):
            self._begun.append(time.perf_counter())
            cpu = time.thread_time()
            side.begin()
            self.stall_cpus.append(time.thread_time() - cpu)
            self.stalls.append(time.perf_counter() - self._begun[-1])
            self._waits = True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16_000_000, help="rows of the table")
    parser.add_argument("--batch", type=int, default=256, help="samples of a step")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--pause", type=float, default=4.0, help="seconds between two begins at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where checkpoints are written (a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="500,000 rows, 3 s, 1 round")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.seconds, args.rounds, args.pause = 500_000, 3.0, 1, 0.5
    torch.set_num_threads(1)
    learner = filled(args.rows)
    rng = np.random.default_rng(1)
    batches = [batch_of(rng, args.batch, args.rows, 2_000 + n) for n in range(400)]
    Steps(learner, batches).run(2.0)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("none", "headrace_first", *SIDES)}
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=args.folder) as folder:
        for each in range(args.rounds):
            for name in SIDES if each % 2 == 0 else SIDES[::-1]:
                at = Path(folder) / name
                at.mkdir()
                found["none"].append(Steps(learner, batches).run(args.seconds))
                side = MAKERS[name](learner, at)
                if name == "headrace":
                    # The first one holds everything; those that follow hold what changed.
                    first = Steps(learner, batches).run(0.0, side, checkpoints=1)
                    found["headrace_first"].append(first | {"saved_mb": side.saved_bytes / 1e6})
                found[name].append(Steps(learner, batches).run(args.seconds, side, args.pause, checkpoints=3))
                side.end()
                began = time.perf_counter()
                other = make_learner(PROJECT.recipe, PROJECT.features)
                side.restore(other)
                found[name][-1]["restore_s"] = time.perf_counter() - began
                del other
                shutil.rmtree(at)
    print(f"{learner.rows:,} rows, {learner.rows * 56 / 1e9:.2f} GB; {args.batch} samples a step; {args.rounds} rounds")
    show(figures_of(found))
    return 0


UNITS = {
    "stall_max_ms": "ms",
    "stall_cpu_max_ms": "ms CPU",
    "step_p99_ms": "ms",
    "step_max_ms": "ms",
    "step_cpu_ms": "ms CPU",
    "steps_per_second": "steps/s",
    "rpo_s": "s",
    "restore_s": "s",
    "bytes_each": "bytes",
}


def figures_of(found: dict[str, list[dict[str, float]]]) -> list[Figure]:
    """Return the medians of the rounds: ours, and each peer's as a figure of its own name."""

    def median(side: str, name: str) -> float:
        return statistics.median(each[name] for each in found[side])

    figures = [
        Figure(f"learning_alone_{name}", round(median("none", name), 3), UNITS[name])
        for name in ("step_p99_ms", "step_max_ms", "step_cpu_ms", "steps_per_second")
    ]
    for name, unit in UNITS.items():
        ours = median("headrace", name)
        for peer in ("torch_save", "torch_async"):
            theirs = median(peer, name)
            ratio = round(ours / theirs, 3) if theirs else 0.0
            whole = f"{name}" if peer == "torch_async" else f"{name}_vs_save"
            figures.append(Figure(whole, round(ours, 3), unit, peer, round(theirs, 3), ratio))
    figures += [
        Figure(f"first_{name}", round(median("headrace_first", name), 3), UNITS[name])
        for name in (
            "stall_max_ms",
            "stall_cpu_max_ms",
            "step_p99_ms",
            "step_max_ms",
            "step_cpu_ms",
            "rpo_s",
            "bytes_each",
        )
    ]
    figures.append(Figure("first_saved_mb", round(median("headrace_first", "saved_mb"), 2), "MB"))
    return figures


if __name__ == "__main__":
    raise SystemExit(main())
