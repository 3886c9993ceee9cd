"""Says again and again that the gateway reads: while it holds too much, it reads from nobody, and says nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from headrace.ingest.gateway.admission import Admission

LOOK_S = 0.5


class ReadingWatch:
    """A companion of the gateway; calls `reads` at every look at which the gateway reads."""

    def __init__(self, reads: Callable[[], None]) -> None:
        self._reads = reads

    async def run(self, admission: Admission, stopping: asyncio.Event) -> None:
        """Look until `stopping`."""
        while not stopping.is_set():
            if admission.is_open():
                self._reads()
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), LOOK_S)
