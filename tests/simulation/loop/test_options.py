"""Goal: whatever a project declares works from the log line to the served score. Method: options are combined pairwise,
from a seed; each row is a project whose events go through the whole loop in memory, and what must come of them is known
without asking it."""

from __future__ import annotations

from pathlib import Path

import pytest
from option_levels import FACTORS, Row, drafted, is_possible, machine, two_tasks
from option_world import run
from options import EXEMPT, declared_options, options_of
from pairwise import covering, pairwise

ROWS = pairwise(FACTORS, is_possible)
FEW = covering(ROWS)
MANY = [row for row in ROWS if row not in FEW]


def name_of(row: Row) -> str:
    """Return a row's name for the test's list."""
    return "-".join(level.__name__ for level in row.values() if level.__name__ != "nothing")


@pytest.mark.parametrize("row", FEW, ids=name_of)
def test_each_option_works_from_the_log_line_to_the_served_score(row: Row, tmp_path: Path) -> None:
    run(drafted(row), tmp_path)


def test_a_model_of_one_task_is_not_overdue_for_the_samples_of_others(tmp_path: Path) -> None:
    """The newest samples are of a task that it does not learn, so that it stands before them for ever."""
    row = {factor: levels[0] for factor, levels in FACTORS.items()}
    out = run(drafted({**row, "tasks": two_tasks, "recipe": machine}), tmp_path)
    ledger = out.loop.ledger("full")
    assert ledger.in_flight == 0 and ledger.other_tasks > 0
    # Its recipe leaves three negatives of ten out: of its own task.
    assert 0 < ledger.sampled_out < 0.4 * (ledger.samples - ledger.other_tasks)


@pytest.mark.long
@pytest.mark.parametrize("row", MANY, ids=name_of)
def test_each_pair_of_options_does(row: Row, tmp_path: Path) -> None:
    run(drafted(row), tmp_path)


def test_every_option_that_can_be_declared_has_a_row() -> None:
    covered = set[str]().union(*(options_of(drafted(row).project()) for row in FEW))
    assert sorted(declared_options() - covered - set(EXEMPT)) == []
    assert sorted(covered & set(EXEMPT)) == [] and sorted(set(EXEMPT) - declared_options()) == []
    missing = [where for where in set(EXEMPT.values()) if not (Path(__file__).parents[3] / where).is_file()]
    assert not missing


def test_every_pair_of_levels_that_goes_together_has_a_row() -> None:
    seen = {(a, b) for row in ROWS for a in row.items() for b in row.items()}
    wanted = [
        ((one, a), (other, b))
        for one, levels in FACTORS.items()
        for other, others in FACTORS.items()
        if one != other
        for a in levels
        for b in others
        if is_possible({one: a, other: b})
    ]
    assert [pair for pair in wanted if pair not in seen] == [] and len(ROWS) < 60
