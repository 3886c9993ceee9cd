"""Upkeep of the lake on a schedule: beside the sink, in a process of its own each time.

Every `lake.compact_ms` the sink starts `headrace lake upkeep`, at low priority, and every `lake.vacuum_ms` has it
vacuum too. Its memory and its threads are not the sink's, and its death is none of the sink's business: what it did
not finish, the next one does. A sink that is killed leaves one that ends within a run.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

import msgspec

from headrace.backends.lake.upkeep import Done
from headrace.backends.metrics_prometheus import PrometheusMetrics
from headrace.cli.runtime import Runtime

log = logging.getLogger("headrace.lake")

# 30 min: one upkeep rewrites at most what came since the last, and first of all a backlog of days.
RUN_S_MAX = 1_800.0


class Schedule(threading.Thread):
    """Starts upkeeps until `stop`, one at a time."""

    def __init__(self, runtime: Runtime, metrics: PrometheusMetrics, stop: threading.Event) -> None:
        super().__init__(name="lake-upkeep", daemon=True)
        self.runtime, self.metrics, self.stopped = runtime, metrics, stop

    def run(self) -> None:
        """Wait, look after the lake, and again."""
        lake, clock = self.runtime.config.lake, self.runtime.clock
        if not lake.compact_ms:
            return
        vacuum_s = clock.monotonic() + lake.vacuum_ms / 1000
        while not self.stopped.wait(lake.compact_ms / 1000):
            with_vacuum = clock.monotonic() >= vacuum_s
            if self._once(with_vacuum) and with_vacuum:
                vacuum_s = clock.monotonic() + lake.vacuum_ms / 1000

    def _once(self, with_vacuum: bool) -> bool:
        with subprocess.Popen(
            self.command(with_vacuum), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            deadline_s = self.runtime.clock.monotonic() + RUN_S_MAX
            while process.poll() is None:
                if self.stopped.wait(0.2) or self.runtime.clock.monotonic() > deadline_s:
                    process.kill()
            said = process.stdout.read() if process.stdout is not None else ""
        return self.count(process.returncode, said)

    def command(self, with_vacuum: bool) -> list[str]:
        """Return the command line of one upkeep."""
        at = self.runtime
        words = ["--project", str(at.project_dir), "--brokers", at.brokers, "--store", at.store, "--home", str(at.home)]
        words += ["--webhdfs", at.webhdfs] if at.webhdfs else []
        words += ["--port-base", str(at.port_base)] if at.port_base is not None else []
        words += [] if with_vacuum else ["--no-vacuum"]
        return [sys.executable, "-m", "headrace.cli.main", "lake", "upkeep", "--json", *words]

    def count(self, status: int, said: str) -> bool:
        """Count what one upkeep told; False when it failed."""
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
        if done.hours_compacted or done.hours_dropped or done.files_vacuumed:
            log.info("upkeep of the lake: %s", msgspec.json.encode(done).decode())
        return True
