"""Processes that read a model while its writer, and they themselves, are killed: a shared region alone, no HTTP.

    python swap_kills.py FOLDER SEED KILLS

One process without threads forks a writer and readers, so that each costs milliseconds. The writer swaps without end:
deltas, whole models, models of more rows and of wider ones; each value is the step that wrote it. Every now and then
the writer or a reader is killed with SIGKILL, and another one takes its place. Prints JSON: what readers answered.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from headrace.contract.errors import HeadraceError
from headrace.contract.formats.snapshot import Manifest, Weights
from headrace.serving.model.growth import Room
from headrace.serving.model.region_file import open_region
from headrace.serving.model.shared_region import Meta, SharedModel, View

DIM, ROWS_MAX, READERS = 3, 60, 3
FIRST = 40
KEYS = np.arange(1, 4_001, dtype=np.int64) * 7919


def is_whole(step: int) -> bool:
    """Say whether a version comes as a whole model: rows get wider with it, or it is one of another run."""
    return step % 60 == 0 or step % 7 == 0


def values_at(step: int) -> np.ndarray:
    """Return the step at which each row was written last, as of a version: float32 [K]."""
    whole = next(at for at in range(step, -1, -1) if is_whole(at))
    i_K = np.arange(min(len(KEYS), FIRST + step))
    by_turn_K = step - (step - i_K) % 3
    new_K = i_K - FIRST + 1
    return np.maximum.reduce([np.full(len(i_K), whole), by_turn_K, np.where(new_K <= step, new_K, 0)]).astype(
        np.float32
    )


def model_of(step: int, fresh: bool) -> tuple[Weights, Meta]:
    """Return a version, a function of its step alone: whole, or the third of all rows whose turn it is and new ones.
    Rows and width grow with it."""
    wide, now_K = 1 + DIM + step // 60, values_at(step)
    keys_K = KEYS[: len(now_K)]
    some_K = np.ones(len(now_K), bool) if fresh else now_K == step
    values_KV = np.repeat(now_K[some_K, None], wide, axis=1)
    weights = Weights(keys_K[some_K], values_KV, {"w": np.full((30, 20), step, np.float32)})
    manifest = Manifest(kind="delta", model="m", run="r", step=step, version=f"r-{step}", dim=wide - 1)
    return weights, Meta(manifest, "r-0", "{}", "{}", {"w": [30, 20]})


def write(path: Path) -> None:
    """Swap without end, from whatever version lies there."""
    room = Room(left=lambda: 2**40)
    shared = open_region(path, dim=DIM, rows_max=ROWS_MAX, is_good=lambda meta: True, wait_s=0.0, room=room)
    step = shared.meta().manifest.step if shared.holds_model else -1
    while True:
        step += 1
        fresh = is_whole(step) or not shared.holds_model
        weights, meta = model_of(step, fresh)
        shared.check_fits(weights, meta, fresh=fresh)
        if fresh:
            shared.load_snapshot(weights, meta)
        else:
            shared.apply_delta(weights, meta)
        time.sleep(0.0005)


def seen_in(view: View) -> set[float]:
    """Return the step of a version that is whole, and more than that where anything of it is of another one."""
    step, dim = view.meta.manifest.step, view.meta.manifest.dim
    wanted_K = values_at(step)
    rows_KV = view.lookup(KEYS[: len(wanted_K)], seed=1, scale=0.0, dim=dim)
    wrong = rows_KV[rows_KV != wanted_K[:, None]]
    return {float(step), *(-1 - wrong).tolist(), *np.unique(view.dense()["w"]).tolist()}


def read(path: Path, number: int, said: Path, is_told: threading.Event) -> None:
    """Answer until SIGTERM, then say how it went."""
    signal.signal(signal.SIGTERM, lambda *_: is_told.set())
    shared = SharedModel(path, dim=DIM, rows_max=ROWS_MAX, reader=number)

    def look() -> None:
        while not is_told.wait(0.005):
            shared.warm()

    thread = threading.Thread(target=look)
    thread.start()
    answers, mixed, failed, back, last = 0, 0, list[str](), 0, -1
    while not is_told.is_set():
        try:
            seen, meta = shared.read(seen_in, is_request=True)
        except HeadraceError as error:
            failed.append(str(error))
            continue
        answers += 1
        mixed += seen != {float(meta.manifest.step)}
        back += meta.manifest.step < last
        last = meta.manifest.step
    thread.join()
    mapped = {line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line}
    # The region, and one that may be filled aside in this moment.
    report = {"answers": answers, "mixed": mixed, "failed": failed, "back": back, "regions": len(mapped), "last": last}
    said.write_text(json.dumps(report))


def forked(work: Any, *given: Any) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        with suppress(KeyboardInterrupt):
            try:
                work(*given)
                status = 0
            finally:
                os._exit(status)
    return pid


def load_kernels(path: Path) -> None:
    """Load all compiled code before the forks: a writer would be killed while it does."""
    room = Room(left=lambda: 2**40)
    shared = open_region(path, dim=DIM, rows_max=FIRST, is_good=lambda meta: True, wait_s=0.0, room=room)
    for step in range(3):
        weights, meta = model_of(step, is_whole(step))
        shared.check_fits(weights, meta, fresh=is_whole(step))
        shared.load_snapshot(weights, meta) if is_whole(step) else shared.apply_delta(weights, meta)
        shared.read(seen_in, is_request=True)
    shared._warmed(shared._region, 2)
    path.unlink()


def main() -> int:
    """Kill, replace, and say what readers saw."""
    folder, rng, kills = Path(sys.argv[1]), Random(int(sys.argv[2])), int(sys.argv[3])
    path = folder / "region"
    load_kernels(path)
    writer = forked(write, path)
    while not (path.exists() and SharedModel(path, dim=DIM, rows_max=ROWS_MAX).holds_model):
        time.sleep(0.01)
    born = 0

    def reader(number: int) -> int:
        nonlocal born
        born += 1
        return forked(read, path, number, folder / f"said-{born}", threading.Event())

    readers = {number: reader(number) for number in range(1, 1 + READERS)}
    wrong = list[str]()
    for _ in range(kills):
        time.sleep(rng.choice((0.01, 0.03, 0.1, 0.3, 0.6)))
        if rng.random() < 0.7:
            os.kill(writer, signal.SIGKILL)
            _, status = os.waitpid(writer, 0)
            writer, name = forked(write, path), "writer"
        else:
            number = rng.randrange(1, 1 + READERS)
            os.kill(readers[number], signal.SIGKILL)
            _, status = os.waitpid(readers[number], 0)
            readers[number], name = reader(number), f"reader {number}"
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            wrong.append(f"{name} had ended with {status}")
    time.sleep(0.3)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    for pid in readers.values():
        os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
        if status:
            wrong.append(f"a reader ended with {status}")
    last = open_region(path, dim=DIM, rows_max=ROWS_MAX, is_good=lambda meta: True, wait_s=0.0)
    seen, meta = last.read(seen_in)
    copies = [last._region.values[copy][: last.rows] for copy in range(2)]
    report = {
        "wrong": wrong,
        "readers": [json.loads(said.read_text()) for said in sorted(folder.glob("said-*"))],
        "step": meta.manifest.step,
        "is_whole": seen == {float(meta.manifest.step)} and bool((copies[0] == copies[1]).all()),
        "rows_max": last.rows_max,
        "files": sorted(p.name for p in folder.iterdir() if not p.name.startswith("said-")),
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
