"""Goal: swaps cost nothing that stays, and whoever is killed while the model changes costs nobody else anything.

Method: many swaps by an updater, with what the process holds counted; readers and writers of one region in processes
of their own, killed at random moments while the model is swapped and grows (`swap_kills`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import psutil
import pytest
import swap_kills
from serving_world import RECIPE, Trainer, World

from headrace.contract.errors import InvariantBroken
from headrace.serving.model.growth import Room
from headrace.serving.model.shared_region import SharedModel


def held_by_this_process(folder: Path) -> tuple[int, int, int]:
    """Return open files of regions, regions that are mapped, and resident bytes without what is shared."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    regions = {line.split()[4] for line in maps if str(folder / "swapped") in line}
    memory = psutil.Process().memory_info()
    files = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            files += str(folder / "swapped") in os.readlink(f"/proc/self/fd/{number}")
    return files, len(regions), memory.rss - memory.shared


@pytest.mark.parametrize("swaps", [1_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_swaps_leave_nothing_behind(tmp_path: Path, swaps: int):
    """Deltas, and every 50th time a snapshot of another run; a region that begins small and grows."""
    world, rng = World(tmp_path), Random(1)
    world.shared = SharedModel(tmp_path / "swapped", dim=2, rows_max=4, create=True, room=Room(left=lambda: 2**40))
    world.updater = world.new_updater()
    reader, held = SharedModel(tmp_path / "swapped", dim=2, rows_max=4, reader=1), []
    done, run = 0, 0
    while done < swaps:
        run += 1
        trainer = Trainer(world, run=f"r{run}")
        trainer.learn(rng)
        trainer.snapshot()
        for _ in range(49):
            trainer.delta(trainer.learn(rng))
        world.follow(3)
        done += 50
        assert world.version == trainer.version == reader.meta().manifest.version
        np.testing.assert_array_equal(world.served_rows(), world.expected_rows(trainer.version))
        world.models.clear()
        world.blobs.objects.clear()
        held.append(held_by_this_process(tmp_path))
    assert world.metrics.counters["swaps_total", ""] == swaps
    assert not [name for name, _ in world.metrics.counters if name == "versions_refused_total"]
    assert len({files for files, _, _ in held}) == 1 and {regions for _, regions, _ in held} == {1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "swapped"]
    # Loosely: what the log and the metrics of the test keep is in it.
    assert held[-1][2] < held[len(held) // 4][2] + 64_000_000


@pytest.mark.parametrize("fault", ["a corrupt snapshot", "a gap"])
def test_what_is_refused_while_the_region_grows_is_recovered_from(tmp_path: Path, fault: str):
    world, rng = World(tmp_path), Random(1)
    world.shared = SharedModel(tmp_path / "swapped", dim=2, rows_max=4, create=True, room=Room(left=lambda: 2**40))
    world.updater = world.new_updater()
    trainer, refused = Trainer(world), list[str]()

    def served() -> str:
        np.testing.assert_array_equal(world.served_rows(), world.expected_rows(world.version))
        return world.version

    trainer.learn(rng)
    trainer.snapshot()
    world.follow()
    for turn in range(6):
        before = served()
        trainer.learn(rng)
        if fault == "a gap":
            trainer.delta(trainer.learn(rng), seq=trainer.seq + 2)
        else:
            trainer.snapshot(blob=b"no weights %d" % turn)
            trainer.delta(trainer.learn(rng))
        world.follow()
        assert served() == before
        refused.append(world.shared.refused())
        trainer.learn(rng)
        trainer.snapshot()
        world.follow()
        assert served() == trainer.version and not world.shared.refused()
    assert all(refused) and world.shared.rows_max > 4 and world.shared.dim == RECIPE.dim


def test_a_write_that_fails_half_way_into_a_larger_region_is_never_served(tmp_path: Path):
    world, rng = World(tmp_path), Random(1)

    class Breaks(SharedModel):
        def _put(self, *given: object) -> None:
            raise OSError("the disk is gone")

    world.shared = Breaks(tmp_path / "swapped", dim=2, rows_max=4, create=True, room=Room(left=lambda: 2**40))
    world.updater = world.new_updater()
    trainer = Trainer(world)
    for _ in range(3):
        trainer.learn(rng)
    trainer.snapshot()
    with pytest.raises((OSError, InvariantBroken)):
        world.follow()
    assert not world.shared.holds_model


@pytest.mark.parametrize(
    ("seed", "kills"), [(1, 40), *(pytest.param(s, 300, marks=pytest.mark.long) for s in range(2, 6))]
)
def test_whoever_is_killed_while_the_model_changes_and_grows_costs_nobody_else_anything(
    tmp_path: Path, seed: int, kills: int
):
    command = [sys.executable, swap_kills.__file__, str(tmp_path), str(seed), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == [] and report["is_whole"] and report["files"] == ["region"], report
    readers = report["readers"]
    assert len(readers) >= swap_kills.READERS and sum(r["answers"] for r in readers) > 100
    for reader in readers:
        assert reader["failed"] == [] and reader["mixed"] == 0 and reader["back"] == 0, reader
        assert reader["regions"] <= 2, "the region, and one that was filled aside as its writer was killed"
    assert report["rows_max"] > swap_kills.ROWS_MAX, "it grew"
