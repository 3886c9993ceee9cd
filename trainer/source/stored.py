"""Stored rows: one version of the lake in total order, by event time or as they were known, ties by partition, offset
and rank."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import pyarrow as pa

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.steps import StepRange
from headrace.contract.interfaces.lake import LakeReader, LakeState
from headrace.trainer.source.batch import conform, of_tasks
from headrace.trainer.source.judged import Judge, with_judged

StoredOrder = Literal["event_time", "position"]
"""`Recipe.stored_order`."""
PLACE = ["partition", "offset", "rank"]


def stored_order(rows: pa.Table, tasks: tuple[str, ...], by: StoredOrder = "event_time") -> pa.Table:
    """Return the rows of these tasks in total order.

    By `position` each partition's rows follow one another as they did in the log. Those of several partitions go by the
    newest event time among a partition's rows up to there, which is about when they were known.
    """
    ours = of_tasks(rows, tasks)
    if by == "event_time":
        return ours.sort_by([(name, "ascending") for name in ("event_time_ms", *PLACE)])
    ours = ours.sort_by([(name, "ascending") for name in PLACE])
    partition_N, reached_N = ours["partition"].to_numpy(), ours["event_time_ms"].to_numpy().copy()
    for begin, end in itertools.pairwise([0, *(np.flatnonzero(np.diff(partition_N)) + 1), len(partition_N)]):
        np.maximum.accumulate(reached_N[begin:end], out=reached_N[begin:end])
    return ours.take(pa.array(np.argsort(reached_N, kind="stable")))


class StoredRows:
    """The rows of these tasks in one version of the lake, and how many of them were taken.

    Args:
        lake: None where there is none; then nothing can be opened.
        holder: under which name versions are leased.
        judge: gives what proposed ranges say of their rows.
    """

    def __init__(
        self,
        lake: LakeReader | None,
        schema: pa.Schema,
        tasks: tuple[str, ...],
        holder: str,
        *,
        order: StoredOrder = "event_time",
        judge: Judge | None = None,
    ) -> None:
        self._order = order
        self._judge = judge
        self._lake, self._schema, self._tasks, self._holder = lake, schema, tasks, holder
        self._rows: pa.Table = schema.empty_table()
        self.state: LakeState | None = None
        """What the version opened last holds, so where the topic goes on. `open` reads it: leaving asks nobody."""
        self.version = -1
        """-1 while no version is open."""
        self.taken = 0

    @property
    def is_open(self) -> bool:
        """True from `open` of a version that has rows of these tasks until `close`."""
        return self.version >= 0

    @property
    def rows(self) -> int:
        """How many rows the version has."""
        return int(self._rows.num_rows)

    @property
    def left(self) -> int:
        """How many of them are not taken yet."""
        return self.rows - self.taken

    def open(self, version: int, *, taken: int = 0) -> None:
        """Lease the version and read it. A version without a row of these tasks is closed at once.

        The lease keeps the version's files from a vacuum until a checkpoint names the version.
        """
        if self._lake is None:
            raise InvariantBroken(f"the run is at version {version} of a lake, and no lake is given.")
        self._lake.hold(version, self._holder)
        state = self._lake.state(version)
        if state is None:
            raise InvariantBroken(f"version {version} of the lake is gone; was the store emptied?")
        rows, self.state = (
            stored_order(conform(self._lake.read(version), self._schema), self._tasks, self._order),
            state,
        )
        if not rows.num_rows:
            self.release()
            return
        self._rows, self.version, self.taken = rows, version, taken

    def release(self) -> None:
        """Give the lease back; rows that were read stay."""
        if self._lake is not None:
            self._lake.let_go(self._holder)

    def close(self) -> None:
        """Forget the rows."""
        self._rows, self.version, self.taken = self._schema.empty_table(), -1, 0

    def propose(self, rows_max: int) -> StepRange:
        """Return the next rows, `rows_max` at most, as a range."""
        stop = self.taken + min(self.left, rows_max)
        proposed = StepRange(kind="stored", version=self.version, start=self.taken, stop=stop, rows=stop - self.taken)
        if self._judge is None:
            return proposed
        rows = self._rows.slice(self.taken, stop - self.taken).to_batches()
        return with_judged([proposed], [rows], self._judge)[0]

    def check(self, wanted: StepRange) -> None:
        """Raise `InvariantBroken` when the range does not begin at the next row."""
        if wanted.version != self.version or wanted.start != self.taken:
            raise InvariantBroken(
                f"a recorded step takes lake rows {wanted.start}..{wanted.stop} of version {wanted.version}; this run "
                f"is at row {self.taken} of version {self.version}."
            )

    def take(self, wanted: StepRange) -> pa.Table:
        """Give out the rows of the next range."""
        self.check(wanted)
        self.taken = wanted.stop
        return self._rows.slice(wanted.start, wanted.stop - wanted.start)
