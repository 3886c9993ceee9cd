"""Goal: with `fsync`, nothing is removed or cut short before what takes its place is on the disk.

Method: the outbox on a real folder; each sync and each removal is noted in order, with what the kernel then holds. What
was written and not synced is lost when the power goes.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgpack
import pytest

from headrace.contract.errors import Overloaded
from headrace.sender.outbox import Outbox
from headrace.sender.segment import Segment


class Disk:
    """Which files are on the disk, and how much of each: by the file's number, which a rename keeps."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes: dict[int, int] = {}
        self.names: set[Path] = set()
        self.removed: list[Path] = []
        self.fails = False
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, self._synced)
        self._unlink, self._truncate = Path.unlink, os.truncate
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: self.unlink(path))
        patch.setattr(os, "truncate", self.truncate)
        self.check = lambda: None

    def _synced(self, fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if self.fails and path.suffix == ".seg":
            raise OSError(5, "the disk is broken")
        if path.is_dir():
            self.names |= set(path.iterdir())
        else:
            self.bytes[os.fstat(fd).st_ino] = os.fstat(fd).st_size

    def unlink(self, path: Path) -> None:
        self.check()
        self.removed.append(path)
        self._unlink(path, missing_ok=True)

    def truncate(self, path: Path, size: int) -> None:
        self.check()
        self._truncate(path, size)

    def holds(self, path: Path) -> bool:
        """Say whether all of a file, and every folder above it up to the test's own, would be there after a cut."""
        about = path.stat()
        return path in self.names and path.parent in self.names and self.bytes.get(about.st_ino) == about.st_size


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def _open(folder: Path) -> Outbox:
    return Outbox(folder, window=3, bytes_max=1 << 20, chunk_bytes=1 << 19, message_max=1 << 20, fsync=True)


def _fill(outbox: Outbox, large: int) -> None:
    for size in (*[1_000] * 6, *[5_000] * large):
        outbox.add("a", b"\x92\xd7\x00" + bytes(8) + msgpack.packb("x" * size), 0.0)
    outbox.close_chunks(10.0, 0.0, away=False)


def _ids(folder: Path) -> set[Path]:
    return set(folder.rglob("*.seg")) | set(folder.rglob("*.ndjson"))


@pytest.mark.parametrize("large", [0, 1])
def test_the_parts_of_a_cut_are_on_the_disk_before_it_is_removed(tmp_path: Path, disk: Disk, large: int) -> None:
    outbox = _open(tmp_path / "spool")
    _fill(outbox, large)
    (parent,) = _ids(tmp_path)

    def check() -> None:
        others = _ids(tmp_path) - {parent}
        assert len(others) == 1 + large and all(disk.holds(path) for path in others), others

    disk.check = check  # type: ignore[method-assign]
    outbox.message_max = 3_000
    outbox.lanes.of("a").segment = None  # As after a restart: nothing is appended to it any more.
    outbox.cut_large()
    assert disk.removed == [parent] and outbox.unacked == 6


def test_a_cut_whose_parts_do_not_come_to_the_disk_is_not_made(tmp_path: Path, disk: Disk) -> None:
    outbox = _open(tmp_path / "spool")
    _fill(outbox, 1)
    (parent,) = _ids(tmp_path)
    outbox.message_max, disk.fails = 3_000, True
    outbox.cut_large()
    assert isinstance(outbox.failure, Overloaded) and "disk is broken" in str(outbox.failure)
    assert _ids(tmp_path) == {parent} and outbox.unacked == 7
    disk.fails = False
    outbox.cut_large()
    assert outbox.unacked == 6 and outbox.rejects.count == 1


def test_what_an_earlier_process_wrote_is_on_the_disk_before_it_is_sent(tmp_path: Path, disk: Disk) -> None:
    before = _open(tmp_path / "spool")
    _fill(before, 0)
    before.spool.forsake()
    outbox = _open(tmp_path / "spool")
    chunk = outbox.lanes.take(0.0)
    assert chunk is not None
    outbox.spool.sync(outbox.spool.duplicates({chunk.segment}))
    assert disk.holds(chunk.segment.path)


def test_damaged_bytes_are_kept_before_their_segment_loses_them(tmp_path: Path, disk: Disk) -> None:
    before = _open(tmp_path / "spool")
    _fill(before, 0)
    before.spool.forsake()
    (path,) = _ids(tmp_path)
    data = bytearray(path.read_bytes())
    data[3_000] ^= 1
    path.write_bytes(data)
    kept: list[int] = []

    def check() -> None:
        (found,) = tmp_path.rglob("*.damaged")
        assert disk.bytes.get(found.stat().st_ino) == found.stat().st_size > 1_000
        kept.append(found.stat().st_size)

    disk.check = check  # type: ignore[method-assign]
    outbox = _open(tmp_path / "spool")
    assert kept and len(Segment(path).read()[0]) >= 2 and outbox.unacked == 2
