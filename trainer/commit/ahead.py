"""Steps that are recorded before those in front of them are learnt: a group of them while others are learnt.

1. *commit*: where nothing is recorded, one step is recorded at once, by the training thread: a lone step waits for no
   group and no thread.
2. *begin*: the steps behind it are recorded in one transaction, in a thread of their own, while it is learnt.
3. *next* gives out step after step, each after its record was read back. Where all that were read back are learnt, it
   waits for the group.

A group that could not be recorded, or of which that is not known, is followed by nothing: the process ends, and the
next one redoes exactly what was recorded.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.steps import Step
from headrace.process.background import Background
from headrace.process.moved import moved
from headrace.trainer.bounds import Stopped
from headrace.trainer.commit.steps import StepsLog

GROUP_S = 0.1
"""About how long the steps of a group may take to learn. Rows that come meanwhile wait for them, also those of another
partition, which a step of now would take along. A transaction takes a tenth of it, so nobody waits for one."""
# 200 ms: how late a trainer that waits for a group sees that it was asked to stop.
_LOOK_S = 0.2


class StepsAhead:
    """One model's steps between their proposal and their learning. For the training thread."""

    def __init__(
        self,
        log: StepsLog,
        *,
        steps_max: int,
        background: bool = True,
        look: Callable[[], None] = lambda: None,
        words: Callable[[InvariantBroken], str] = str,
    ) -> None:
        """Record nothing yet.

        Args:
            steps_max: of a group; 0 records each step by itself, once the one before it is learnt.
            background: record groups in a thread; without it `begin` returns when the group is recorded.
            look: is called several times a second while `next` waits, and may raise to end the wait.
            words: say why a step could not be recorded, in the thread that records it.
        """
        self._log, self._background, self._look, self._words = log, background, look, words
        self.steps_max = steps_max
        self._step_s = 0.0
        """About how long a step takes to learn."""
        self._recorded: deque[tuple[int, Step]] = deque()
        self._group: tuple[Step, ...] = ()
        """What is being recorded."""
        self._found: list[tuple[int, Step]] = []
        """The group, once it was read back."""
        self._writer: threading.Thread | None = None
        self._threads = Background()

    @property
    def is_empty(self) -> bool:
        """True where nothing is recorded that was not given out, and nothing is being recorded."""
        return not self._recorded and not self._group

    def room(self) -> int:
        """Return how many steps a group may have that begins now: 0 while another is being recorded. Raises what
        recording that one raised."""
        self._collect()
        if self._group:
            return 0
        return min(self.steps_max, 1 + int(GROUP_S / max(self._step_s, 1e-6)))

    def took(self, seconds: float) -> None:
        """Note how long a step took to learn."""
        self._step_s += (seconds - self._step_s) / 4

    def commit(self, step: Step) -> None:
        """Record a step, where there is none before it, and return when it was read back. Raises as
        `StepsLog.commit`."""
        self._group = (step,)
        self._record()
        self._collect()

    def begin(self, steps: Sequence[Step]) -> None:
        """Begin to record a group, for which there is `room`; nothing happens without steps."""
        if not steps:
            return
        self._group = tuple(steps)
        if self._background:
            self._writer = self._threads.thread("recording steps", self._record_beside)
        else:
            self._record()

    def next(self) -> tuple[int, Step] | None:
        """Return the next recorded step, with its record's offset; None where there is none. Raises what recording it
        raised."""
        self._collect()
        while self._group and not self._recorded:
            if self._writer is not None:
                self._writer.join(_LOOK_S)
            # The calls of the log are watched where they run.
            moved()
            self._look()
            self._collect()
        return self._recorded.popleft() if self._recorded else None

    def close(self, timeout_s: float) -> None:
        """Wait for the group that is being recorded, at most `timeout_s`: the next process learns it."""
        if self._writer is not None:
            self._writer.join(timeout_s)

    def _record(self) -> None:
        try:
            self._found = self._log.commit(*self._group)
        except InvariantBroken as error:
            raise InvariantBroken(self._words(error)) from error

    def _record_beside(self) -> None:
        with suppress(Stopped):  # Who waits for the group is told by `look`.
            self._record()

    def _collect(self) -> None:
        """Take over what was read back."""
        if self._writer is not None and self._writer.is_alive():
            return
        self._threads.check()
        if self._group and not self._found:
            self._look()
            first, last = self._group[0].step, self._group[-1].step
            raise InvariantBroken(
                f"steps {first} to {last} may be recorded and were not learnt; this process must end."
            )
        self._recorded.extend(self._found)
        self._group, self._found, self._writer = (), [], None
