"""What is said of each metric in the table of `headrace.contract.metrics`, and the stages that have some."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Stage = Literal["ingest", "stream", "sink", "aggregate", "crawl", "train", "serve", "shop", "watch"]
Kind = Literal["counter", "gauge", "histogram"]


class MetricDoc(Struct, frozen=True):
    """What one metric is."""

    kind: Kind
    unit: str
    stages: tuple[Stage, ...]
    """The stages that have it. The full name is `headrace_<stage>_<name>`."""
    meaning: str
    """One sentence."""
    labels: tuple[str, ...] = ()
    """Names of its labels. A stage that has nothing to say under a label leaves it out."""
