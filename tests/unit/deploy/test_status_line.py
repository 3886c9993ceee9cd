"""Goal: the line of `make up` tells what the first figure waits for and when it comes, and marks provisional ones; its
rates are of two readings, and each task of a user's own project is in it. Method: /metrics as text, a clock by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.deploy.local.layout import Layout
from headrace.deploy.local.status_line import HOPS, StatusLine, figures

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
        # Those of undeclared tags are in no count of events.
        (
            {AWAY: 0.3},
            {READ: 0.0, REFUSED: 2.0},
            0.0,
            "AUC - (waits for an event that is taken: 2 were refused, see `headrace dead-letters list`)",
        ),
        ({AWAY: 44.2, **SOME}, {READ: 5.0}, math.nan, "AUC - (first figure after 45 s more of events)"),
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


class Stages:
    """What the stages say, by port, and a clock that is turned by hand."""

    def __init__(self, folder: Path) -> None:
        self.layout = Layout(
            home=folder, port_base=41_000, brokers="b:1", store="file:/s", webhdfs="", project=folder,
            own_kafka=True, own_hdfs=True,
        )  # fmt: skip
        self.told: dict[str, str] = {"serving": '{"version": "r-7", "age_seconds": 2.4}'}
        self.now_s = 1_000.0

    def read(self, url: str) -> tuple[int, bytes]:
        port = int(url.split(":")[2].split("/")[0])
        for name, text in self.told.items():
            if self.layout.port(name) == port:
                return 200, text.encode()
        return 0, b"nobody answers"

    def lines(self, main_task: str = "") -> Callable[[], str]:
        status = StatusLine(self.layout, main_task, read=self.read, monotonic=lambda: self.now_s)
        return lambda: status.line().partition("  ")[2]

    def ingested(self, events: int) -> None:
        self.told["metrics_ingest"] = f"{READ} {events}"


def test_the_first_line_has_the_rate_since_the_line_was_asked_for(tmp_path):
    stages = Stages(tmp_path)
    stages.ingested(90_000)
    line = stages.lines()
    stages.now_s += 3
    stages.ingested(90_030)
    assert line().startswith("10 events/s  ")


def test_a_rate_that_is_not_known_is_a_dash_and_a_gateway_that_begins_anew_counts_from_nothing(tmp_path):
    stages = Stages(tmp_path)
    line = stages.lines()
    stages.now_s += 3
    stages.ingested(90_000)
    assert line().startswith("- events/s  ")
    stages.now_s += 3
    stages.ingested(12)
    assert line().startswith("4 events/s  ")


def test_each_task_of_a_project_has_its_figure_and_its_calibration(tmp_path):
    stages = Stages(tmp_path)
    stages.ingested(0)
    stages.told["metrics_train"] = "\n".join(
        [
            f"{LEARNT} 900",
            f"{AWAY} 0",
            *(f"{name} {value}" for name, value in AUC.items()),
            *(f'headrace_train_next_figure_seconds{{task="{t}"}} {s}' for t, s in TASKS.items()),
            'headrace_train_slice_auc{task="click",slice="",reason="click"} 0.75',
            'headrace_train_slice_auc{task="click",slice="country=de",reason="click country=de"} 0.1',
            'headrace_train_slice_mae{task="revenue",slice=""} 3.5',
            'headrace_train_recent_calibration{task="click"} 1.021',
            'headrace_train_recent_calibration{task="revenue"} 0.9',
        ]
    )
    line = stages.lines("click")
    stages.now_s += 3
    assert line() == (
        "0 events/s  lag -+- records  "
        "click AUC 0.7500 (constant 0.5000, item rate 0.6000) calibration 1.02 over 900 rows"
        "  revenue mean error 3.5000 provisional calibration 0.90  order - (first figure after 25 min of events)"
        "  version r-7, 2 s old"
    )


TASKS = {"click": 0, "revenue": 5, "order": 1500}


def test_freshness_is_told_where_it_is_measured_alone(tmp_path):
    stages = Stages(tmp_path)
    line = stages.lines()
    stages.now_s += 3
    assert "freshness" not in line()
    stages.told["metrics_shop"] = _histogram(50)
    stages.now_s += 3
    assert "freshness -  " in line(), "since when its clicks came, nobody knows yet"
    stages.told["metrics_shop"] = _histogram(54)
    stages.now_s += 3
    assert "freshness 2,000 ms  " in line()


def test_freshness_of_an_own_project_is_that_of_its_hops(tmp_path):
    stages = Stages(tmp_path)
    for stage, name in HOPS:
        stages.told[f"metrics_{stage}"] = stages.told.get(f"metrics_{stage}", "") + _histogram(54, stage, name) + "\n"
    line = stages.lines()
    for stage, _ in HOPS:
        stages.told[f"metrics_{stage}"] = stages.told[f"metrics_{stage}"].replace("} 54", "} 60")
    stages.now_s += 3
    assert "freshness about 12,000 ms  " in line()
    stages.now_s += 3
    assert "freshness" not in line(), "no click came since"


def _histogram(answers: int, stage: str = "shop", name: str = "freshness_seconds") -> str:
    edges = ((1.0, 50), (2.0, answers), (5.0, answers))
    return "\n".join(f'headrace_{stage}_{name}_bucket{{le="{edge}"}} {n}' for edge, n in edges)
