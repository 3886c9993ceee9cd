"""Goal: what a failed sync did not write is taken for durable by nobody, and the error names path and remedy. Method:
real files and a real Delta lake; the kernel's fsync fails, and the disk then holds what a bad one would."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lake_world import hours, samples

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.lake.delta import DeltaLake
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.positions import Position


def fill(lake: DeltaLake, commits: int, first: int = 0) -> None:
    """Commit one record of two hours each."""
    for offset in range(first, first + commits):
        lake.append([samples(0, offset, hours(1, 2))], {0: offset + 1}, {0: Position(offset, 1)})


def places(lake: DeltaLake) -> list[tuple[int, int]]:
    table = lake.read()
    return sorted(zip(table["offset"].to_pylist(), table["rank"].to_pylist(), strict=True))


def _failing(number: int, when: Callable[[Path], bool]) -> Callable[[int], None]:
    real = os.fsync

    def fsync(fd: int) -> None:
        if when(Path(os.readlink(f"/proc/self/fd/{fd}"))):
            raise OSError(number, os.strerror(number))
        real(fd)

    return fsync


@pytest.mark.parametrize(("number", "remedy"), [(errno.EIO, "the disk fails"), (errno.ENOSPC, "free the disk")])
@pytest.mark.parametrize("of", ["the file", "its folder"])
def test_a_blob_whose_sync_failed_is_written_again_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str, of: str
) -> None:
    blobs = FileBlobs(tmp_path)
    blobs.put("a/b", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _failing(number, lambda path: path.is_dir() == (of == "its folder")))
        with pytest.raises(Unavailable, match=remedy) as caught:
            blobs.put("a/b", b"new")
    assert str(tmp_path / "a" / "b") in str(caught.value)
    seen = (tmp_path / "a" / "b").stat().st_ino
    blobs.put("a/b", b"new")
    assert (tmp_path / "a" / "b").stat().st_ino != seen and blobs.get("a/b") == b"new", "no page of before is believed"
    assert not list((tmp_path / ".unfinished").iterdir())


def test_a_new_folder_is_on_the_disk_with_its_blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", _failing(0, lambda path: bool(synced.append(path))))
    FileBlobs(tmp_path / "new" / "store").put("state/0/1.arrow", b"x")
    wanted = {tmp_path, tmp_path / "new", *((tmp_path / "new" / "store" / name) for name in ("", "state", "state/0"))}
    assert wanted <= set(synced)
    synced.clear()
    FileBlobs(tmp_path / "new" / "store").put("state/0/2.arrow", b"x")
    assert [path for path in synced if path.is_dir()] == [tmp_path / "new" / "store" / "state" / "0"]


def _torn_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[DeltaLake, list[Path]]:
    """Return a lake whose third commit is there and was not synced, and that commit's files."""
    lake = DeltaLake(str(tmp_path / "lake"), partitions=3)
    fill(lake, 2)
    whole = set((tmp_path / "lake").rglob("*.parquet"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _failing(errno.EIO, lambda path: path.suffix == ".parquet"))
        with pytest.raises(Unavailable, match="the disk fails"):
            fill(lake, 1, first=2)
    return lake, sorted(set((tmp_path / "lake").rglob("*.parquet")) - whole)


@pytest.mark.parametrize("is_new_process", [False, True])
def test_a_commit_whose_sync_failed_is_read_from_the_disk_before_more_is_built_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new_process: bool
) -> None:
    lake, files = _torn_commit(tmp_path, monkeypatch)
    for path in files:
        path.write_bytes(bytes(path.stat().st_size))
    lake = DeltaLake(str(tmp_path / "lake"), partitions=3) if is_new_process else lake
    with pytest.raises(InvariantBroken, match="delete the newest entry") as caught:
        fill(lake, 1, first=3)
    assert any(str(path) in str(caught.value) for path in files)
    (tmp_path / "lake" / "_delta_log" / f"{2:020d}.json").unlink()
    again = DeltaLake(str(tmp_path / "lake"), partitions=3)
    state = again.state()
    assert state is not None and state.next_offsets == {0: 2}
    fill(again, 2, first=2)
    assert places(again) == [(o, r) for o in range(4) for r in range(2)]


def test_a_commit_whose_sync_failed_for_once_is_built_on_once_the_disk_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, files = _torn_commit(tmp_path, monkeypatch)
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", _failing(0, lambda path: bool(synced.append(path))))
    fill(lake, 1, first=3)
    assert set(files) <= set(synced)
    assert places(lake) == [(o, r) for o in range(4) for r in range(2)]


def test_the_newest_commit_of_a_process_that_was_killed_is_synced_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(DeltaLake(str(tmp_path / "lake"), partitions=3), 2)
    newest: Any = tmp_path / "lake" / "_delta_log" / f"{1:020d}.json"
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", _failing(0, lambda path: bool(synced.append(path))))
    fill(DeltaLake(str(tmp_path / "lake"), partitions=3), 1, first=2)
    assert newest in synced
