"""Slices: the figures of samples that share a field's value, so that the whole does not hide a part of it.

A slice is (field, value), named "field=value". Each declared field has slices for the first `values_max` values that
the trainer learns from, and one, "field=(other)", for all that come later: their number is bounded whatever the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.errors import ConfigRejected
from headrace.contract.project import LISTS, Project
from headrace.trainer.model.tables.table import Int64s

OTHER = "(other)"
_NAME_MAX = 64
"""Longer values are cut: a name goes into metrics."""


class Slices:
    """Numbers slices in the order in which they are first seen, which is that of learning: a replay repeats it."""

    def __init__(self, fields: Sequence[str], *, values_max: int) -> None:
        self.fields, self.values_max = tuple(fields), values_max
        self.names: list[str] = []
        self._numbers: dict[tuple[str, str], int] = {}
        self._values: dict[str, int] = dict.fromkeys(self.fields, 0)

    def numbers(self, rows: pa.Table) -> Int64s:
        """Return each row's slice of each field: int64 [B, K]."""
        out_BK = np.empty((rows.num_rows, len(self.fields)), np.int64)
        for at, name in enumerate(self.fields):
            column = pc.fill_null(rows[name].cast(pa.string()), "(none)").combine_chunks().dictionary_encode()
            known = np.array([self._number(name, value) for value in column.dictionary.to_pylist()], np.int64)
            out_BK[:, at] = known[column.indices.to_numpy()] if len(known) else 0
        return out_BK

    def state(self) -> Sequence[str]:
        """Return the names in order; `load` takes them."""
        return list(self.names)

    def load(self, names: Sequence[str]) -> None:
        """Go on from stored names. Those of fields that are no longer declared keep their numbers, unused."""
        self.names, self._numbers = [], {}
        self._values = dict.fromkeys(self.fields, 0)
        for name in names:
            field, _, value = name.partition("=")
            self._numbers[field, value] = len(self.names)
            self.names.append(name)
            if field in self._values and value != OTHER:
                self._values[field] += 1

    def _number(self, field: str, value: str) -> int:
        value = value[:_NAME_MAX]
        found = self._numbers.get((field, value))
        if found is not None:
            return found
        if self._values[field] >= self.values_max:
            value = OTHER
            found = self._numbers.get((field, value))
            if found is not None:
                return found
        else:
            self._values[field] += 1
        self._numbers[field, value] = len(self.names)
        self.names.append(f"{field}={value}")
        return len(self.names) - 1


def slices_of(project: Project, fields: Sequence[str], *, values_max: int) -> Slices:
    """Return the slices of declared impression fields. Raises `ConfigRejected` for any other name."""
    kinds = project.impression.fields
    wrong = [name for name in fields if name not in kinds or kinds[name] in LISTS]
    if wrong:
        fit = sorted(name for name, kind in kinds.items() if kind not in LISTS)
        raise ConfigRejected(f"train.slices names {wrong}; an impression's fields of one value are {fit}.")
    return Slices(fields, values_max=values_max)
