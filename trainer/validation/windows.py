"""The windows of one task: tallies by impression time, closed when none of their labels is still to come. Pure.

Each task has windows of its own length, so a fast task does not wait for a slow one. A window is five cells. A cell is
*resolved* when the task's window has passed it: then every impression in it has its label, but for late feedback. It is
*closed* when late feedback can change nothing any more, a window when all its cells are.

Until the first window is closed there is a provisional figure, of the cells that are resolved.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from headrace.contract.project import Task
from headrace.trainer.model.tables.table import Int64s
from headrace.trainer.validation.figures import Bools, Scored, State, Tally
from headrace.trainer.validation.value_figures import ValueTally

AnyTally = Tally | ValueTally
CELLS = 5
CELL_MS_MIN = 2_000


class TaskWindows:
    """Tallies of one task. `total` is of all closed windows, `newest` of the newest one."""

    def __init__(self, task: Task, new: Callable[[], AnyTally]) -> None:
        self.new, self.total, self.newest = new, new(), new()
        self.cell_ms = max(task.window_ms, CELL_MS_MIN)
        self.span_ms = CELLS * self.cell_ms
        self.resolved_after_ms = task.window_ms
        self.close_after_ms = task.window_ms + task.correct_ms
        self._cells: dict[int, AnyTally] = {}
        self._partial: dict[int, AnyTally] = {}
        """Of windows, what their closed cells hold."""
        self._cells_below = self._closed_below = -1
        """The newest closed cell and window."""
        self._balances: deque[tuple[int, tuple[float, float, float]]] = deque(maxlen=CELLS)
        """Of the newest resolved cells, see `recent`; a restart begins with none."""

    def add(self, scored: Scored, time_ms_B: Int64s) -> None:
        """Count samples by the times of their impressions."""
        cell_B = time_ms_B // self.cell_ms
        for cell in np.unique(cell_B).tolist():
            here_B: Bools = cell_B == cell
            self._tally_of(int(cell)).add(scored if here_B.all() else scored.where(here_B))

    def _tally_of(self, cell: int) -> AnyTally:
        window = cell // CELLS
        if window <= self._closed_below:
            return self.total
        if cell <= self._cells_below:
            return self._partial.setdefault(window, self.new())
        return self._cells.setdefault(cell, self.new())

    def close(self, known_ms: int) -> list[tuple[int, AnyTally]]:
        """Close what is over by a time up to which all is known; return the ends and tallies of closed windows."""
        closed = []
        told = self._balances[-1][0] if self._balances else -1
        for cell in sorted(self._cells):
            if cell > told and (cell + 1) * self.cell_ms + self.resolved_after_ms <= known_ms:
                self._balances.append((cell, self._cells[cell].balance))
        for cell in sorted(self._cells):
            if (cell + 1) * self.cell_ms + self.close_after_ms > known_ms:
                break
            _merge(self._partial.setdefault(cell // CELLS, self.new()), self._cells.pop(cell))
            self._cells_below = cell
        for window in sorted(self._partial):
            end_ms = (window + 1) * self.span_ms
            if end_ms + self.close_after_ms > known_ms:
                break
            self.newest = self._partial.pop(window)
            self._closed_below = window
            _merge(self.total, self.newest)
            closed.append((end_ms, self.newest))
        return closed

    @property
    def is_settled(self) -> bool:
        """True once a window is closed."""
        return self._closed_below >= 0

    def provisional(self, known_ms: int) -> AnyTally:
        """Return what is resolved so far and not in a closed window, late feedback aside."""
        out = self.new()
        for tally in self._partial.values():
            _merge(out, tally)
        for cell, tally in self._cells.items():
            if (cell + 1) * self.cell_ms + self.resolved_after_ms <= known_ms:
                _merge(out, tally)
        return out

    def recent(self) -> tuple[int, float]:
        """Return how many samples the newest resolved cells have, and what was said of them by what they are: their
        calibration, known before late feedback and a whole window are; NaN without a positive."""
        samples, labels, said = np.array([b for _, b in self._balances] or [(0.0, 0.0, 0.0)]).sum(axis=0).tolist()
        return int(samples), said / labels if labels else math.nan

    def next_in_ms(self, known_ms: int, *, provisional: bool) -> int:
        """Return how much event time the next kind of figure is away: with `provisional` the first closed window, else
        the first resolved cell. 0 once a window is closed."""
        if self.is_settled:
            return 0
        cells = [*self._cells, *(window * CELLS for window in self._partial)]
        first = min(cells, default=max(known_ms, 0) // self.cell_ms)
        end_ms = (first // CELLS + 1) * self.span_ms + self.close_after_ms
        if not provisional:
            end_ms = (first + 1) * self.cell_ms + self.resolved_after_ms
        return max(0, end_ms - known_ms)

    def state(self) -> State:
        """Return everything; `load` takes it."""
        kept = {"total": self.total, "newest": self.newest}
        kept |= {f"cell{number}": tally for number, tally in sorted(self._cells.items())}
        kept |= {f"window{number}": tally for number, tally in sorted(self._partial.items())}
        out: State = {"below": np.array([self._cells_below, self._closed_below], np.int64)}
        for name, tally in kept.items():
            out |= {f"{name}/{key}": array for key, array in tally.state().items()}
        return out

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Replace everything by what `state` returned."""
        kept: dict[str, State] = {}
        for key, array in state.items():
            name, slash, rest = key.partition("/")
            if slash:
                kept.setdefault(name, {})[rest] = array
        tallies = {name: self.new().load(arrays) for name, arrays in kept.items()}
        self.total, self.newest = tallies.pop("total"), tallies.pop("newest")
        self._cells = {int(n[4:]): t for n, t in tallies.items() if n.startswith("cell")}
        self._partial = {int(n[6:]): t for n, t in tallies.items() if n.startswith("window")}
        self._cells_below, self._closed_below = (int(x) for x in state["below"])


def _merge(into: AnyTally, other: Any) -> None:
    """Add a tally of the same task, so of the same kind."""
    into.merge(other)
