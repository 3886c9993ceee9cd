"""Ends a process whose event loop stands still: a call on the loop that never returns can be seen from elsewhere only.

1. *beat*: the loop says at every tick that it runs.
2. *look*: a thread looks every second when that was, in time that the process was awake for (`awake.py`). Longer ago
   than `STILL_MAX_S`: it writes down where every thread is, and ends the process with status 1. The supervisor starts
   it again.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable

from headrace.process.awake import Awake

log = logging.getLogger("headrace.watchdog")

STILL_MAX_S = 180.0
"""A tick comes every 5 ms, and the longest work between two of them, a second of joins, is far below."""
LOOK_S = 1.0


def end_process(why: str) -> None:
    """Say why and where everything is, and end the process at once, with status 1."""
    log.critical("%s", why)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(1)


class Watchdog:
    """Watches one event loop."""

    def __init__(
        self, monotonic: Callable[[], float] = time.monotonic, end: Callable[[str], None] = end_process
    ) -> None:
        self._monotonic, self._end = monotonic, end
        self._beat_s = monotonic()
        self._stopped = threading.Event()

    def beat(self) -> None:
        """Say that the loop runs."""
        self._beat_s = self._monotonic()

    def look(self, stood_s: float = 0.0) -> None:
        """End the process where the last beat is too long ago.

        Args:
            stood_s: for how many seconds the whole process stood still since the last look; they do not count.
        """
        now_s = self._monotonic()
        if stood_s:
            self._beat_s = min(now_s, self._beat_s + stood_s)
        still_s = now_s - self._beat_s
        if still_s > STILL_MAX_S:
            self._end(
                f"stopping: the stage's event loop has stood still for {still_s:.0f} s, {STILL_MAX_S:.0f} s are "
                "allowed: a call on it does not return. Where it is follows; the next start goes on from the store."
            )

    def start(self) -> None:
        """Look every second from now on."""
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def _run(self) -> None:
        awake = Awake(self._monotonic, LOOK_S)
        while not self._stopped.wait(LOOK_S):
            self.look(awake.stood_s())
