"""Reads what a stage's /metrics says: counters and gauges by name, and the median of a histogram."""

from __future__ import annotations

from collections.abc import Mapping


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


def median(name: str, now: Mapping[str, float], before: Mapping[str, float]) -> float | None:
    """Return the upper edge of the bucket that holds the median of what was observed between two readings."""
    lead = f"{name}_bucket "
    rises = sorted((float(k.removeprefix(lead)), v - before.get(k, 0.0)) for k, v in now.items() if k.startswith(lead))
    if not rises or rises[-1][1] <= 0:
        return None
    return next(edge for edge, count in rises if count >= rises[-1][1] / 2)
