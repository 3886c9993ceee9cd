"""Goal: a model that outgrows its region moves to a larger one while it is read, or is refused in words and nothing has
happened. Method: values that encode their version; readers of this process, and memory that is said to be short."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from headrace.contract.errors import Overloaded
from headrace.contract.formats.snapshot import Manifest, Weights
from headrace.serving.model import growth, shared_region
from headrace.serving.model.growth import Room, memory_left
from headrace.serving.model.region_file import open_region, region_path
from headrace.serving.model.region_layout import region_bytes, room_in
from headrace.serving.model.shared_reader import LARGER
from headrace.serving.model.shared_region import Held, Meta, SharedModel, View

DIM = 3
PLENTY = 2**40


def weights(step: int, count: int, width: int = 1 + DIM) -> Weights:
    keys = np.arange(1, 1 + count, dtype=np.int64) * 7919
    return Weights(keys, np.full((count, width), step, np.float32), {"w": np.full(5, step, np.float32)})


def meta(step: int) -> Meta:
    manifest = Manifest(kind="delta", model="m", run="r", step=step, version=f"r-{step}", positions={"0": [step, 0]})
    return Meta(manifest, "r-0", "{}", "{}", {"w": [5]})


def writer(path: Path, room: Room | None = None) -> SharedModel:
    room = room or Room(left=lambda: PLENTY)
    model = open_region(path, dim=DIM, rows_max=100, is_good=lambda meta: True, wait_s=0.0, room=room)
    take(model, 1, 90)
    return model


def take(model: SharedModel, step: int, count: int, *, width: int = 1 + DIM, fresh: bool = True) -> None:
    given = weights(step, count, width)
    model.check_fits(given, meta(step), fresh=fresh)
    model.load_snapshot(given, meta(step)) if fresh else model.apply_delta(given, meta(step))


def rows_of(model: SharedModel, count: int, dim: int = DIM) -> np.ndarray:
    keys = weights(0, count).keys_K
    return model.read(lambda view: view.lookup(keys, seed=1, scale=0.0, dim=dim))[0]


@pytest.mark.parametrize("fresh", [True, False])
def test_more_rows_and_wider_ones_are_taken_without_a_restart(tmp_path: Path, fresh: bool):
    model = writer(tmp_path / "m")
    reader = SharedModel(tmp_path / "m", dim=9, rows_max=9, reader=1)
    assert rows_of(reader, 90).shape == (90, 1 + DIM)
    take(model, 2, 350, fresh=fresh)
    for each in (model, reader):
        assert (rows_of(each, 350) == 2).all() and each.rows == 350 and each.meta().manifest.version == "r-2"
    known = reader.known_by("r-1")
    assert model.rows_max == reader.rows_max == 400 and known is not None and known.positions == {"0": [1, 0]}
    take(model, 3, 40, width=1 + 7)
    assert model.dim == 7 and (rows_of(reader, 40, 7) == 3).all() and reader.rows == 40
    for step in range(4, 8):  # Both copies.
        take(model, step, 60, width=1 + 7, fresh=False)
        assert (rows_of(reader, 60, 7) == step).all() and reader.rows == 60
    assert not (tmp_path / f"m{LARGER}").exists()


def test_what_reads_the_old_region_ends_there_and_then_its_memory_is_freed(tmp_path: Path):
    model = writer(tmp_path / "m")
    reader = SharedModel(tmp_path / "m", dim=DIM, rows_max=100, reader=1)
    keys, seen = weights(0, 90).keys_K, list[np.ndarray]()
    files = len(os.listdir("/proc/self/fd"))

    def use(view: View) -> None:
        if not seen:
            take(model, 2, 300)
            take(model, 3, 300)
        seen.append(view.lookup(keys, seed=1, scale=0.0))

    _, read = reader.read(use)
    assert len(seen) == 1 and (seen[0] == 1).all() and read.manifest.version == "r-1", "it was not asked to read again"
    assert (rows_of(reader, 90) == 3).all()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "m") in line]
    assert len({line.split()[4] for line in mapped}) == 1, "the old file is mapped no more"
    assert len(os.listdir("/proc/self/fd")) == files, "nor open"


@pytest.mark.parametrize("short", ["memory", "bound", "filesystem", "full", "no file"])
def test_without_room_nothing_has_happened_and_the_words_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: str
):
    room = Room(region_bytes(DIM, 100) if short == "bound" else 0, lambda: 1_000 if short == "memory" else PLENTY)
    model = writer(tmp_path / "m", room)
    if short == "filesystem":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
    if short in ("full", "no file"):

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate" if short == "full" else "open", full)
    with pytest.raises(Overloaded) as refused:
        take(model, 2, 500)
    monkeypatch.undo()
    wanted = {"memory": "give serving more", "bound": "serve.memory_bytes allows", "filesystem": "make it larger"}
    assert wanted.get(short, "No space left") in str(refused.value)
    if short not in ("full",):
        assert "r-2 has 500 rows of 4 values, and there is room for 100 of 4" in str(refused.value)
    assert model.meta().manifest.version == "r-1" and (rows_of(model, 90) == 1).all() and model.rows_max == 100
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    take(model, 3, 80, fresh=False)
    assert (rows_of(model, 80) == 3).all()


@pytest.mark.parametrize("at", ["check", "locked", "take_name", "after"])
def test_a_writer_that_dies_while_it_grows_leaves_a_whole_region(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
):
    class Died(BaseException):
        pass

    model = writer(tmp_path / "m")
    reader = SharedModel(tmp_path / "m", dim=DIM, rows_max=100, reader=1)
    assert (rows_of(reader, 90) == 1).all()
    rename, lock, locks = shared_region.take_name, shared_region.locked, list[int]()

    def dies(*given: Path) -> None:
        if at == "after":
            rename(*given)
        raise Died

    def locks_it(path: Path) -> int:
        locks.append(lock(path))
        return locks[-1]

    monkeypatch.setattr(shared_region, "locked", locks_it)
    if at == "check":
        monkeypatch.setattr(growth, "apply", dies)
    else:
        monkeypatch.setattr(shared_region, "take_name" if at == "after" else at, dies)
    with pytest.raises(Died):
        take(model, 2, 500)
    monkeypatch.undo()
    for each in (model.lock, *locks):  # As the end of the process does.
        os.close(each)
    after = open_region(
        tmp_path / "m", dim=DIM, rows_max=100, is_good=lambda meta: True, wait_s=0.0, room=Room(left=lambda: PLENTY)
    )
    assert after.meta().manifest.version == "r-1" and (rows_of(after, 90) == 1).all()
    assert [p.name for p in tmp_path.iterdir()] == ["m"], "what was filled aside is gone"
    assert after.rows_max == (800 if at == "after" else 100)
    take(after, 2, 500)
    reader.warm()  # Nobody told it of the region that has the name now: it looks.
    assert (rows_of(reader, 500) == 2).all() and (rows_of(after, 500) == 2).all()


def test_a_region_that_has_grown_is_taken_over_as_it_is(tmp_path: Path):
    memory, home = tmp_path / "memory", tmp_path / "home"
    memory.mkdir()
    path = region_path(home, dim=DIM, rows_max=100, memory=memory)
    model = writer(path)
    take(model, 2, 500, width=9)
    os.close(model.lock)
    assert region_path(home, dim=DIM, rows_max=100, memory=memory) == path and room_in(path) == (8, 800)
    again = open_region(path, dim=DIM, rows_max=100, is_good=lambda meta: True, wait_s=0.0)
    assert again.meta().manifest.version == "r-2" and (rows_of(again, 500, 8) == 2).all()


def test_recent_requests_are_scored_against_the_next_model_before_anyone_reads_it(tmp_path: Path):
    model = writer(tmp_path / "m")
    reader = SharedModel(tmp_path / "m", dim=DIM, rows_max=100, reader=1)
    warmed, stop, active = [], threading.Event(), list[str]()

    def use(view: View) -> None:
        if threading.current_thread() is thread:
            warmed.append(view.meta.manifest.version)
            active.append(model.meta().manifest.version)

    def look() -> None:
        while not stop.wait(0.001):
            reader.warm()

    thread = threading.Thread(target=look)
    reader.read(use, is_request=True)
    thread.start()
    while not reader._region.head[shared_region._WARMED + 1]:
        pass
    take(model, 2, 90)
    assert warmed == ["r-2"] and active == ["r-1"], "in the idle copy"
    take(model, 3, 500)
    assert warmed == ["r-2", "r-2", "r-3"] and active == ["r-1", "r-2", "r-2"], (
        "in the larger region, then in its idle copy"
    )
    stop.set()
    thread.join()
    assert (rows_of(reader, 500) == 3).all()


def test_a_model_that_is_not_scored_or_reads_otherwise_is_not_switched_to(tmp_path: Path):
    model, found = writer(tmp_path / "m"), list[tuple[int, list[int]]]()

    def check(held: Held, failed: list[int]) -> None:
        found.append((len(held.keys_R), failed))
        raise Overloaded("no")

    with pytest.raises(Overloaded, match="no"):
        model.load_snapshot(weights(2, 50), meta(2), check=check)
    assert found == [(50, [])] and model.meta().manifest.version == "r-1"
    for step in (3, 4, 5):
        take(model, step, 90, fresh=False)
        assert (rows_of(model, 90) == step).all() and model.rows == 90


def test_the_limit_of_the_control_group_counts(tmp_path: Path):
    assert memory_left(tmp_path) > 0
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    assert memory_left(tmp_path) == 1_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_left(tmp_path) > 1_000
