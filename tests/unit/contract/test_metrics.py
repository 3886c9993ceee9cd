"""Goal: the table of metrics is true: it lists every metric that the program has, and nothing else.

Method: the table is compared with the type of names, and with the text of the rooms that count.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from headrace.backends.metrics_prometheus import LABELLED_REASON
from headrace.contract import metrics
from headrace.contract.metrics import METRICS, Name

TABLES = Path(metrics.__file__).resolve().parent
ROOT = TABLES.parents[2]
ROOMS = ("headrace", "ingest", "stream", "trainer", "serving", "replay", "examples", "deploy")
SOURCE = {
    file: file.read_text() for room in ROOMS for file in sorted((ROOT / room).rglob("*.py")) if file.parent != TABLES
}


def test_the_table_has_every_name_once_and_says_what_it_means():
    assert list(METRICS) == list(get_args(Name))
    assert sum(len(table) for table in metrics.TABLES) == len(METRICS), "a name stands in one table"
    for name, doc in METRICS.items():
        assert doc.meaning.endswith(".") and doc.unit and doc.stages, name
        assert (doc.kind == "counter") == name.endswith("_total"), name


def test_every_metric_is_counted_somewhere():
    unused = [name for name in METRICS if not any(f'"{name}"' in text for text in SOURCE.values())]
    assert not unused, f"nobody counts {unused}: delete them, or count them"


def test_labels_are_named_for_what_they_hold():
    """A reason says why something was refused or left out. Whatever else a label holds has a name of its own."""
    assert {name for name, doc in METRICS.items() if "reason" in doc.labels} == {
        "events_dead_lettered_total",
        "connections_refused_total",
        "requests_refused_total",
        "left_out_total",
        "versions_refused_total",
    }
    assert {label for doc in METRICS.values() for label in doc.labels} == {
        *("reason", "kind", "task", "slice", "topic", "tag", "source", "status", "outcome", "worker"),
        *("process", "sign", "type", "field", "fate", "bound", "what"),
    }
    assert all(METRICS[name].labels and METRICS[name].labels != ("reason",) for name in LABELLED_REASON)


@pytest.mark.parametrize("name", METRICS)
def test_callers_give_the_labels_that_the_table_declares(name):
    """Method: the text of each call that names the metric outright."""
    given = [
        set(re.findall(r"\b(\w+)=", call))
        for text in SOURCE.values()
        for call in re.findall(rf'metrics\.(?:add|set)\(\s*"{name}"([^\n]*)', text)
    ]
    assert all(labels <= set(METRICS[name].labels) for labels in given), (name, given)
