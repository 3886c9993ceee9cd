"""The tokens of impressions: opened, checked, and put into the columns that they stand for. Pure.

A token's values take the place of what the record has in these columns; a counter or source that it does not hold
stays as it came. In place of a token `served` may be an object of open columns, as `/v1/rank` gives them on request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.checks.names import PREFIXES
from headrace.contract.formats.events import ARROW_TYPES
from headrace.contract.formats.served_token import SERVED, UNREADABLE, TokenKey, TokenLayout, token_key, token_layout
from headrace.contract.project import Project
from headrace.kernels.served_tokens import Opened, open_tokens

Columns = dict[str, pa.Array]
_KINDS: dict[str, type] = {"int64": int, "float64": float, "string": str, "bool": bool, "list[string]": list}


class ServedTokens(msgspec.Struct, frozen=True):
    """What the tokens of a project's impressions are opened with."""

    layout: TokenLayout
    key: TokenKey

    def open(self, tokens: pa.Array) -> Opened:
        """Return what tokens say. One whose values no column takes is refused like one that is damaged."""
        opened = open_tokens(self.layout, self.key, tokens)
        wrong = set(np.flatnonzero(~np.isfinite(opened.values_NC).all(axis=1)).tolist())
        for crawl, entities in zip(self.layout.crawls, opened.entities, strict=True):
            kinds = list(crawl.columns().values())
            for row, values in enumerate(entities):
                if values is not None and not all(map(_is_of, values, kinds)):
                    wrong.add(row)
        for at in wrong:
            opened.reasons[at], opened.is_open_N[at] = UNREADABLE, False
        return opened

    def fill(self, columns: Columns, opened: Opened, rows_N: npt.NDArray[np.bool_]) -> None:
        """Put what the tokens of these rows say into the columns."""
        column = 0
        for k, counter in enumerate(self.layout.counters):
            is_there_N = opened.has_NK[:, k] & rows_N
            for name in counter.columns():
                if is_there_N.any():
                    columns[name] = pc.if_else(
                        pa.array(is_there_N), pa.array(opened.values_NC[:, column]), columns[name]
                    )
                column += 1
        for crawl, entities in zip(self.layout.crawls, opened.entities, strict=True):
            is_there_N = np.array([values is not None for values in entities], np.bool_) & rows_N
            for at, (name, kind) in enumerate(crawl.columns().items()):
                if is_there_N.any():
                    given = [v[at] if v is not None and is_there_N[row] else None for row, v in enumerate(entities)]
                    columns[name] = _chosen(is_there_N, pa.array(given, ARROW_TYPES[kind]), columns[name])
        is_said_N = np.array([version is not None for version in opened.version], np.bool_) & rows_N
        if is_said_N.any():
            columns["version"] = pc.if_else(
                pa.array(is_said_N), pa.array(opened.version, pa.string()), columns["version"]
            )


def served_tokens(project: Project, key: TokenKey | None = None) -> ServedTokens:
    """Return what opens the tokens of a project; without a key those of a project that has no secret."""
    layout = token_layout([task.name for task in project.tasks], project.features.counters, project.crawls)
    return ServedTokens(layout, token_key("") if key is None else key)


def opened_record(record: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return a record whose `served` is an object with the columns of that beside its own fields."""
    served = record.get(SERVED)
    if not isinstance(served, dict):
        return record
    own = {name: value for name, value in record.items() if name != SERVED}
    return own | {name: v for name, v in served.items() if isinstance(name, str) and name.startswith(PREFIXES)}


def _chosen(is_there_N: npt.NDArray[np.bool_], given: pa.Array, other: pa.Array) -> pa.Array:
    if not pa.types.is_list(given.type):
        return pc.if_else(pa.array(is_there_N), given, other)
    pairs = zip(is_there_N.tolist(), given.to_pylist(), other.to_pylist(), strict=True)
    return pa.array([one if is_there else two for is_there, one, two in pairs], given.type)


def _is_of(value: Any, kind: str) -> bool:
    if value is None:
        return True
    if type(value) is not _KINDS[kind]:
        return False
    if isinstance(value, list):
        return all(type(one) is str for one in value)
    return not isinstance(value, int) or -(2**63) <= value < 2**63
