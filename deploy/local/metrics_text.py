"""Reads what a stage's /metrics says: counters and gauges by name and labels, and the median of a histogram."""

from __future__ import annotations

import re
from collections.abc import Mapping

_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def parse(text: str) -> dict[str, float]:
    """Return a Prometheus text's samples: by name, summed over labels; histogram buckets by name and `le`.

    >>> parse('a_total{reason="x"} 1\\na_total{reason=""} 2\\nb_bucket{le="0.5"} 3\\n')
    {'a_total': 3.0, 'b_bucket 0.5': 3.0}
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#") or " " not in line:
            continue
        name, _, value = line.rpartition(" ")
        base, _, labels = name.partition("{")
        if base.endswith("_bucket"):
            edge = labels.partition('le="')[2].partition('"')[0]
            base = f"{base} {edge}"
        found[base] = found.get(base, 0.0) + float(value)
    return found


def by_label(text: str, name: str, label: str, **others: str) -> dict[str, float]:
    """Return the samples of `name` by the value of one label, those alone whose `others` have these values.

    >>> by_label('a{task="x",slice=""} 1\\na{task="x",slice="s"} 2\\na{task="y",slice=""} 3\\n', "a", "task", slice="")
    {'x': 1.0, 'y': 3.0}
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith(f"{name}{{"):
            labels = dict(_LABEL.findall(line))
            if label in labels and all(labels.get(other) == value for other, value in others.items()):
                found[labels[label]] = float(line.rpartition(" ")[2])
    return found


def risen(now: float, before: float) -> float:
    """Return how far a counter rose between two readings. One that is lower than before began anew with its process.

    >>> risen(7.0, 5.0), risen(2.0, 5.0)
    (2.0, 2.0)
    """
    return now - before if now >= before else now


def median(name: str, now: Mapping[str, float], before: Mapping[str, float]) -> float | None:
    """Return the upper edge of the bucket that holds the median of what was observed between two readings."""
    lead = f"{name}_bucket "
    buckets = {k.removeprefix(lead): (v, before.get(k, 0.0)) for k, v in now.items() if k.startswith(lead)}
    if any(value < earlier for value, earlier in buckets.values()):
        buckets = {edge: (value, 0.0) for edge, (value, _) in buckets.items()}
    rises = sorted((float(edge), value - earlier) for edge, (value, earlier) in buckets.items())
    if not rises or rises[-1][1] <= 0:
        return None
    return next(edge for edge, count in rises if count >= rises[-1][1] / 2)
