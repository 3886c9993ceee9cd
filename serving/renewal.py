"""A restart of serving that keeps its port: no request is refused, and those that come meanwhile wait.

1. SIGHUP asks for it. For `DRAIN_S` each answer ends its connection, so that clients come back by new ones.
2. Nothing is accepted any more, what was begun is answered, and the workers end.
3. The first process runs its own command anew in its place: same process id, same listening socket. Connections that
   come meanwhile wait in the socket's queue, as many as uvicorn's `backlog` says.
4. The new image accepts when it has read the counters, after `READY_S` in any case.

What may be lost is a request on a kept connection that idled for `DRAIN_S` and is used in the very moment of its end:
its client has to send it again on a new one, as after any idle time.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial

from headrace.process.awake import awake_s

DRAIN_S = 1.0
READY_S = 20.0
SOCKET, RENEWALS = "HEADRACE_SERVE_SOCKET", "HEADRACE_SERVE_RENEWALS"
"""What the next image finds in its environment: the descriptor of the socket, and how often it was renewed."""


class Renewal:
    """Whether SIGHUP has asked this process for a restart, and how it is done. One a process, in its main thread."""

    def __init__(self) -> None:
        self.is_asked = False
        self._told: Callable[[], None] = lambda: None
        # That of a terminal which is closed ends what runs in it, as ever.
        if not os.isatty(0):
            signal.signal(signal.SIGHUP, self._ask)

    def begin(self, told: Callable[[], None]) -> None:
        """Let `told` be called when a restart is asked for, once; at once where it was.

        A later SIGTERM or SIGINT takes the wish back, and goes on to the handler that it has now.
        """
        self._told = told
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, partial(self._withdraw, signal.getsignal(number)))
        if self.is_asked:
            told()

    def _ask(self, *_: object) -> None:
        if not self.is_asked:
            self.is_asked = True
            self._told()

    def _withdraw(self, handler: object, number: int, frame: object) -> None:
        self.is_asked = False
        if callable(handler):
            handler(number, frame)


def run_anew(kept: int, command: list[str], environment: dict[str, str]) -> None:
    """Replace this process by its own command, with the listening socket of descriptor `kept`. It does not return.

    Args:
        command: `sys.orig_argv`.
        environment: to which what the next image is told is added.
    """
    # Until the next image takes it, a second signal must not end it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.set_inheritable(kept, True)
    # What a library has not marked to be closed would be kept for ever. The standard three stay.
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    number = int(environment.get(RENEWALS, "0")) + 1
    told = environment | {SOCKET: str(kept), RENEWALS: str(number)}
    os.execve(sys.executable, [sys.executable, *command[1:]], told)


def inherited(host: str, port: int) -> socket.socket | None:
    """Return the socket that the image before left, where it listens on this address; else None, and it is closed."""
    told = os.environ.pop(SOCKET, "")
    if not told.isdigit():
        return None
    try:
        listener = socket.socket(fileno=int(told))
    except OSError:
        return None
    listener.set_inheritable(True)
    if listener.getsockname()[:2] == (host, port):
        return listener
    listener.close()
    return None


def await_read(is_reading: Callable[[], bool], stop: Callable[[float], bool]) -> None:
    """Return when the counters are read, after `READY_S`, or when `stop`, which waits for so many seconds, says so."""
    until = awake_s() + READY_S
    while is_reading() and awake_s() < until and not stop(0.05):
        pass
