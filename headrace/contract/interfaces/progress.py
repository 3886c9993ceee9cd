"""Progress of a long run. The run reports how much is done; its caller decides how to show it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """One thing at a time, counted in samples."""

    def begin(self, what: str, total: int) -> None:
        """Say what begins now and how many samples it has."""

    def done(self, count: int) -> None:
        """Say how many of them are done by now; cheap enough for every step."""

    def end(self) -> None:
        """Say that it is over. Does nothing where nothing was begun."""


class Silent:
    """Shows nothing."""

    def begin(self, what: str, total: int) -> None:
        """Show nothing."""

    def done(self, count: int) -> None:
        """Show nothing."""

    def end(self) -> None:
        """Show nothing."""
