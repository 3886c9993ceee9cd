"""Upkeep of the lake on a schedule: beside the sink, in a process of its own each time.

Every `lake.compact_ms` the sink starts `headrace lake upkeep`, at low priority, and every `lake.vacuum_ms` it lets that
process vacuum too. The process has memory and threads of its own. If it dies, the sink goes on, and the next upkeep
does what it did not finish. A sink that is killed may leave an upkeep behind, which ends within one run.

Retention, vacuum and the end of leases go by the wall clock. Where that was set by more than a minute since the sink's
start, upkeeps only compact, until the clock is set back or `lake.lease_ms` have passed, the longest that a lease holds.
"""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable, Sequence

import msgspec

from headrace.backends.lake.upkeep import Done
from headrace.contract.config import LakeConfig
from headrace.contract.interfaces.clock import Clock
from headrace.contract.metrics import Metrics
from headrace.process.set_clock import SetClock, boot_s

log = logging.getLogger("headrace.lake")

# 30 min: one upkeep rewrites at most what came since the last, and first of all a backlog of days.
RUN_S_MAX = 1_800.0


class UpkeepSchedule(threading.Thread):
    """Starts upkeeps until `stop`, one at a time."""

    def __init__(
        self,
        config: LakeConfig,
        command: Sequence[str],
        metrics: Metrics,
        clock: Clock,
        stop: threading.Event,
        *,
        steady_s: Callable[[], float] = boot_s,
    ) -> None:
        """`command` is the command line of an upkeep that vacuums and prints JSON."""
        super().__init__(name="lake-upkeep", daemon=True)
        self.config, self.command, self.metrics, self.clock = config, list(command), metrics, clock
        self.stopped = stop
        self.set_clock = SetClock(clock.now_ms, config.lease_ms / 1_000, steady_s)
        self._is_told = False

    def run(self) -> None:
        """Wait, look after the lake, and again."""
        if not self.config.compact_ms:
            return
        vacuum_s = self.clock.monotonic() + self.config.vacuum_ms / 1000
        while not self.stopped.wait(self.config.compact_ms / 1000):
            with_vacuum = self.clock.monotonic() >= vacuum_s
            if self.run_once(with_vacuum) and with_vacuum and not self._is_told:
                vacuum_s = self.clock.monotonic() + self.config.vacuum_ms / 1000

    def run_once(self, with_vacuum: bool) -> bool:
        """Run one upkeep and count what it says; False when it failed."""
        command = [*self.command, *self._limits(with_vacuum)]
        try:
            status, said = self._upkeep(command)
        except Exception as error:
            # Whatever it is, such as no process or no memory left: a thread that ends here looks after nothing again.
            self.metrics.add("lake_upkeep_failed_total")
            log.exception("upkeep of the lake could not run and is tried again: %s", type(error).__name__)
            return False
        return self.count(status, said)

    def _limits(self, with_vacuum: bool) -> list[str]:
        moved_s = self.set_clock.moved_s()
        if moved_s and not self._is_told:
            log.error(
                "this host's clock was set by %+.0f s: the lake's retention and vacuum wait until it is set back, or "
                "for lake.lease_ms (%d ms)",
                *(moved_s, self.config.lease_ms),
            )
        self._is_told = bool(moved_s)
        if moved_s:
            return ["--compact-only"]
        return [] if with_vacuum else ["--no-vacuum"]

    def _upkeep(self, command: list[str]) -> tuple[int, str]:
        """Return the exit status of one upkeep and what it printed; one that takes too long is killed."""
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            deadline_s = self.clock.monotonic() + RUN_S_MAX
            while True:
                try:
                    # It reads meanwhile: a pipe that is full would hold the upkeep until its end.
                    said, _ = process.communicate(timeout=0.2)
                except subprocess.TimeoutExpired:
                    if self.stopped.is_set() or self.clock.monotonic() > deadline_s:
                        process.kill()
                else:
                    return process.returncode, said

    def count(self, status: int, said: str) -> bool:
        """Count what one upkeep printed; False when it failed."""
        if status and self.stopped.is_set():
            return False
        try:
            if status:
                raise ValueError(f"exit status {status}")
            done = msgspec.json.decode(said.strip().rpartition("\n")[2].encode(), type=Done)
        except (ValueError, msgspec.MsgspecError) as error:
            self.metrics.add("lake_upkeep_failed_total")
            log.warning("upkeep of the lake failed (%s) and is tried again: %s", error, said.strip()[-500:])
            return False
        self.metrics.set("lake_files", done.files)
        self.metrics.set("lake_bytes", done.bytes)
        self.metrics.add("lake_files_compacted_total", done.files_compacted)
        self.metrics.add("lake_files_vacuumed_total", done.files_vacuumed)
        if done.archive is not None:
            self.metrics.set("archive_files", done.archive.files)
            self.metrics.set("archive_bytes", done.archive.bytes)
        if done.hours_compacted or done.hours_dropped or done.files_vacuumed:
            log.info("upkeep of the lake: %s", msgspec.json.encode(done).decode())
        return True
