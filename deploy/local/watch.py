"""Watches the processes of a local stack: restarts a stage that does not work, and exports what the supervisor knows.

Every `LOOK_S`:

1. *ask*: /healthz of each stage that runs, side by side.
2. *restart*: SIGKILL to a stage whose /healthz was red in `RED_LOOKS` looks in a row, or gave no answer for
   `SILENT_S` although the same process had answered before. The supervisor starts it again, and waits longer each time.
   Time in which this process stood still itself, as with its host, counts for no stage.
3. *export*: crashes, time until the next start, health, and room on the disk, as metrics of the stage `watch`.

A stage is killed, not asked to stop: one that stands still hears no signal, and each may be killed at any moment.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from headrace.contract.config import PORTS
from headrace.contract.metrics import Metrics
from headrace.deploy.local.supervise import Process
from headrace.process.awake import Awake

log = logging.getLogger("headrace.watch")

LOOK_S = 2.0
ANSWER_S = 5.0
RED_LOOKS = 3
SILENT_S = 60.0
"""A stage that compiles or collects garbage on two busy cores answers within seconds; one that is stopped for a while
by SIGSTOP may go on where it was."""

WATCHED = tuple(
    name.removeprefix("metrics_")
    for name in PORTS
    if name.startswith("metrics_") and name != "metrics_watch" and not name.startswith("metrics_train_")
)
"""And the trainers of variants, which a stack has by name."""

Ask = Callable[[str], tuple[int, bytes]]
"""From an address to the status and the body; status 0 where nobody answers."""


class Processes(Protocol):
    """What is asked of the supervisor."""

    def processes(self) -> Sequence[Process]:
        """Return all that it runs."""

    def kill(self, name: str) -> None:
        """End one; it is started again."""


class _Seen(Struct):
    """What is known of one process, by its id."""

    pid: int
    answered_s: float | None = None
    """When /healthz was answered last; None before the first time."""
    red_looks: int = 0


class Watch:
    """One look after the other. `urls` has the address of each stage's probes."""

    def __init__(
        self,
        supervisor: Processes,
        urls: Mapping[str, str],
        ask: Ask,
        metrics: Metrics,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._supervisor, self._urls, self._ask, self._metrics = supervisor, urls, ask, metrics
        self._awake = Awake(monotonic, LOOK_S + ANSWER_S)
        self._seen: dict[str, _Seen] = {}
        self._counted: dict[str, int] = {}
        self._pool = ThreadPoolExecutor(max(1, len(urls)), thread_name_prefix="asks")

    def look(self) -> None:
        """Look once."""
        processes = self._supervisor.processes()
        running = [p for p in processes if p.pid and p.name in self._urls]
        answers = dict(zip((p.name for p in running), self._pool.map(self._probe, running), strict=True))
        for process in processes:
            self._export(process)
        for process in running:
            trouble = self._judge(process, *answers[process.name])
            if trouble:
                log.error("%s (pid %d) is restarted: %s", process.name, process.pid, trouble)
                self._metrics.add("unhealthy_restarts_total", process=process.name)
                self._supervisor.kill(process.name)

    def close(self) -> None:
        """Ask no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _probe(self, process: Process) -> tuple[int, bytes]:
        return self._ask(f"{self._urls[process.name]}/healthz")

    def _judge(self, process: Process, status: int, body: bytes) -> str:
        """Return why a process is to be restarted, "" where it is not."""
        now_s = self._awake.monotonic()
        seen = self._seen.get(process.name)
        if seen is None or seen.pid != process.pid:
            seen = self._seen[process.name] = _Seen(process.pid)
        if status == 0:
            still_s = 0.0 if seen.answered_s is None else now_s - seen.answered_s
            return f"/healthz gave no answer for {still_s:.0f} s" if still_s > SILENT_S else ""
        seen.answered_s = now_s
        seen.red_looks = seen.red_looks + 1 if status == 503 else 0
        if seen.red_looks < RED_LOOKS:
            return ""
        return f"/healthz is red: {body.decode(errors='replace').strip()[:500]}"

    def _export(self, process: Process) -> None:
        name, crashes = process.name, process.crashes
        # A supervisor that was started anew counts from 0.
        risen = crashes.total - self._counted.get(name, 0)
        self._metrics.add("process_crashes_total", risen if risen >= 0 else crashes.total, process=name)
        self._counted[name] = crashes.total
        waits = process.state == "backoff"
        self._metrics.set("process_crashes_in_row", crashes.in_row, process=name)
        self._metrics.set("next_start_seconds", crashes.next_start_s if waits else 0.0, process=name)
        self._metrics.add("unhealthy_restarts_total", 0.0, process=name)
        self._metrics.set("process_up", float(bool(process.pid)), process=name)


def tell_room(metrics: Metrics, folder: Path) -> None:
    """Export how much of the disk below `folder` is free, as a share of 1."""
    room = shutil.disk_usage(folder)
    metrics.set("disk_free_ratio", room.free / max(1, room.total))


def run(watch: Watch, tell: Callable[[], None], stop: threading.Event) -> None:
    """Look every `LOOK_S` until `stop`. A look that fails ends the process, for the supervisor to start it again."""
    while not stop.wait(LOOK_S):
        watch.look()
        tell()
