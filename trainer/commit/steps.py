"""The `steps` record is the commit of training. Nobody applies, checkpoints or publishes step n before reading it back.

Steps that follow each other are recorded as a group, in one transaction: all of them or none. While one group is learnt
the next one is recorded (`trainer.commit.ahead`), so what is recorded may be ahead of what is learnt.

Protocol:

1. The trainer becomes the writer of the topic: an earlier trainer's appends fail from then on.
2. It reads all steps after its checkpoint and redoes exactly those.
3. It appends steps n to n + k, then reads all of them back. Where the append's outcome is unknown, it opens the writer
   again, reads to the end, and appends again only those that are not there.
4. It applies them one by one. A checkpoint's `steps_offset` is that of the first step that is not applied.

Several models share the topic, each with a writer of its own: records of other models are passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec

from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.steps import Step, decode_step, encode_step
from headrace.contract.interfaces.fenced import FencedWriter
from headrace.contract.metrics import Metrics
from headrace.trainer.commit.steps_archive import StepsArchive

T = TypeVar("T")

logger = logging.getLogger("headrace.train")

# 10 s: a commit's record shows within milliseconds; a broker that restarts is back within 20 s, so two turns cover it.
_READ_BACK_S = 10.0
# 1 s: who asks for another run writes its record as soon as it is the writer.
_ASKED_S = 1.0
# 100,000: what 4,000 models write in 1 s at 25 steps/s each. The own record lies among them, or was lost.
_FOREIGN_MAX = 100_000


class StepsLog:
    """One model's steps. `offset` is the next record to read: the steps before it may still wait to be learnt. For one
    thread at a time."""

    def __init__(
        self,
        writer: FencedWriter,
        model: str,
        metrics: Metrics,
        *,
        pause: Callable[[float], None],
        archive: StepsArchive | None = None,
    ) -> None:
        self._writer, self._model, self._metrics, self._pause = writer, model, metrics, pause
        self._archive = archive
        self.offset = 0

    def recover(self, offset: int) -> list[tuple[int, Step]]:
        """Become the writer and return (offset, step) of this model's steps from `offset` on, of those too that were
        moved to the store. Raises `InvariantBroken` where some of them are nowhere."""
        self._retrying("become the writer of the steps", self._writer.open)
        return self._retrying("read the steps", lambda: self._from(offset))

    def again(self, offset: int) -> list[tuple[int, Step]]:
        """Return as `recover`, from another offset on, once this is the writer."""
        return self._retrying("read the steps", lambda: self._from(offset))

    def look(self) -> None:
        """Read what came meanwhile. Raises `InvariantBroken` where it is a step of this model, which another one wrote,
        and `Unavailable`."""
        for _, other in self._read():
            raise InvariantBroken(self._foreign(other, "no step of another one"))

    def why_fenced(self) -> str:
        """Say which roll-back made another process the writer, "" where none did or the log does not tell."""
        try:
            found = self._read(_ASKED_S)
        except (Unavailable, InvariantBroken):
            return ""
        return next((self._foreign(each, "") for _, each in found if each.branch is not None), "")

    def _from(self, offset: int) -> list[tuple[int, Step]]:
        while True:
            first, end = (offset, offset) if self._archive is None else self._archive.span(offset)
            if first > offset > 0:
                raise InvariantBroken(f"steps from offset {offset} to below {first} are not in the store, nor behind.")
            archived = [(at, record) for at, record in self._archived(offset, end) if at < end]
            self.offset = end
            try:
                return self._decoded(archived) + self._read()
            except InvariantBroken:
                # The trainer of another model moved some meanwhile.
                if self._archive is None or self._archive.span(offset)[1] == end:
                    raise

    def _archived(self, offset: int, end: int) -> Iterable[tuple[int, bytes]]:
        return self._archive.read(offset) if self._archive is not None and offset < end else ()

    def commit(self, *steps: Step) -> list[tuple[int, Step]]:
        """Return offset and step of these steps, which follow each other, when all of them were read back. Waits while
        Kafka is away; `pause` may raise to end the wait.

        Raises `InvariantBroken` when another trainer took over, or when the log holds another step of such a number.
        """
        values, known = [encode_step(step) for step in steps], True
        found: list[tuple[int, Step]] = []
        delay = 0.1
        while True:
            try:
                if not known:
                    self._writer.open()
                    self._note(self._read(), steps, found)
                    known = True
                if len(found) < len(steps):
                    self._writer.append(*values[len(found) :])
                    known = False
                    self._read_back(steps, found)
                return found
            except Unavailable as error:
                known = False
                logger.warning("step %d waits: %s", steps[min(len(found), len(steps) - 1)].step, error)
                self._pause(delay)
                delay = min(2 * delay, 5.0)

    def _read_back(self, steps: Sequence[Step], found: list[tuple[int, Step]]) -> None:
        """Read on until all steps are found. Raises `Unavailable` when nothing comes, or too much of other models."""
        begun = self.offset
        while len(found) < len(steps):
            before = self.offset
            self._note(self._read(_READ_BACK_S), steps, found)
            if self.offset == before or (self.offset - begun >= _FOREIGN_MAX and len(found) < len(steps)):
                raise Unavailable(f"step {steps[len(found)].step} was appended but not read back in {_READ_BACK_S} s.")

    def _note(self, read: list[tuple[int, Step]], steps: Sequence[Step], found: list[tuple[int, Step]]) -> None:
        """Add to `found` what was read of `steps`, which come in order and once."""
        for offset, other in read:
            step = steps[len(found)] if len(found) < len(steps) else None
            if other != step:
                wanted = f"step {step.step} of run {step.run}" if step else "nothing more"
                raise InvariantBroken(self._foreign(other, wanted))
            found.append((offset, other))

    @staticmethod
    def _foreign(other: Step, expected: str) -> str:
        if other.branch is not None:
            return (
                f"somebody asked for another run, {other.run}: {other.branch.words}. This trainer stops; the "
                f"supervisor starts it anew, and it goes on as run {other.run}."
            )
        return (
            f"the steps log holds step {other.step} of run {other.run} where {expected} was expected: another "
            "trainer is at work. This one stops; the supervisor starts it anew."
        )

    def _read(self, wait_s: float = 0.0) -> list[tuple[int, Step]]:
        records = self._writer.read(self.offset, wait_s)
        if records:
            self.offset = records[-1][0] + 1
        return self._decoded(records)

    def _decoded(self, records: list[tuple[int, bytes]]) -> list[tuple[int, Step]]:
        found = []
        for offset, value in records:
            try:
                step = decode_step(value)
            except msgspec.DecodeError as error:
                # Where it was a step of this model, the next one's number shows the hole.
                logger.error("record %d of the steps is no step and is passed over: %s", offset, error)
                self._metrics.add("records_unreadable_total", topic="steps", kind="foreign")
                continue
            if step.model == self._model:
                found.append((offset, step))
        return found

    def _retrying(self, what: str, attempt: Callable[[], T]) -> T:
        delay = 0.1
        while True:
            try:
                return attempt()
            except Unavailable as error:
                logger.warning("cannot %s yet: %s", what, error)
                self._pause(delay)
                delay = min(2 * delay, 5.0)
