"""Goal: the table of metrics is true: it lists every metric that the program has, and nothing else.

Method: the table is compared with the type of names, and with the text of the rooms that count.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from headrace.contract import metrics
from headrace.contract.metrics import METRICS, Name

ROOT = Path(metrics.__file__).resolve().parents[2]
ROOMS = ("headrace", "ingest", "stream", "trainer", "serving", "replay", "examples")
SOURCE = {
    file: file.read_text()
    for room in ROOMS
    for file in sorted((ROOT / room).rglob("*.py"))
    if file != Path(metrics.__file__).resolve()
}


def test_the_table_has_every_name_once_and_says_what_it_means():
    assert list(METRICS) == list(get_args(Name))
    for name, doc in METRICS.items():
        assert doc.meaning.endswith(".") and doc.unit and doc.stages, name
        assert (doc.kind == "counter") == name.endswith("_total"), name


def test_every_metric_is_counted_somewhere():
    unused = [name for name in METRICS if not any(f'"{name}"' in text for text in SOURCE.values())]
    assert not unused, f"nobody counts {unused}: delete them, or count them"
