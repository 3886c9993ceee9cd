"""Columns of few rows, as a request has: NumPy and Python in place of Arrow, whose calls cost more than the rows. Pure.

`hash_values` and `to_numbers` give of them what they give of the same column in Arrow; `arrow_of` makes that one.

Legend: N rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from headrace.contract.formats.events import ARROW_TYPES
from headrace.contract.project import FieldType

_TEXTS_KEPT = 65_536
_DTYPES: dict[str, type[np.generic]] = {"int64": np.int64, "float64": np.float64}
_EXACT_FLOAT = 2**53


class Numbers(NamedTuple):
    """A column of int64, float64 or float32."""

    values_N: npt.NDArray[Any]
    missing_N: npt.NDArray[np.bool_] | None = None
    """Which rows are null, None for none; what `values_N` holds there is of no matter."""


class Texts(NamedTuple):
    """A column of texts."""

    texts: list[str | None]


class Same(NamedTuple):
    """A column that has one value in all rows."""

    one: Numbers | Texts | pa.Array
    """The value: a column of one row."""
    rows: int


Few: TypeAlias = Numbers | Texts | Same


def arrow_of(column: Any) -> pa.Array:
    """Return a column as Arrow's array; one that is Arrow's stays.

    >>> arrow_of(Same(Texts(["a"]), 2)).to_pylist()
    ['a', 'a']
    >>> arrow_of(Numbers(np.array([1, 2]), np.array([False, True]))).to_pylist()
    [1, None]
    """
    if isinstance(column, Numbers):
        return pa.array(column.values_N, mask=column.missing_N)
    if isinstance(column, Texts):
        return pa.array(column.texts, pa.string())
    if isinstance(column, Same):
        return arrow_of(column.one).take(pa.array(np.zeros(column.rows, np.int64)))
    return column


@lru_cache(maxsize=_TEXTS_KEPT)
def hash_of_text(text: str) -> int:
    """Return XXH64 of a text's UTF-8."""
    return xxhash.xxh64_intdigest(text.encode())


def few_of(values: list[Any], kind: FieldType) -> Numbers | Texts | pa.Array:
    """Return values, of the declared type or null, as a column. Raises as `pyarrow.array`."""
    if kind == "string":
        return Texts(values)
    if kind not in _DTYPES:
        return pa.array(values, ARROW_TYPES[kind])
    missing_N = np.array([value is None for value in values]) if None in values else None
    filled = values if missing_N is None else [value or 0 for value in values]
    if kind == "float64" and any(type(value) is int and abs(value) > _EXACT_FLOAT for value in filled):
        return pa.array(values, ARROW_TYPES[kind])  # It says which number no float is.
    try:
        return Numbers(np.array(filled, _DTYPES[kind]), missing_N)
    except OverflowError:
        return pa.array(values, ARROW_TYPES[kind])
