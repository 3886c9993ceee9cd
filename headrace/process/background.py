"""Background threads and tasks whose every exception reaches their stage.

Python tells nobody when a thread or a task dies of an exception: what it did is just not done any more. So they are
started here, and the stage asks `check` in its own loop. Where they are started otherwise, a list in
tests/tidy/test_background.py says what happens when one dies.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger("headrace.background")


class Background:
    """What runs beside a stage's main work. Safe between threads."""

    def __init__(self, failed: Callable[[], None] = lambda: None) -> None:
        """`failed` is called, in whatever thread, when the first failure is known."""
        self._failed = failed
        self.failure: BaseException | None = None
        """The first one."""

    def check(self) -> None:
        """Raise what a thread or a task died of, if one did."""
        if self.failure is not None:
            raise self.failure

    def thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Start a daemon thread that does `work`."""

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._note(name, error)

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def task(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task of the running loop that does `work`; it ends without an exception. Cancelling it is none."""

        async def guarded() -> None:
            try:
                await work
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                self._note(name, error)

        return asyncio.get_running_loop().create_task(guarded(), name=name)

    def _note(self, name: str, error: BaseException) -> None:
        log.error("%s failed: %s: %s", name, type(error).__name__, error)
        self.failure = self.failure or error
        self._failed()
