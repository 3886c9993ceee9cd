"""What serving looks up, made from columns by name, for tests that have no memory of counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.contract.privacy import Privacy
from headrace.contract.project import Project
from headrace.ingest.decode.served import served_tokens
from headrace.serving.features import Served, entity_of


def opened_columns(project: Project, tokens: list[str], privacy: Privacy) -> list[dict[str, Any]]:
    """Return the columns that tokens stand for, opened as the gateway does."""
    tool = served_tokens(project, privacy.token_key)
    found = tool.open(pa.array(tokens, pa.string()))
    assert not found.reasons and found.has_NK.all()
    rows = [dict(zip(tool.layout.counter_columns(), row, strict=True)) for row in found.values_NC.tolist()]
    for crawl, entities in zip(project.crawls, found.entities, strict=True):
        for row, values in zip(rows, entities, strict=True):
            assert values is not None
            row |= dict(zip(crawl.columns(), values, strict=True))
    return rows


def served_of(project: Project, columns: Mapping[str, Any]) -> Served:
    """Return what one candidate is served."""
    counters = [(c, np.array([[float(columns[name]) for name in c.columns()]])) for c in project.features.counters]
    entities = [(crawl, [entity_of(crawl, {n: columns[n] for n in crawl.columns()})]) for crawl in project.crawls]
    return Served(1, counters, entities)
