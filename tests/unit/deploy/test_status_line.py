"""Goal: the line of `make up` tells when the first figure comes, and marks one that is provisional."""

from __future__ import annotations

import pytest

from headrace.deploy.local.status_line import figures

AUC = {"headrace_train_auc": 0.75, "headrace_train_auc_constant": 0.5, "headrace_train_auc_item_rate": 0.6}
AWAY = "headrace_train_main_next_figure_seconds"


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({}, "AUC -"),
        ({AWAY: 590.0}, "AUC - (first figure in 10 min)"),
        ({**AUC, AWAY: 45.0}, "AUC 0.7500 provisional, settled in 45 s (constant 0.5000, item rate 0.6000)"),
        ({**AUC, AWAY: 0.0}, "AUC 0.7500 (constant 0.5000, item rate 0.6000)"),
    ],
)
def test_a_provisional_figure_says_so(told, line):
    assert figures(told) == line
