"""Stored rows: one version of the lake in total order, read ahead of training piece by piece."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Waited

import pyarrow as pa

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.steps import StepRange
from headrace.contract.interfaces.lake import LakeReader, LakeState
from headrace.process.moved import moved
from headrace.trainer.source.batch import of_tasks
from headrace.trainer.source.columns import StoredColumns
from headrace.trainer.source.judged import Judge, with_judged
from headrace.trainer.source.pieces import Pieces, StoredOrder, rank_order

LAKE_BYTES = 1 << 30
"""`train.lake_bytes` where nothing is set."""
_LOOK_S = 5.0


def stored_order(rows: pa.Table, tasks: tuple[str, ...], by: StoredOrder = "event_time") -> pa.Table:
    """Return the rows of these tasks in total order: `rank_order`."""
    ours = of_tasks(rows, tasks)
    return ours.take(pa.array(rank_order(ours, by)))


class StoredRows:
    """The rows of these tasks in one version of the lake, and how many of them were taken.

    Args:
        lake: None where there is none; then nothing can be opened.
        columns: what is read of a row.
        holder: under which name versions are leased.
        judge: gives what proposed ranges say of their rows.
        bytes_max: about how much memory the rows may take.
        background: read the next piece while one is learnt, in a thread.
    """

    def __init__(
        self,
        lake: LakeReader | None,
        columns: StoredColumns,
        tasks: tuple[str, ...],
        holder: str,
        *,
        order: StoredOrder = "event_time",
        judge: Judge | None = None,
        bytes_max: int = LAKE_BYTES,
        background: bool = False,
    ) -> None:
        self._order = order
        self._judge = judge
        self._lake, self._columns, self._tasks, self._holder = lake, columns, tasks, holder
        self._bytes_max, self._background = bytes_max, background
        self._pieces: Pieces | None = None
        self._ahead: Future[tuple[pa.Table, int]] | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._rows: deque[pa.Table] = deque()
        """What was read and not taken, in order."""
        self._ends: deque[tuple[int, int]] = deque()
        """Times up to which all is given, and after how many rows; the first is at or before what was taken."""
        self.read = 0
        """How many rows were read ahead or taken."""
        self.state: LakeState | None = None
        """What the version opened last holds, so where the topic goes on. `open` reads it: leaving asks nobody."""
        self.version = -1
        """-1 while no version is open."""
        self.taken = self.proposed = 0
        """How many rows were given out, and how many were proposed: never less."""

    @property
    def is_open(self) -> bool:
        """True from `open` of a version that has rows of these tasks until `close`."""
        return self.version >= 0

    @property
    def rows(self) -> int:
        """How many rows the version has, of all tasks."""
        return 0 if self._pieces is None else self._pieces.rows

    @property
    def ready(self) -> int:
        """How many rows can be proposed now."""
        return self.read - self.proposed

    @property
    def is_done(self) -> bool:
        """True once every row is taken."""
        return self.is_open and self.read == self.taken and self._is_all_read

    @property
    def is_all_proposed(self) -> bool:
        """True once every row is proposed, or taken."""
        return self.is_open and self.read == self.proposed and self._is_all_read

    @property
    def place(self) -> tuple[int, int]:
        """Return a time up to which all is taken, and how many rows that is: where `open` can go on."""
        return self._ends[0] if self.is_open else (0, 0)

    @property
    def _is_all_read(self) -> bool:
        return self._pieces is not None and self._pieces.is_done and self._ahead is None

    def open(self, version: int, *, taken: int = 0, place: tuple[int, int] = (0, 0)) -> None:
        """Lease the version and go on behind the first `taken` rows; `place` is as the property said then. A version
        without a row of these tasks is closed at once.

        The lease keeps the version's files from a vacuum until a checkpoint names the version.
        """
        if self._lake is None:
            raise InvariantBroken(f"the run is at version {version} of a lake, and no lake is given.")
        self._lake.hold(version, self._holder)
        state = self._lake.state(version)
        if state is None:
            raise InvariantBroken(
                f"version {version} of the lake is gone; was the store emptied? If it is gone for good, "
                "`headrace train repair` begins a new run with what the lake holds."
            )
        from_ms, before = place
        self._pieces = Pieces(
            *(self._lake, version, self._columns, self._tasks, self._order), bytes_max=self._bytes_max, from_ms=from_ms
        )
        self._rows.clear()
        self._ends = deque([place])
        self.state, self.version, self.taken, self.read = state, version, before, before
        self.proposed = before
        while self.taken < taken and not self._is_all_read:
            self.read_ahead(1)
            self._drop(min(self.ready, taken - self.taken))
        self.read_ahead(1)
        if self.is_done and not self.taken:
            self.release()
            self.close()

    def release(self) -> None:
        """Give the lease back; rows that were read stay."""
        if self._lake is not None:
            self._lake.let_go(self._holder)

    def close(self) -> None:
        """Forget the rows."""
        if self._reader is not None:
            self._reader.shutdown(wait=False, cancel_futures=True)
        self._reader, self._ahead, self._pieces = None, None, None
        self._rows.clear()
        self.version, self.taken, self.proposed, self.read = -1, 0, 0, 0

    def read_ahead(self, rows: int, *, waits: bool = True) -> None:
        """Read until so many rows are ready, or all are read. Raises what the lake raises; the next call goes on.

        Without `waits`, what a thread reads ahead is taken when it is there.
        """
        while self.ready < rows and not self._is_all_read:
            if not waits and not self._is_there():
                return
            table, end_ms = self._next()
            if table.num_rows:
                self._rows.append(table)
                self.read += table.num_rows
            if end_ms >= 0:
                self._ends.append((end_ms, self.read))
        self._forget_ends()

    def _is_there(self) -> bool:
        """Say whether the next piece can be taken without waiting for the lake; where not, it is being read."""
        if not self._background:
            return True
        if self._ahead is None:
            self._submit()
        return self._ahead is None or self._ahead.done()

    def _submit(self) -> None:
        assert self._pieces is not None
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "lake-ahead")
        self._ahead = self._reader.submit(self._pieces.next)

    def _next(self) -> tuple[pa.Table, int]:
        """Return the next piece, and let the one after it be read meanwhile."""
        assert self._pieces is not None
        ahead, self._ahead = self._ahead, None
        piece = self._pieces.next() if ahead is None else _result(ahead)
        if self._background and not self._pieces.is_done:
            self._submit()
        return piece

    def propose(self, rows_max: int) -> StepRange:
        """Return the next rows of those that are ready, `rows_max` at most, as a range: they are not proposed again."""
        start, stop = self.proposed, self.proposed + min(self.ready, rows_max)
        self.proposed = stop
        proposed = StepRange(kind="stored", version=self.version, start=start, stop=stop, rows=stop - start)
        if self._judge is None:
            return proposed
        return with_judged([proposed], [self._first(stop - start, start - self.taken).to_batches()], self._judge)[0]

    def check(self, wanted: StepRange) -> None:
        """Raise `InvariantBroken` when the range does not begin at the next row, or the version ends before it does."""
        if wanted.version != self.version or wanted.start != self.taken:
            raise InvariantBroken(
                f"a recorded step takes lake rows {wanted.start}..{wanted.stop} of version {wanted.version}; this run "
                f"is at row {self.taken} of version {self.version}. `headrace train repair --begin lake` begins anew."
            )

    def has(self, wanted: StepRange) -> bool:
        """Say whether the range's rows are read: also where the version ends before them. Raises as `check`."""
        self.check(wanted)
        return self.read >= wanted.stop or self._is_all_read

    def take(self, wanted: StepRange) -> pa.Table:
        """Give out the rows of the next range."""
        self.check(wanted)
        rows = self._first(wanted.stop - wanted.start)
        self._drop(rows.num_rows)
        self._forget_ends()
        return rows

    def _first(self, count: int, skipped: int = 0) -> pa.Table:
        """Return the first rows of those that were read and not taken, behind the `skipped` ones."""
        found, left = [], count
        for table in self._rows:
            here = max(0, min(left, table.num_rows - skipped))
            if here:
                found.append(table.slice(skipped, here))
            skipped, left = max(0, skipped - table.num_rows), left - here
            if left <= 0:
                break
        # Pieces may differ in whether they have what features are made of.
        return pa.concat_tables(found, promote_options="default") if found else self._columns.step.empty_table()

    def _drop(self, count: int) -> None:
        self.taken += count
        self.proposed = max(self.proposed, self.taken)
        while count:
            table = self._rows.popleft()
            if table.num_rows > count:
                self._rows.appendleft(table.slice(count))
            count -= min(count, table.num_rows)

    def _forget_ends(self) -> None:
        while len(self._ends) > 1 and self._ends[1][1] <= self.taken:
            self._ends.popleft()


def _result(ahead: Future[tuple[pa.Table, int]]) -> tuple[pa.Table, int]:
    """Wait for a piece. The call of the lake that reads it is watched where it runs."""
    while True:
        try:
            return ahead.result(_LOOK_S)
        except Waited:
            if ahead.done():
                raise
            moved()
