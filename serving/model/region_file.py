"""The file of the shared region: where it lies, and how a restarted stage takes over the model in it.

1. The writer holds a lock on the file. So do its workers, which it forked: the lock is free when all have ended.
   Once a region has grown, the writer alone holds it: the workers only read, and the sequence keeps them right.
2. A region is taken over when it is of this layout, of this user, of this boot of the machine, and its active copy is
   complete and can be served by this project. It is served at once, whether or not the store answers. How many rows it
   has room for, and how wide it is, it says itself: it may have grown.
3. The other copy is written anew from the active one: a writer may have died while it wrote.
4. What a writer filled aside when it died (`growth.py`) is deleted. Everything else is deleted and begun anew. A region
   whose lock stays taken is left to its owners, without a name.

A region stays when its stage ends. It goes with `headrace clean`, and memory goes with the machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

from headrace.contract.errors import HeadraceError
from headrace.process.awake import Awake
from headrace.serving.model.growth import Room
from headrace.serving.model.region_layout import region_bytes, room_in
from headrace.serving.model.shared_reader import LARGER, Meta
from headrace.serving.model.shared_region import SharedModel

logger = logging.getLogger("headrace.serve")

MEMORY = Path("/dev/shm")


def region_path(home: Path, *, dim: int, rows_max: int, memory: Path = MEMORY) -> Path:
    """Return where the shared region of this local state lies: in memory where there is room, else under `home`.

    A file there that an earlier run left and that is no region is deleted.
    """
    name, size = _name(home), region_bytes(dim, rows_max)
    if os.access(memory, os.W_OK):
        if (memory / name).is_file() and room_in(memory / name) is not None:
            return memory / name
        (memory / name).unlink(missing_ok=True)
        if shutil.disk_usage(memory).free > size:
            return memory / name
    folder = home / "run"
    folder.mkdir(parents=True, exist_ok=True)
    logger.warning("%s has no room for %d MB; the model lies in %s", memory, size // 1_000_000, folder)
    return folder / name


def region_in_memory(home: Path, memory: Path = MEMORY) -> Path:
    """Return where this local state's region lies when it lies in memory."""
    return memory / _name(home)


def forget_region(home: Path, memory: Path = MEMORY) -> None:
    """Delete this local state's region where it lies in memory, and a larger one that was filled aside."""
    path = region_in_memory(home, memory)
    for each in (path, path.with_name(path.name + LARGER)):
        each.unlink(missing_ok=True)


def open_region(
    path: Path,
    *,
    dim: int,
    rows_max: int,
    is_good: Callable[[Meta], bool],
    wait_s: float = 5.0,
    room: Room | None = None,
) -> SharedModel:
    """Return the region for its writer: the intact one that lies there, or a new one.

    Args:
        dim: the widest `Recipe.row_dim` that a new one has room for.
        rows_max: how many rows a copy of a new one has room for.
        is_good: whether this project can serve what a region says that it holds.
        wait_s: how long to wait for processes of an earlier stage that still end.
        room: what it may grow to; None: it does not grow.
    """
    lock = _locked(path, wait_s)
    if lock >= 0:
        try:
            path.with_name(path.name + LARGER).unlink(missing_ok=True)
            shared = SharedModel(path, dim=dim, rows_max=rows_max, room=room)
            if shared.take_over(is_good):
                shared.lock = lock
                logger.info("took over %s from %s", shared.meta().manifest.version, path)
                return shared
        except (HeadraceError, OSError) as error:
            logger.warning("the region of an earlier run is left: %s", error)
        os.close(lock)
    shared = SharedModel(path, dim=dim, rows_max=rows_max, create=True, room=room)
    shared.lock = _locked(path, 0.0)
    return shared


def _locked(path: Path, wait_s: float) -> int:
    """Return the descriptor of a file that is ours and locked; -1 where there is none."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return -1
    awake = Awake(time.monotonic)
    about, until = os.fstat(file), awake.monotonic() + wait_s
    # In a folder that all may write to, another user's file could have been put there to be served.
    if about.st_uid == os.geteuid() and stat.S_ISREG(about.st_mode) and not about.st_mode & 0o022:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except OSError:
                if awake.monotonic() >= until:
                    logger.warning("%s is still in use after %g s; another region is begun", path, wait_s)
                    break
                time.sleep(0.02)
    os.close(file)
    return -1


def _name(home: Path) -> str:
    return f"headrace-model-{hashlib.sha256(str(home).encode()).hexdigest()[:16]}"
