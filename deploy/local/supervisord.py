"""supervisord with two differences: when it starts again what has ended (`restarts`), and that it tells of it.

The library's own wait grows by a second with each failure and is forgotten when a process has run for a second, and in
the end it gives up. Here a process that has ended by itself is in BACKOFF until its next start, whenever it ended. The
method `headrace.getCrashes` of its XML-RPC tells the ends of each process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from supervisor.process import Subprocess
from supervisor.states import ProcessStates
from supervisor.supervisord import main

from headrace.deploy.local.layout import is_ours
from headrace.deploy.local.restarts import MAX_S, Crashes, last_words

FACTORY = "headrace.deploy.local.supervisord:tell_crashes"
_TAIL_BYTES = 8_192
_WAITING = (ProcessStates.EXITED, ProcessStates.BACKOFF)


class _Known:
    """What this supervisord knows of its processes."""

    crashes: ClassVar[dict[str, Crashes]] = {}
    started_s: ClassVar[dict[str, float]] = {}
    """On the monotonic clock, which no time service moves."""
    log_at: ClassVar[dict[str, int]] = {}
    """How long its log was when it was started."""
    max_s = MAX_S


def _crashes(process: Any) -> Crashes:
    return _Known.crashes.setdefault(str(process.config.name), Crashes())


def install() -> None:
    """Let supervisord wait between starts as `restarts` says."""
    finish, transition, spawn = Subprocess.finish, Subprocess.transition, Subprocess.spawn

    def finish_noted(self: Any, pid: int, status: int) -> None:
        was_asked, ran_s = bool(self.killing), time.monotonic() - _Known.started_s[str(self.config.name)]
        finish(self, pid, status)
        if was_asked:
            _crashes(self).asked()
        else:
            _note(self, pid, how_ended(status), ran_s)

    def spawn_noted(self: Any) -> Any:
        if self.state not in _WAITING:
            _crashes(self).asked()
        _Known.started_s[str(self.config.name)] = time.monotonic()
        _Known.log_at[str(self.config.name)] = _log_bytes(self)
        pid = spawn(self)
        if self.state == ProcessStates.BACKOFF:
            _note(self, 0, f"no start: {self.spawnerr}", 0.0)
        return pid

    def transition_at_its_time(self: Any) -> None:
        if self.state not in _WAITING or _crashes(self).left_s(time.monotonic()) == 0.0:
            transition(self)

    Subprocess.finish, Subprocess.spawn, Subprocess.transition = finish_noted, spawn_noted, transition_at_its_time


def _note(process: Any, pid: int, how: str, ran_s: float) -> None:
    """Note a crash, and put the process into BACKOFF, where it can be stopped while it waits."""
    crashes = _crashes(process)
    crashes.ended(pid=pid, how=how, ran_s=ran_s, words=_words(process), now_s=time.monotonic(), max_s=_Known.max_s)
    process.change_state(ProcessStates.BACKOFF)
    # The library's own wait is over at once, and its count never ends the tries.
    process.delay, process.backoff = 0, 1
    process.config.options.logger.warn(
        f"crash {crashes.total} of '{process.config.name}', {crashes.in_row} in a row: {how} after {ran_s:.0f} s; "
        f"next start in {crashes.left_s(time.monotonic()):.1f} s"
    )


def how_ended(status: int) -> str:
    """Return a wait status in words.

    >>> how_ended(256), how_ended(9), how_ended(0)
    ('exit 1', 'SIGKILL', 'exit 0')
    """
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return signal.Signals(number).name if number in {s.value for s in signal.Signals} else f"signal {number}"
    return f"exit {os.WEXITSTATUS(status)}"


def _log_bytes(process: Any) -> int:
    try:
        return Path(process.config.stdout_logfile).stat().st_size
    except OSError:
        return 0


def _words(process: Any) -> str:
    try:
        with Path(process.config.stdout_logfile).open("rb") as file:
            end, begun = file.seek(0, os.SEEK_END), _Known.log_at.get(str(process.config.name), 0)
            # A log that is shorter than it was has been rotated since.
            file.seek(max(0 if begun > end else begun, end - _TAIL_BYTES))
            return last_words(file.read().decode(errors="replace").splitlines())
    except OSError:
        return ""


class CrashTeller:
    """The methods of the namespace `headrace`."""

    def getCrashes(self) -> dict[str, Any]:
        """Return, a process, its crashes, with `next_start_s` as seconds from now."""
        now_s = time.monotonic()
        return {
            name: msgspec.to_builtins(crashes.told(now_s=now_s, begun_s=_Known.started_s.get(name, now_s)))
            for name, crashes in _Known.crashes.items()
        }

    def setEnvironment(self, given: str) -> list[str]:
        """Take variables, a JSON object, for what is started from now on; return those of Headrace's that changed. They
        are kept in memory alone: some are secrets."""
        wanted: dict[str, str] = json.loads(given)
        changed = [name for name, value in wanted.items() if os.environ.get(name) != value]
        os.environ.update(wanted)
        return sorted(name for name in changed if is_ours(name))


def tell_crashes(_supervisord: Any, **told: str) -> CrashTeller:
    """Make the namespace; called by supervisord. `restart_max_s` bounds the wait between two starts."""
    _Known.max_s = float(told.get("restart_max_s", MAX_S))
    return CrashTeller()


if __name__ == "__main__":
    # supervisord finds the namespace by the module's name, which must not be a second copy of this one.
    sys.modules["headrace.deploy.local.supervisord"] = sys.modules["__main__"]
    install()
    sys.exit(main())
