"""A small stage of serving as its supervisor sees it: `serving_process` in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import serving_process

WORKERS = 3


class Stage:
    """The stage as its supervisor sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, serving_process.__file__, str(folder), str(WORKERS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.pids = set[int]()
        until(lambda: self.asked() and len(self.pids) == WORKERS, "all processes answer")

    def get(self, path: str) -> str:
        """Ask on a connection of its own, so that any process may take it."""
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=5.0, trust_env=False).text

    def asked(self) -> bool:
        """Ask once and remember who answered."""
        try:
            self.pids.add(int(self.get("/")))
        except httpx.HTTPError:
            return False
        return True

    @property
    def workers(self) -> set[int]:
        return self.pids - {self.process.pid}

    def region(self) -> list[Path]:
        return list((self.folder / "run").glob("headrace-model-*"))

    def ended(self) -> tuple[int, str]:
        """Wait for the end of all processes; return the exit status and the log."""
        _, log = self.process.communicate(timeout=15.0)
        until(lambda: not any(map(is_alive, self.pids)), "no process is left")
        return self.process.returncode, log


def until(holds: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def running(folder: Path) -> Iterator[Stage]:
    stage = Stage(folder)
    with stage.process:
        try:
            yield stage
        finally:
            for pid in {stage.process.pid, *stage.pids}:
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)
