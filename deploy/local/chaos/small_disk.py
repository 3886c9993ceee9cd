"""A small filesystem of its own for one stack, which can be filled to the last byte without harm to any other.

It is an ext4 image in a sparse file, mounted by a loop device; so it takes root. `fill` reserves blocks, which the file
below never gets: filling it takes no room where the image lies.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from headrace.contract.errors import Unavailable
from headrace.process.background import Background

SIZE_BYTES = 8 << 30
SPARE_BYTES = 4 << 30
"""What must be free beside the image's full size, so that not even a full image fills the disk below."""
_BLOCK = 4_096
_TOP_UP_S = 0.05


def lacking(folder: Path, size_bytes: int = SIZE_BYTES) -> str:
    """Return why no small disk can be mounted here, "" where one can."""
    if os.geteuid():
        return "mounting a disk of its own takes root"
    for tool in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(tool) is None:
            return f"there is no {tool} on the PATH"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices"
    if (free := shutil.disk_usage(folder).free) < size_bytes + SPARE_BYTES:
        return f"{folder} has {free >> 20:,} MiB free, and {(size_bytes + SPARE_BYTES) >> 20:,} are wanted"
    return ""


class SmallDisk:
    """One mounted image below `folder`. `fill` and `free` are safe to repeat."""

    def __init__(self, folder: Path, size_bytes: int = SIZE_BYTES) -> None:
        self._image, self.mount = folder / "disk.img", folder / "disk"
        self._filling: threading.Thread | None = None
        self._enough = threading.Event()
        self._background = Background()
        self.mount.mkdir()
        with self._image.open("wb") as file:
            file.truncate(size_bytes)
        # No blocks are kept for root, or this stack's processes would find room on the full disk.
        _run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=1,nodiscard", str(self._image))
        _run("mount", "-o", "loop", str(self._image), str(self.mount))

    def free_bytes(self) -> int:
        """Return what can still be written."""
        return shutil.disk_usage(self.mount).free

    def fill_but(self, left_bytes: int) -> None:
        """Leave so many bytes free, once."""
        if (take := self.free_bytes() - left_bytes) > 0:
            with (self.mount / "fill").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, take)

    def fill(self) -> None:
        """Leave no block free, and go on to take those that others free, until `free`."""
        if self._filling is None:
            self._enough.clear()
            self._take_all()
            self._filling = self._background.thread("full-disk", self._top_up)

    def free(self) -> None:
        """Give back all that `fill` took. Raises what ended the filling before its time."""
        if self._filling is not None:
            self._enough.set()
            self._filling.join()
            self._filling = None
        (self.mount / "fill").unlink(missing_ok=True)
        self._background.check()

    def unmount(self) -> None:
        """Give the device back and delete the image. Raises `Unavailable` while a process has a file open there."""
        self.free()
        _run("umount", str(self.mount))
        self._image.unlink()

    def _top_up(self) -> None:
        while not self._enough.wait(_TOP_UP_S):
            self._take_all()

    def _take_all(self) -> None:
        file = os.open(self.mount / "fill", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            step = 1 << 40
            while step >= _BLOCK:
                with contextlib.suppress(OSError):
                    step = min(step, max(_BLOCK, self.free_bytes() // _BLOCK * _BLOCK))
                    os.posix_fallocate(file, os.fstat(file).st_size, step)
                    continue
                step //= 2
        finally:
            os.close(file)


def _run(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if ran.returncode:
        raise Unavailable(f"{command[0]} failed: {(ran.stderr or ran.stdout).strip()[-300:]}")


@contextlib.contextmanager
def mounted(*, wanted: bool, say: Callable[[str], None]) -> Iterator[SmallDisk | None]:
    """Yield a small disk below the temporary folder, None where none is wanted; it stays after an error."""
    if not wanted:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="headrace-chaos-"))
    disk = SmallDisk(folder)
    try:
        yield disk
    except BaseException:
        disk.free()
        say(f"{disk.mount} stays mounted; `umount {disk.mount} && rm -r {folder}` when you have looked")
        raise
    disk.unmount()
    disk.mount.rmdir()
    folder.rmdir()
