"""Ends a process one of whose calls never returns: such a call can be seen from another thread only.

1. *named*: whatever a thread waits for is noted, with when it last went on and how long it may stand still.
2. *moved*: work that goes on inside the call, and every call that returns inside it, begins the time anew. So a big
   upload may take an hour, and one that stands still may not.
3. *look*: a thread looks every second, and counts the time that the process was awake for (`awake.py`). What stands
   still for longer than its bound ends the process with status 1, by name and with where every thread is. The
   supervisor starts it again.

A call that was given up may still take effect: what it did, the store or the log tells at the next start.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

from headrace.process.awake import Awake
from headrace.process.moved import followed, moved
from headrace.process.watchdog import end_process

T = TypeVar("T")

log = logging.getLogger("headrace.calls")

ANSWER_MAX_S = 240.0
"""Longest that a call of a log, a store or a lake may stand still: the clients give up by themselves within 45 s, and a
stage with an event loop gives a call up after 180 s (`headrace.process.waits`), in better order."""
LAKE_MAX_S = 1_800.0
"""Longest that a read of the lake may stand still: between two batches lie the table's log and a filter of all rows."""
LAKE_CALLS = ("read", "layout", "spans")
LOOK_S = 1.0
TOLD_S = 30.0
"""A call that has stood still for this long is logged, once."""


class _Wait:
    """One call that is under way."""

    def __init__(self, what: str, max_s: float, monotonic: Callable[[], float]) -> None:
        self.what, self.max_s, self._monotonic = what, max_s, monotonic
        self.since_s = monotonic()
        self.is_told = False

    def went_on(self) -> None:
        self.since_s = self._monotonic()


class CallWatch:
    """Watches the calls of one process, in whatever threads."""

    def __init__(
        self,
        monotonic: Callable[[], float] = time.monotonic,
        end: Callable[[str], None] = end_process,
        *,
        by_itself: bool = True,
    ) -> None:
        """`by_itself` False starts no thread: its owner calls `look`."""
        self.tell: Callable[[float], None] = lambda _: None
        """Is told at each look for how many seconds the call has stood still that has done so longest; 0 for none."""
        self._monotonic, self._end, self._by_itself = monotonic, end, by_itself
        self._numbers = itertools.count()
        self._waits: dict[int, _Wait] = {}
        self._looks_in = 0
        """The process whose thread looks: a fork takes no thread along."""

    @contextmanager
    def named(self, what: str, max_s: float = ANSWER_MAX_S) -> Iterator[None]:
        """Note that this thread waits for `what` while the block runs, and may stand still in it for `max_s`."""
        self._start()
        number, wait = next(self._numbers), _Wait(what, max_s, self._monotonic)
        self._waits[number] = wait
        try:
            with followed(wait.went_on):
                yield
        finally:
            del self._waits[number]
            moved()

    def wrap(self, who: str, inner: T, bounds: Mapping[str, float] | None = None) -> T:
        """Return `inner` with every method watched by its name: "`who`.`method`".

        Args:
            bounds: the bound of a method in seconds, `ANSWER_MAX_S` by default.
        """
        if inner is None or isinstance(inner, _Watched):
            return inner
        return cast("T", _Watched(self, who, inner, bounds or {}))

    def look(self, stood_s: float = 0.0) -> None:
        """End the process where a call stands still for longer than it may.

        Args:
            stood_s: for how many seconds the whole process stood still since the last look; they count for no call.
        """
        now_s = self._monotonic()
        waits = list(self._waits.values())
        if stood_s:
            for wait in waits:
                wait.since_s = min(now_s, wait.since_s + stood_s)
        # The call that was begun last is what the ones around it wait for.
        for wait in reversed(waits):
            still_s = now_s - wait.since_s
            if still_s > wait.max_s:
                self._end(
                    f"stopping: {wait.what} has not come back for {still_s:.0f} s, {wait.max_s:.0f} s are allowed. "
                    "Where everything is follows. The next start looks what took effect, and goes on from there. See "
                    "whether the store and the broker answer: `headrace status`, `headrace doctor`."
                )
                return
            if still_s > TOLD_S and not wait.is_told:
                wait.is_told = True
                log.warning("%s has not come back for %.0f s; %.0f s are allowed", wait.what, still_s, wait.max_s)
        self.tell(max((now_s - wait.since_s for wait in waits), default=0.0))

    def _start(self) -> None:
        if self._by_itself and self._looks_in != os.getpid():
            if self._looks_in:
                self._waits.clear()  # What the parent waited for, its child does not.
            self._looks_in = os.getpid()
            threading.Thread(target=self._run, name="call watch", daemon=True).start()

    def _run(self) -> None:
        awake = Awake(self._monotonic, LOOK_S)
        while True:
            time.sleep(LOOK_S)
            try:
                self.look(awake.stood_s())
            except Exception:
                # Such as no memory for a line of the log: nobody else would look again.
                log.exception("the calls could not be looked at; looking again")


class _WatchedBlock:
    """A `with` block whose beginning and end are watched; what is called inside it is watched by its own name."""

    def __init__(self, watch: CallWatch, what: str, max_s: float, block: AbstractContextManager[Any]) -> None:
        self._watch, self._what, self._max_s, self._block = watch, what, max_s, block

    def __enter__(self) -> Any:
        with self._watch.named(f"{self._what}, its beginning", self._max_s):
            return self._block.__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        with self._watch.named(f"{self._what}, its end", self._max_s):
            return self._block.__exit__(*raised)


class _Watched:
    """Passes everything on to `inner`, its methods by name."""

    def __init__(self, watch: CallWatch, who: str, inner: Any, bounds: Mapping[str, float]) -> None:
        self.__dict__.update(_watch=watch, _who=who, _inner=inner, _bounds=bounds)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name.startswith("_") or not callable(found):
            return found
        watch, what, max_s = self._watch, f"{self._who}.{name}", self._bounds.get(name, ANSWER_MAX_S)

        def call(*args: Any, **named: Any) -> Any:
            with watch.named(what, max_s):
                result = found(*args, **named)
            if isinstance(result, AbstractContextManager):
                # What it asks of the store, it asks when the block begins and when it ends.
                return _WatchedBlock(watch, what, max_s, result)
            return result

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)
