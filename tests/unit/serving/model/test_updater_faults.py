"""Goal: whatever a call of the updater does, serving shows one whole version that the trainer published and the gate
took, or the stage stops loudly and the next one goes on from there.

Method: the fault matrix. Each call that the updater makes of its reader, its store and the shared region fails in each
way, at its first calls; a checker reads the region from outside after every turn. The rows come from the contracts: a
recording of the faultless run must name exactly them.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from serving_world import PROJECT, RECIPE, Trainer, World

from headrace.contract.errors import Unavailable
from headrace.contract.formats.snapshot import Weights
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.log import Reader
from headrace.process.moved import moved
from headrace.serving.gate.admit import can_serve
from headrace.serving.model.region_file import open_region
from headrace.serving.model.updater import Updater


class Died(BaseException):
    """The process ends here: no handler of the program runs."""


NEVER_CALLED = {"reader": {"close"}, "blobs": {"put", "list", "delete"}}
"""`close` is called after `stop` alone; serving writes nothing to the store."""
REGION = {"check_fits", "held", "load_snapshot", "apply_delta", "note_refusal", "meta"}
"""What the updater calls of the region: written here, because the region is no contract."""
ONCE = {"meta", "end_offsets", "position"}
"""What the story calls once in each stage."""
FAILURES: dict[str, type[BaseException]] = {
    "unavailable": Unavailable, "runtime": RuntimeError, "memory": MemoryError, "dies": Died, "never returns": Died,
}  # fmt: skip
NEVER = "never returns"
"""What hangs is killed by who watches it."""
WAYS = [*(f"{name}, {when}" for name in FAILURES if name != NEVER for when in ("before", "after")), NEVER]


def methods(contract: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(contract, inspect.isfunction) if not name.startswith("_")}


ROWS = [
    *(("reader", name) for name in sorted(methods(Reader) - NEVER_CALLED["reader"])),
    *(("blobs", name) for name in sorted(methods(Blobs) - NEVER_CALLED["blobs"])),
    *(("shared", name) for name in sorted(REGION)),
]


class Watched:
    """Passes calls on to `target`; one of them fails, in one way, at its call number `at`."""

    def __init__(self, target: Any, seen: set[tuple[str, str]], part: str) -> None:
        self._target, self._seen, self._part = target, seen, part
        self.fails, self.way, self.at, self.calls = "", "", 0, 0
        self.blocked, self.released = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        return partial(self._call, name, found) if callable(found) else found

    def _call(self, name: str, found: Callable[..., Any], *given: Any, **named: Any) -> Any:
        self._seen.add((self._part, name))
        self.calls += name == self.fails
        if name != self.fails or self.calls != self.at:
            return found(*given, **named)
        if self.way == NEVER:
            self.blocked.set()
            assert self.released.wait(30)
            raise Died
        kind, when = self.way.split(", ")
        if when == "after":
            found(*given, **named)
        raise FAILURES[kind](f"{name} was told to fail")


class Stage:
    """A stage that is started again whenever it stops, and what it served."""

    def __init__(self, folder: Path) -> None:
        self.world, self.seen, self.stops = World(folder), set[tuple[str, str]](), list[str]()
        self.refused: set[str] = set()
        self.trainer, self.rng = Trainer(self.world), Random(1)
        self.updater = self.started()

    def started(self) -> Updater:
        if self.world.shared.lock >= 0:
            os.close(self.world.shared.lock)
        is_good = partial(can_serve, project=PROJECT)
        path = self.world.shared.path
        self.world.shared = open_region(path, dim=RECIPE.dim, rows_max=1_000, is_good=is_good, wait_s=0.0)
        updater = self.world.new_updater()
        updater.reader = Watched(updater.reader, self.seen, "reader")  # type: ignore[assignment]
        updater.blobs = Watched(updater.blobs, self.seen, "blobs")  # type: ignore[assignment]
        updater.shared = Watched(updater.shared, self.seen, "shared")  # type: ignore[assignment]
        return updater

    def turn(self) -> None:
        """Let the updater take one step; what ends it starts another one."""
        try:
            self.updater.step(0.0)
        except Unavailable:
            pass  # `run` goes on after it.
        except (Exception, Died) as error:
            self.stops.append(type(error).__name__)
            self.check()
            self.updater = self.started()
        self.check()

    def check(self) -> None:
        """Whatever readers see is one whole version that was published and not refused."""
        if not self.world.shared.holds_model:
            return
        version = self.world.version
        assert version not in self.refused
        np.testing.assert_array_equal(self.world.served_rows(), self.world.expected_rows(version))

    def story(self) -> Iterator[None]:
        """A snapshot, deltas, a refused one, a snapshot that heals it; then the same of a run that begins badly.

        Yields where the updater has a turn.
        """
        world, rng = self.world, self.rng
        for run in ("a", "b"):
            trainer = self.trainer = Trainer(world, run=run)
            trainer.learn(rng)
            if run == "b":
                self.refused.add(trainer.version)
                trainer.snapshot(blob=b"no weights")
                yield
                trainer.learn(rng)
            trainer.snapshot()
            for _ in range(2):
                yield
                trainer.delta(trainer.learn(rng))
            yield
            bad = trainer.learn(rng)
            self.refused.add(trainer.version)
            trainer.delta(Weights(bad.keys_K, bad.values_KV * np.float32(np.nan), bad.dense))
            yield
            trainer.learn(rng)
            trainer.snapshot()
            yield
            trainer.delta(trainer.learn(rng))
            yield

    def ends_well(self) -> None:
        """With the fault over, the next snapshot and its deltas are served."""
        self.trainer.learn(self.rng)
        self.trainer.snapshot()
        self.trainer.delta(self.trainer.learn(self.rng))
        for _ in range(5):
            self.turn()
        assert self.world.version == self.trainer.version
        self.trainer.delta(self.trainer.learn(self.rng))
        self.turn()
        assert self.world.version == self.trainer.version


def test_the_matrix_has_a_row_for_every_call(tmp_path: Path):
    stage = Stage(tmp_path)
    for _ in stage.story():
        stage.turn()
    stage.updater = stage.started()  # A restart takes over.
    stage.turn()
    stage.ends_well()
    assert stage.seen == set(ROWS) and not stage.stops


def cell(folder: Path, part: str, method: str, way: str, at: int) -> bool:
    """Run one cell of the matrix; False where the story makes fewer calls than that."""
    stage = Stage(folder)
    watched: Any = getattr(stage.updater, part)
    story = stage.story()
    if method == "meta":  # It is called when a model is taken over.
        for _ in range(3):
            next(story)
            stage.turn()
        stage.updater = stage.started()
        watched = getattr(stage.updater, part)
    watched.fails, watched.way, watched.at = method, way, at
    for _ in story:
        if way == NEVER and not stage.stops:
            hung_turn(stage, watched)
        else:
            stage.turn()
    stage.ends_well()
    if watched.calls < watched.at:
        return False
    kind = way.partition(",")[0]
    if kind == "unavailable" and method not in ("load_snapshot", "apply_delta"):
        assert not stage.stops, "what is away is asked again"
    else:
        assert len(stage.stops) == 1, "it stopped loudly, once"
    return True


def pass_time(stage: Stage, seconds: float) -> None:
    """Let time pass in which the watch looks once a second."""
    for _ in range(int(seconds)):
        stage.world.clock.advance(1.0)
        stage.updater.watch()


def hung_turn(stage: Stage, watched: Watched) -> None:
    """Take one turn in a thread. Where it hangs, readers go on, the watch ends the stage, and the next one begins."""
    hung = threading.Thread(target=stage.turn)
    hung.start()
    while hung.is_alive() and not watched.blocked.is_set():
        hung.join(0.001)
    if watched.blocked.is_set():
        stage.check()
        stage.updater.watch()
        stage.world.clock.advance(3_600.0)
        stage.updater.watch()  # The whole process stood still, which is no call's.
        pass_time(stage, 119.0)
        stage.world.clock.advance(2.0)
        with pytest.raises(Unavailable, match=r"has waited 12\d000 ms for (record|blob|the beginning)"):
            stage.updater.watch()
        watched.released.set()
    hung.join(30)


def test_a_big_blob_that_comes_piece_by_piece_is_no_call_that_hangs(tmp_path: Path):
    """It takes ten times `stuck_ms`; a piece of it takes less."""
    stage = Stage(tmp_path)
    blobs, updater = stage.world.blobs, stage.updater

    class Slow:
        def get(self, name: str) -> bytes | None:
            for _ in range(20):
                pass_time(stage, updater.stuck_ms / 2_000)
                moved()
            return blobs.get(name)

    updater.blobs = Slow()  # type: ignore[assignment]
    stage.trainer.learn(stage.rng)
    stage.trainer.snapshot()
    stage.turn()
    assert stage.world.version == stage.trainer.version and not stage.stops


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("part", "method"), ROWS)
def test_each_call_may_fail_in_each_way(tmp_path: Path, part: str, method: str, way: str):
    assert cell(tmp_path, part, method, way, 1 if method in ONCE else 2), "no cell is skipped"


@pytest.mark.long
@pytest.mark.parametrize("at", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("part", "method"), ROWS)
def test_each_call_may_fail_in_each_way_at_each_time(tmp_path: Path, part: str, method: str, way: str, at: int):
    cell(tmp_path, part, method, way, at)
