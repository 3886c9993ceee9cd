"""Carries the faults of a plan out, each at its time: kill -9, SIGSTOP and SIGCONT, servers stopped, the disk filled.

1. Begins and ends of all faults lie in one heap by time, so that faults overlap and no end waits for another's begin.
2. A process that is just between two lives is struck as soon as the supervisor has started it again.
3. Whatever ends this, every freeze is thawed, every stopped server is started, the disk is freed.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence

import psutil

from headrace.contract.errors import Unavailable
from headrace.deploy.local.chaos.faults import SERVE_WORKER, Fault
from headrace.deploy.local.chaos.own_stack import Say
from headrace.deploy.local.chaos.small_disk import SmallDisk
from headrace.deploy.local.servers.room import ROOM_BYTES
from headrace.deploy.local.supervise import Supervisor
from headrace.process.awake import awake_s

AGAIN_S = 0.2
ABSENT_S = 120.0
"""Longest time that a process may have no id: the supervisor tries at least every 5 s, so it has one within seconds."""
TELL_S = 15.0
FILLS_S = 8.0
"""From almost full, where no server is started any more (`room`), to full."""


class Strikes:
    """The faults of one run. `run` returns when the last one has ended."""

    def __init__(
        self, supervisor: Supervisor, disk: SmallDisk | None, say: Say, *, is_settled: Callable[[], bool] = lambda: True
    ) -> None:
        """`is_settled` says whether the broker works, or is not started for want of room."""
        self._supervisor, self._disk, self._say, self._is_settled = supervisor, disk, say, is_settled
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._open: list[Fault] = []
        self._frozen: dict[int, list[psutil.Process]] = {}
        self._begin_s = 0.0

    def run(self, faults: Sequence[Fault], told: Callable[[], str]) -> None:
        """Carry all out. `told` says how the load does, for the lines that tell of it."""
        self._begin_s = awake_s()
        for number, fault in enumerate(faults, 1):
            self._at(fault.at_s, lambda f=fault, n=number: self._begin(f, f"{n:>2} of {len(faults)}", told))  # type: ignore[misc]
        tell_s = TELL_S
        try:
            while self._due:
                wait_s = self._due[0][0] - self._now()
                if wait_s > 0:
                    time.sleep(min(wait_s, 1.0))
                    if self._now() > tell_s:
                        self._say(told())
                        tell_s = self._now() + TELL_S
                    continue
                heapq.heappop(self._due)[2]()
        finally:
            for fault in list(self._open):
                self._end(fault)

    def _now(self) -> float:
        return awake_s() - self._begin_s

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (at_s, next(self._order), act))

    def _begin(self, fault: Fault, number: str, told: Callable[[], str]) -> None:
        """Strike, or try again soon where the process is not there. Raises `Unavailable` when it stays away."""
        if fault.kind == "fill":
            self._open.append(fault)
            if self._disk is not None:
                # Disks fill by and by: what has just been started is over with its recovery when the last byte goes.
                self._disk.fill_but(ROOM_BYTES // 2)
                self._at(self._now() + min(FILLS_S, fault.for_s / 2), lambda: self._fill(fault))
        elif fault.kind == "stop":
            self._open.append(fault)
            self._supervisor.end(fault.processes())
        elif not self._signal(fault):
            if self._now() > fault.at_s + ABSENT_S:
                raise Unavailable(f"{fault.target} was not started again within {ABSENT_S:.0f} s.")
            self._at(self._now() + AGAIN_S, lambda: self._begin(fault, number, told))
            return
        fault.done = True
        spell = f" for {fault.for_s:.1f} s" if fault.for_s else ""
        self._say(f"fault {number}: {_WORDS[fault.kind]} {_names(fault)}{spell}; {told()}")
        if fault.for_s and fault.kind != "fill":
            self._at(self._now() + fault.for_s, lambda: self._end(fault))

    def _fill(self, fault: Fault) -> None:
        """Take the last byte as soon as no broker is in the middle of its recovery, for as long as was planned."""
        if not self._is_settled() and self._now() < fault.at_s + ABSENT_S:
            self._at(self._now() + AGAIN_S, lambda: self._fill(fault))
            return
        if self._disk is not None:
            self._disk.fill()
        self._say(f"      the disk is full; {'the broker works' if self._is_settled() else 'the broker recovers'}")
        self._at(self._now() + max(1.0, fault.for_s - FILLS_S), lambda: self._end(fault))

    def _signal(self, fault: Fault) -> bool:
        """Send the signal; return False where a process is not there."""
        found = [self._find(name) for name in fault.processes()]
        if not all(found):
            return False
        word = signal.SIGSTOP if fault.kind == "freeze" else signal.SIGKILL
        fault.pids = [process.pid for process in found if process]
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(process.pid if process else 0, word)
        if fault.kind == "freeze":
            self._open.append(fault)
            self._frozen[id(fault)] = [process for process in found if process]
        return True

    def _find(self, name: str) -> psutil.Process | None:
        pid = self._supervisor.pids().get("serve" if name == SERVE_WORKER else name, 0)
        with contextlib.suppress(psutil.Error):
            if pid and name == SERVE_WORKER:
                return next(iter(psutil.Process(pid).children()), None)
            return psutil.Process(pid) if pid else None
        return None

    def _end(self, fault: Fault) -> None:
        """End a spell; what was frozen and has been killed since stays as it is."""
        self._open.remove(fault)
        if fault.kind == "fill" and self._disk is not None:
            self._disk.free()
        elif fault.kind == "stop":
            self._supervisor.begin(fault.processes())
        for process in self._frozen.pop(id(fault), []):
            with contextlib.suppress(psutil.Error):
                process.resume()
        self._say(f"      end: {_WORDS[fault.kind]} {_names(fault)}")


_WORDS = {"kill": "kill -9", "freeze": "SIGSTOP", "stop": "stop", "fill": "fill the"}


def _names(fault: Fault) -> str:
    pids = f" (pid {', '.join(map(str, fault.pids))})" if fault.pids else ""
    return f"{fault.target}{pids}"
