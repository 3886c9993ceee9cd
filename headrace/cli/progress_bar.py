"""How far a long run is, for people: a bar with the time that is left on a terminal, log lines with it elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

from headrace.contract.interfaces.progress import Progress as Shown

LINE_S = 5.0
"""Time between two lines."""


def show_progress(logger: logging.Logger, stream: TextIO | None = None) -> Shown:
    """Return a bar where `stream` (the standard error) is a terminal, else lines of `logger`."""
    stream = stream or sys.stderr
    return Bar(stream) if stream.isatty() else Lines(logger)


class Bar:
    """A line that is drawn over and over. Log lines go above it while it is there."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._moved: list[logging.StreamHandler[TextIO]] = []

    def begin(self, what: str, total: int) -> None:
        """Draw an empty bar."""
        self.end()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("samples"))
        rate = TextColumn("{task.fields[rate]}")
        times = (TimeElapsedColumn(), TextColumn("left:"), Remaining())
        self._bar = Progress(*columns, rate, *times, console=Console(file=self._stream), refresh_per_second=4)
        self._task = self._bar.add_task(what, total=total, rate="")
        self._bar.start()
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._stream:
                # While the bar is drawn, sys.stderr is a proxy that writes above it.
                handler.setStream(sys.stderr)
                self._moved.append(handler)

    def done(self, count: int) -> None:
        """Draw the bar as far as this."""
        if self._bar is not None:
            speed = self._bar.tasks[0].speed
            self._bar.update(self._task, completed=count, rate=f"{speed:,.0f}/s" if speed else "")

    def end(self) -> None:
        """Leave the bar as it is now, and a new line."""
        if self._bar is not None:
            for handler in self._moved:
                handler.setStream(self._stream)
            self._bar.stop()
            self._bar, self._moved = None, []


class Lines:
    """A line every few seconds, and one at the end."""

    def __init__(self, logger: logging.Logger, now: Callable[[], float] = time.monotonic) -> None:
        self._logger, self._now = logger, now
        self._what, self._total, self._count = "", 0, 0
        self._began = self._said = 0.0

    def begin(self, what: str, total: int) -> None:
        """Say what begins."""
        self.end()
        self._what, self._total, self._count = what, total, 0
        self._began = self._said = self._now()
        self._logger.info("%s: %s samples", what, f"{total:,}")

    def done(self, count: int) -> None:
        """Say how far it is, if the last line is old enough."""
        self._count = count
        now = self._now()
        if not self._what or now - self._said < LINE_S or not count:
            return
        self._said = now
        rate = count / (now - self._began)
        self._logger.info(
            "%s: %s of %s samples, %.0f %%, %s/s, %s left",
            *(self._what, f"{count:,}", f"{self._total:,}", 100 * count / max(self._total, 1), f"{rate:,.0f}"),
            duration((self._total - count) / rate),
        )

    def end(self) -> None:
        """Say how long it took."""
        if self._what:
            took = duration(self._now() - self._began)
            self._logger.info("%s: done, %s samples in %s", self._what, f"{self._count:,}", took)
        self._what = ""


def duration(seconds: float) -> str:
    """Return a time as people say it.

    >>> duration(7.4), duration(150), duration(7_260)
    ('7 s', '2 min 30 s', '2 h 1 min')
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3_600} h {whole % 3_600 // 60} min"
