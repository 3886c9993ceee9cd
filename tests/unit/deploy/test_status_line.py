"""Goal: the line of `make up` tells what the first figure waits for and when it comes, and marks provisional ones."""

from __future__ import annotations

import pytest

from headrace.deploy.local.status_line import figures

AUC = {"headrace_train_auc": 0.75, "headrace_train_auc_constant": 0.5, "headrace_train_auc_item_rate": 0.6}
AWAY, LEARNT = "headrace_train_main_next_figure_seconds", "headrace_train_samples_learnt_total"
READ, TAKEN, REFUSED = (f"headrace_ingest_events_{what}_total" for what in ("read", "appended", "dead_lettered"))
SOME = {LEARNT: 7.0}


@pytest.mark.parametrize(
    ("told", "ingest", "rate", "line"),
    [
        ({}, {}, 0.0, "AUC -"),
        ({AWAY: 0.3}, {READ: 0.0}, 0.0, "AUC - (waits for the first event)"),
        (
            {AWAY: 0.3},
            {READ: 5.0, REFUSED: 5.0},
            5.0,
            "AUC - (waits for an event that is taken: 5 were refused, see `headrace dead-letters list`)",
        ),
        (
            {AWAY: 60.0, LEARNT: 0.0},
            {READ: 5.0, TAKEN: 5.0},
            5.0,
            "AUC - (waits for the first sample: it comes with feedback, or when a task's window is over)",
        ),
        ({AWAY: 590.0, **SOME}, {READ: 5.0}, 5.0, "AUC - (first figure in 10 min)"),
        ({AWAY: 0.3, **SOME}, {READ: 5.0}, 5.0, "AUC - (first figure in 1 s)"),
        ({AWAY: 44.2, **SOME}, {READ: 5.0}, 0.0, "AUC - (first figure after 45 s more of events, and none comes)"),
        # A gateway that was restarted has read nothing yet, and the trainer has.
        ({AWAY: 590.0, **SOME}, {READ: 0.0}, 0.0, "AUC - (first figure after 10 min more of events, and none comes)"),
        (
            {**AUC, **SOME, AWAY: 45.0},
            {READ: 5.0},
            5.0,
            "AUC 0.7500 provisional, settled in 45 s (constant 0.5000, item rate 0.6000)",
        ),
        ({**AUC, **SOME, AWAY: 0.0}, {READ: 5.0}, 5.0, "AUC 0.7500 (constant 0.5000, item rate 0.6000)"),
    ],
)
def test_a_figure_says_what_it_waits_for(told, ingest, rate, line):
    assert figures(told, ingest, rate) == line
