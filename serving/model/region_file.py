"""The file of the shared region: where it lies, and how a restarted stage takes over the model in it.

1. The writer holds a lock on the file. So do its workers, which it forked: the lock is free when all have ended.
2. A region is taken over when it is of this layout and size, of this user, of this boot of the machine, and its active
   copy is complete and can be served by this project. It is served at once, whether or not the store answers.
3. The other copy is written anew from the active one: a writer may have died while it wrote.
4. Everything else is deleted and begun anew. A region whose lock stays taken is left to its owners, without a name.

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
from headrace.serving.model.shared_region import Meta, SharedModel, region_bytes

logger = logging.getLogger("headrace.serve")

MEMORY = Path("/dev/shm")


def region_path(home: Path, *, dim: int, rows_max: int, memory: Path = MEMORY) -> Path:
    """Return where the shared region of this local state lies: in memory where there is room, else under `home`.

    A region of another size that an earlier run left in memory is deleted.
    """
    name, size = _name(home), region_bytes(dim, rows_max)
    if os.access(memory, os.W_OK):
        if (memory / name).is_file() and (memory / name).lstat().st_size == size:
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


def open_region(
    path: Path, *, dim: int, rows_max: int, is_good: Callable[[Meta], bool], wait_s: float = 5.0
) -> SharedModel:
    """Return the region for its writer: the intact one that lies there, or a new one.

    Args:
        is_good: whether this project can serve what a region says that it holds.
        wait_s: how long to wait for processes of an earlier stage that still end.
    """
    lock = _locked(path, wait_s)
    if lock >= 0:
        try:
            shared = SharedModel(path, dim=dim, rows_max=rows_max)
            if shared.take_over(is_good):
                shared.lock = lock
                logger.info("took over %s from %s", shared.meta().manifest.version, path)
                return shared
        except (HeadraceError, OSError) as error:
            logger.warning("the region of an earlier run is left: %s", error)
        os.close(lock)
    shared = SharedModel(path, dim=dim, rows_max=rows_max, create=True)
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
