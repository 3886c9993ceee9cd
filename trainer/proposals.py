"""What the next steps could take: batches of what was read, as steps of one run, each behind the one before it.

A batch is proposed when it is full, or when its first row has waited `wait_ms`. What was proposed and never recorded
dies with the process: the next one proposes those rows again.
"""

from __future__ import annotations

from contextlib import suppress

from headrace.contract.errors import Unavailable
from headrace.contract.formats.steps import Step
from headrace.trainer.dependencies import Dependencies
from headrace.trainer.source.source import Source


class Proposals:
    """One run's proposals. `begin` once, then `next` and `full` in any order. For the training thread."""

    def __init__(self, deps: Dependencies, source: Source, recipe: str) -> None:
        """`recipe` is the digest of recipe and spec."""
        self._deps, self._source, self._recipe = deps, source, recipe
        self._rows_max = deps.project.recipe.batch_rows
        self._run, self._step = "", 0
        self._waiting_since = -1.0

    def begin(self, run: str, step: int) -> None:
        """Go on behind this step of this run, up to which the source was taken."""
        self._run, self._step = run, step

    def next(self) -> Step | None:
        """Return the next batch when it is due, after reading on where it is not full; else None. Raises as
        `Source.poll`."""
        rows_max, now = self._rows_max, self._deps.clock.monotonic()
        ready = self._source.ready_rows()
        # The lake alone may fill every step: live samples are looked for all the same.
        if ready < rows_max or self._source.is_mixed:
            waited = now - self._waiting_since if self._waiting_since >= 0 else 0.0
            left = self._deps.config.wait_ms / 1000 - waited
            # 5 ms: rows that come while others wait are joined without spinning.
            self._source.poll(max(min(left, 0.005), 0.0) if ready else 0.05)
            ready = self._source.ready_rows()
            if ready and self._waiting_since < 0:
                self._waiting_since = now
            if not ready or (ready < rows_max and now - self._waiting_since < self._deps.config.wait_ms / 1000):
                return None
        self._waiting_since = -1.0
        return self._proposed()

    def full(self, steps_max: int) -> list[Step]:
        """Return the full batches that wait behind what was proposed, so many at most."""
        if steps_max and self._source.ready_rows() < self._rows_max:
            with suppress(Unavailable):  # What is recorded need not wait for it; `next` raises it.
                self._source.poll(0)
        steps: list[Step] = []
        while len(steps) < steps_max and self._source.ready_rows() >= self._rows_max and (step := self._proposed()):
            steps.append(step)
        return steps

    def _proposed(self) -> Step | None:
        project, ranges = self._deps.project, self._source.propose(self._rows_max)
        if not ranges:
            return None
        self._step += 1
        return Step(
            model=project.model,
            run=self._run,
            step=self._step,
            ranges=ranges,
            positions=self._source.positions_after(ranges).to_json(),
            recipe=self._recipe,
            seed=project.recipe.seed,
            samples_id=self._deps.samples_id,
        )
