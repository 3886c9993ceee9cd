"""What each model run took, added up from its steps: ranges, rows, and the sum of their ids' hashes. Pure.

A run's live ranges of a partition follow one another without a gap, and its stored ranges too. A run of which that is
not true, or with a step without a seal, is `irregular`: its samples are to be looked at one by one. A run that goes on
from another one begins with that one's totals as they were there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.seals import SUM_MASK, Seal
from headrace.contract.formats.steps import Branch, PassedOver, Step, StepRange

Pair = tuple[int, int]


class RunTotals(msgspec.Struct, kw_only=True):
    """One run, up to its last step."""

    model: str
    run: str
    recipe: str = ""
    steps: int = 0
    number: int = 0
    """Of the last step."""
    rows: int = 0
    sum: int = 0
    refused: int = 0
    left_out: int = 0
    stored: dict[int, int] = {}
    """By version of the lake: how many of its rows were taken, from the first on."""
    live: dict[int, tuple[Pair, Pair]] = {}
    """By partition: after which position, and up to which."""
    took_live: Seal | None = None
    """The seal of the rows of live ranges; None in what was kept before it was added up."""
    positions: dict[str, list[int]] = {}
    """Of the last step."""
    passed_over: list[PassedOver] = []
    """What it left out by name."""
    irregular: str = ""
    last: Step | None = None

    @property
    def seal(self) -> Seal:
        """The seal of all rows that it took."""
        return Seal(self.rows, self.sum)

    def begin(self, partition: int) -> Position:
        """Return the position behind which the run began with a partition."""
        return START if self.stored or partition not in self.live else Position(*self.live[partition][0])

    def upto(self) -> dict[int, Position]:
        """Return up to where the run contains everything, by partition."""
        return {int(p): Position(*position) for p, position in self.positions.items()}

    def take(self, step: Step) -> None:
        """Add the run's next step; the same one once more changes nothing."""
        if step == self.last:
            return
        if not self.steps:
            self.took_live = Seal()
        if step.branch is not None:
            self._begin(step, step.branch)
            return
        if step.step != self.number + 1:
            self.irregular = self.irregular or f"step {step.step} follows step {self.number}"
        for each in step.ranges:
            if each.sum is None:
                self.irregular = self.irregular or f"step {step.step} has no seal"
                continue
            self.rows += each.rows
            self.sum = (self.sum + each.sum) & SUM_MASK
            self.refused += each.refused
            self.left_out += each.left_out
            if each.kind == "live":
                self._take_live(each, step.step)
            else:
                self._take_stored(each, step.step)
        self.steps, self.number, self.positions, self.last = self.steps + 1, step.step, step.positions, step

    def _begin(self, first: Step, branch: Branch) -> None:
        """Take the first record of the run, which follows what was added of the run that it goes on from."""
        if first.step != self.number:
            self.irregular = self.irregular or f"the run goes on behind step {first.step}, not {self.number}"
        for each in sorted(branch.passed_over, key=lambda each: each.after):
            self.passed_over.append(each)
            if each.partition in self.live or tuple(self.positions.get(str(each.partition), START)) == each.after:
                begin, upto = self.live.get(each.partition, (each.after, each.after))
                self.live[each.partition] = begin, self._behind(each.partition, upto)
        self.positions, self.last = first.positions or self.positions, first

    def _behind(self, partition: int, at: Pair) -> Pair:
        """Return where a run goes on that has come to a position: behind what it left out by name there."""
        for each in self.passed_over:
            if each.partition == partition and each.after == at:
                at = each.upto
        return at

    def _take_live(self, each: StepRange, number: int) -> None:
        if self.took_live is not None:
            self.took_live = self.took_live.plus(Seal(each.rows, each.sum or 0))
        known = self.live.get(each.partition)
        if known is None:
            self.live[each.partition] = each.after, self._behind(each.partition, each.upto)
            return
        if known[1] != each.after:
            self.irregular = self.irregular or (
                f"step {number} goes on in partition {each.partition} after {each.after}, not after {known[1]}"
            )
        self.live[each.partition] = known[0], self._behind(each.partition, max(known[1], each.upto))

    def _take_stored(self, each: StepRange, number: int) -> None:
        taken = self.stored.get(each.version, 0)
        if each.start != taken or (taken == 0 and self.stored):
            self.irregular = self.irregular or (
                f"step {number} takes rows {each.start} to {each.stop} of version {each.version} after {taken}"
            )
        self.stored[each.version] = max(taken, each.stop)


def add_steps(runs: dict[str, RunTotals], steps: Iterable[Step], before: Callable[[Step], Iterable[Step]]) -> None:
    """Add steps to the runs that they are of, in the topic's order; the run of the newest step comes last.

    Args:
        before: gives, for the first record of a run that goes on from another one, the steps that come before it.
    """
    newest = next(reversed(runs), None)
    for step in steps:
        run = runs.get(step.run)
        if run is None:
            run = runs[step.run] = RunTotals(model=step.model, run=step.run, recipe=step.recipe)
            for each in before(step) if step.branch is not None and step.branch.run else ():
                run.take(each)
        elif step.run != newest:
            runs[step.run] = runs.pop(step.run)
        newest = step.run
        run.take(step)
