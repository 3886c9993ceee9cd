"""Goal: while a big model comes, the process that takes it goes on answering: no step keeps the interpreter's lock.
Method: another thread takes turns while one step runs; what keeps the lock allows it none."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from serving_world import RECIPE

from headrace.contract.formats.snapshot import Manifest, Weights
from headrace.kernels.row_sums import row_sum
from headrace.serving.gate import admit
from headrace.serving.model.shared_region import Meta, SharedModel

ROWS = 1_500_000
LEAST = 3


def turns_while(step: Callable[[], object]) -> int:
    """Return how often another thread came to its turn while the step ran."""
    turns, begun, stop = 0, threading.Event(), threading.Event()

    def take_turns() -> None:
        nonlocal turns
        while not stop.wait(0.001):
            turns += 1
            begun.set()

    thread = threading.Thread(target=take_turns)
    thread.start()
    begun.wait()
    before = turns
    step()
    found = turns - before
    stop.set()
    thread.join()
    return found


@pytest.fixture(scope="module")
def weights() -> Weights:
    keys_K = np.random.default_rng(1).permutation(np.arange(1, 1 + ROWS, dtype=np.int64) * 7_919)
    return Weights(keys_K, np.ones((ROWS, 1 + RECIPE.dim), np.float32), {"w": np.ones(5, np.float32)})


def test_what_keeps_the_lock_is_seen():
    numbers = list(range(3_000_000))
    assert turns_while(lambda: numbers.sort(key=None)) < LEAST or sys.getswitchinterval() < 0.001


def test_keys_are_counted_without_the_lock(weights: Weights, monkeypatch: pytest.MonkeyPatch):
    """`np.unique` keeps the lock for whole seconds of two million keys, though not all the time: no turns tell it."""
    monkeypatch.setattr(np, "unique", None)
    admit._check(weights, "a-1", RECIPE.dim, {"w": [5]})
    twice = Weights(np.append(weights.keys_K[1:], weights.keys_K[5]), weights.values_KV, weights.dense)
    with pytest.raises(admit.Refused, match=f"of {ROWS - 1} keys"):
        admit._check(twice, "a-1", RECIPE.dim, {"w": [5]})


@pytest.mark.parametrize("step", ["keys", "sum", "load"])
def test_each_step_of_a_big_snapshot_lets_others_run(tmp_path: Path, weights: Weights, step: str):
    shared = SharedModel(tmp_path / "m", dim=RECIPE.dim, rows_max=ROWS, create=True)
    meta = Meta(Manifest(kind="snapshot", model="m", run="a", step=1, version="a-1"), "", "{}", "{}", {"w": [5]})
    steps: dict[str, Callable[[], object]] = {
        "keys": lambda: admit._distinct(weights.keys_K.copy()),
        "sum": lambda: row_sum(weights.keys_K, weights.values_KV),
        "load": lambda: shared.load_snapshot(weights, meta),
    }
    row_sum(weights.keys_K[:10], weights.values_KV[:10])  # Compiled code is loaded.
    assert turns_while(steps[step]) >= LEAST
