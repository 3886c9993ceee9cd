"""Goal: a window's figures hold each of its impressions once, from when nothing can change them any more on.
Method: a task of 2 s, whose cells are of 2 s and windows of 10 s, and a few impressions at known times."""

from __future__ import annotations

import numpy as np

from headrace.contract.project import Task
from headrace.trainer.validation.figures import Scored, Tally
from headrace.trainer.validation.windows import TaskWindows


def windows_with(*times_ms: int, correct_ms: int = 0) -> TaskWindows:
    """Return windows with a positive, said to be one half, at each of these times."""
    windows = TaskWindows(Task(name="click", feedback="click", window_ms=2_000, correct_ms=correct_ms), Tally)
    add(windows, *times_ms)
    return windows


def add(windows: TaskWindows, *times_ms: int) -> None:
    n = len(times_ms)
    half_B = np.full(n, 0.5, np.float32)
    windows.add(
        Scored(half_B, half_B, np.ones(n, bool), np.zeros(n, bool), np.zeros((n, 0), np.int64)), np.array(times_ms)
    )


def test_a_resolved_cell_counts_once_however_often_time_is_told():
    windows = windows_with(0, 2_000, 2_001, 3_999, correct_ms=20_000)
    for _ in range(3):
        windows.close(3_999)
        assert windows.recent()[0] == 0
    for _ in range(3):
        windows.close(4_000)
        assert windows.recent() == (1, 0.5)
    for _ in range(3):
        windows.close(6_000)
        assert windows.recent() == (4, 0.5)


def test_a_window_closes_whole_at_its_last_moment():
    windows = windows_with(0, 5_000, 9_999, 10_000)
    assert windows.close(11_999) == [] and not windows.is_settled
    ((end_ms, tally),) = windows.close(12_000)
    assert end_ms == 10_000 and tally.figures().samples == 3 and windows.is_settled


def test_what_comes_behind_a_closed_window_counts_in_the_total_alone():
    windows = windows_with(0, 9_000)
    windows.close(12_000)
    add(windows, 5)
    assert (windows.total.figures().samples, windows.newest.figures().samples) == (3, 2)
    assert windows.close(60_000) == []
