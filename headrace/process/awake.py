"""Tells a process that was stopped, with its host or by itself, from one whose call does not return.

A bound is on the time in which the process could have gone on. A SIGSTOP, a virtual machine that is suspended or moved,
and a laptop that sleeps are none of it: whoever counts them ends what is healthy in the moment when it wakes.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

LATE_LOOKS = 3
"""A look that comes this many times later than planned: nothing of the process ran meanwhile."""
LOOK_S = 1.0


class Awake:
    """Follows the looks of its owner, which come at least every `look_s` while the process runs. Thread-safe."""

    def __init__(self, monotonic: Callable[[], float], look_s: float = LOOK_S) -> None:
        self._monotonic, self._look_s = monotonic, look_s
        self._looked_s = monotonic()
        self._stood_s = 0.0
        self._lock = threading.Lock()

    def stood_s(self) -> float:
        """Look; return for how many seconds the process stood still since the last look: 0 where it is in time."""
        with self._lock:
            return self._look(self._monotonic())

    def monotonic(self) -> float:
        """Look; return seconds that never go back, without those in which the process stood still."""
        with self._lock:
            now_s = self._monotonic()
            self._look(now_s)
            return now_s - self._stood_s

    def _look(self, now_s: float) -> float:
        since_s, self._looked_s = now_s - self._looked_s, now_s
        stood_s = since_s - self._look_s if since_s > LATE_LOOKS * self._look_s else 0.0
        self._stood_s += stood_s
        return stood_s


class _Process:
    """This process's own, which a thread looks at every second. A fork takes no thread along, and perhaps a lock."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.awake, self.is_followed, self.lock = Awake(time.monotonic), False, threading.Lock()

    def monotonic(self) -> float:
        if not self.is_followed:
            with self.lock:
                if not self.is_followed:
                    self.awake, self.is_followed = Awake(time.monotonic), True
                    threading.Thread(target=self._follow, args=(self.awake,), name="awake", daemon=True).start()
        return self.awake.monotonic()

    def _follow(self, awake: Awake) -> None:
        while True:
            time.sleep(LOOK_S)
            awake.stood_s()


_PROCESS = _Process()
os.register_at_fork(after_in_child=_PROCESS.begin)


def awake_s() -> float:
    """Return monotonic seconds of this process, without those in which it stood still. From any thread."""
    return _PROCESS.monotonic()


@asynccontextmanager
async def awake_timeout(seconds: float, monotonic: Callable[[], float] = awake_s) -> AsyncIterator[None]:
    """Raise `TimeoutError` where the block takes longer than `seconds`, without those in which the process stood still.

    `asyncio.timeout` counts them: what waited for a client when the process was stopped would end when it goes on.
    """
    loop, end_s = asyncio.get_running_loop(), monotonic() + seconds
    async with asyncio.timeout(None) as bound:
        due: asyncio.TimerHandle | None = None

        def look() -> None:
            nonlocal due
            left_s = end_s - monotonic()
            if left_s > 0:
                due = loop.call_later(left_s, look)
            else:
                bound.reschedule(loop.time())

        due = loop.call_later(seconds, look)
        try:
            yield
        finally:
            due.cancel()
