"""A stage's calls to what lies outside its process, and its other waits: each has a name and a bound.

1. *call*: blocking work runs in a thread of its own, which never keeps a stopping process alive.
2. *named*: whatever the stage waits for is noted, with when it began and how long it may take.
3. *moved*: work that goes on inside a call begins its time anew (`moved.py`): the bound is on how long it stands still,
   not on its length. A load of hours that goes on is let be; a read that never returns is not.
4. *check*: every tick of the stage looks at what is noted, and counts the time that the process was awake for
   (`awake.py`). What stands still for longer than its bound stops the stage, by name.

A call that was given up may still take effect: what it did, the store or the log tells at the next start, and the
process that follows looks there first.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from headrace.contract.errors import Unavailable
from headrace.contract.interfaces.clock import Clock
from headrace.process.awake import Awake
from headrace.process.moved import followed

T = TypeVar("T")

CALL_MAX_S = 180.0
"""Longest call of the store or the lake: a store that is away is asked for 45 s, and the largest commit takes 40 s;
twice their sum, with room."""
LOAD_MAX_S = 1_800.0
"""Longest that a restore of a state may stand still: its parts are fetched by calls of their own, and between two of
them lies work of this process alone."""
RECEIPT_MAX_S = 330.0
"""Longest wait for receipts, or for room in the producer's queue: Kafka's client gives a record up after 300 s."""


class _Wait:
    """One thing that is waited for, and when it last went on, in time awake."""

    def __init__(self, what: str, max_s: float, monotonic: Callable[[], float]) -> None:
        self.what, self.max_s, self._monotonic = what, max_s, monotonic
        self.since_s = monotonic()

    def went_on(self) -> None:
        """Begin the time anew. From any thread."""
        self.since_s = self._monotonic()


class Waits:
    """What a stage waits for now. For one event loop, which checks every few ms, and the threads of its calls."""

    def __init__(self, clock: Clock) -> None:
        self._awake = Awake(clock.monotonic)
        self._numbers = itertools.count()
        self._running: dict[int, _Wait] = {}

    @contextmanager
    def named(self, what: str, max_s: float = CALL_MAX_S) -> Iterator[_Wait]:
        """Note that the stage waits for `what` while the block runs, for at most `max_s` seconds."""
        number, wait = next(self._numbers), _Wait(what, max_s, self._awake.monotonic)
        self._running[number] = wait
        try:
            yield wait
        finally:
            del self._running[number]

    async def call(self, what: str, work: Callable[[], T], max_s: float = CALL_MAX_S) -> T:
        """Return what `work` returns, or raise what it raises; it runs in another thread, and may stand still there for
        `max_s` seconds."""
        with self.named(what, max_s) as wait:

            def watched() -> T:
                with followed(wait.went_on):
                    return work()

            return await in_thread(what, watched)

    def check(self) -> None:
        """Raise `Unavailable` where something takes longer than it may; the stage stops then."""
        now_s = self._awake.monotonic()
        for wait in list(self._running.values()):
            still_s = now_s - wait.since_s
            if still_s > wait.max_s:
                raise Unavailable(
                    f"{wait.what}: no answer in {still_s:.0f} s, {wait.max_s:.0f} s are allowed. The stage stops, and "
                    "the next start looks whether it took effect. See whether the store and the broker answer."
                )


async def in_thread(what: str, work: Callable[[], T]) -> T:
    """Run `work` in a daemon thread: one that never returns holds neither the event loop nor the process's end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = work()
        except StopIteration as error:
            # A future cannot hold it.
            failure = RuntimeError(f"{what}: {error!r}")
        except BaseException as error:
            failure = error
        # A loop that was closed meanwhile wants no answer any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name=what, daemon=True).start()
    return await done
