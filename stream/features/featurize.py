"""The one featurizer: raw fields and counters to slot ids and numbers, for stream, trainer, serving and replay.

Pure and columnar: a row's result depends on that row and the specification alone, so any split into batches gives the
same bits.

Legend: N rows, F slots a row, D dense numbers a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from headrace.contract.hashing import combine64, hash_text, mix64
from headrace.contract.spec import Bucket, Categorical, Cross, FeatureSpec, Numeric, Rate

Columns: TypeAlias = Mapping[str, pa.Array] | pa.RecordBatch
U64s = npt.NDArray[np.uint64]

NULL_HASH = np.uint64(hash_text("headrace:null"))
"""What a missing value hashes to, whatever the type."""

# The tables mark empty places with 0 and the lake's readers show -1 for "no slot": neither is ever a slot id.
_LOWEST, _HIGHEST = np.uint64(1), np.uint64(2**64 - 2)


def featurize(columns: Columns, spec: FeatureSpec) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return (slots int64 [N, F], numeric float32 [N, D]), features in the specification's order.

    Args:
        columns: a record batch or arrays by name. Every field that a feature reads must be there, of the type that
            the project declares (int64, float64, string, bool; counters float32); nulls are welcome.

    A slot id holds the bits of an unsigned hash; it is never 0 or -1. A missing value has a slot of its own; as a
    number it is 0. NaN is missing.
    """
    hashes = _hash_columns(columns, _hashed_fields(spec))
    numbers: dict[str, npt.NDArray[np.float64]] = {}

    def number(name: str) -> npt.NDArray[np.float64]:
        if name not in numbers:
            numbers[name] = to_numbers(_column(columns, name))
        return numbers[name]

    rows = _rows(columns)
    values_FN = np.empty((spec.slots, rows), dtype=np.uint64)
    numeric_ND = np.empty((rows, spec.numerics), dtype=np.float32)
    slot = dense = 0
    for feature in spec.features:
        if isinstance(feature, Numeric | Rate):
            for column_N in _dense(feature, number):
                numeric_ND[:, dense] = column_N
                dense += 1
        else:
            values_FN[slot] = _value_hash(feature, hashes, number)
            slot += 1
    slots_FN = combine64(np.broadcast_to(_salts(spec)[:, None], values_FN.shape), values_FN)
    slots_NF = np.ascontiguousarray(np.clip(slots_FN, _LOWEST, _HIGHEST).T)
    return slots_NF.view(np.int64), numeric_ND


def hash_values(column: pa.Array) -> U64s:
    """Return one 64-bit hash a value: integers and floats by splitmix64 of their bits, text by XXH64."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return _hash_texts(column)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    if pa.types.is_floating(column.type):
        values_N = to_numbers(column, missing=np.nan)
        # -0.0 + 0.0 is 0.0: both zeros are one value.
        hashed_N = mix64((values_N + 0.0).view(np.uint64))
        return np.where(np.isnan(values_N), NULL_HASH, hashed_N)
    missing_N = column.is_null().to_numpy(zero_copy_only=False)
    filled = pc.fill_null(column, 0) if column.null_count else column
    hashed_N = mix64(filled.cast(pa.int64()).to_numpy(zero_copy_only=False).view(np.uint64))
    return np.where(missing_N, NULL_HASH, hashed_N) if column.null_count else hashed_N


def to_numbers(column: pa.Array, *, missing: float = 0.0) -> npt.NDArray[np.float64]:
    """Return the values as float64 [N], `missing` for null and (when it is not NaN itself) for NaN."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    column = column.cast(pa.float64(), safe=False)
    if column.null_count:
        column = pc.fill_null(column, missing)
    values_N: npt.NDArray[np.float64] = column.to_numpy(zero_copy_only=False)
    return values_N if np.isnan(missing) else np.where(np.isnan(values_N), missing, values_N)


def _hash_texts(column: pa.Array) -> U64s:
    encoded = column.dictionary_encode()
    digests = [xxhash.xxh64_intdigest(text) for text in encoded.dictionary.cast(pa.binary()).to_pylist()]
    table = np.array([*digests, int(NULL_HASH)], dtype=np.uint64)
    indices = encoded.indices
    if indices.null_count:
        indices = pc.fill_null(indices, len(digests))
    result_N: U64s = table[indices.to_numpy(zero_copy_only=False)]
    return result_N


def _value_hash(
    feature: Categorical | Bucket | Cross,
    hashes: Mapping[str, U64s],
    number: Callable[[str], npt.NDArray[np.float64]],
) -> U64s:
    if isinstance(feature, Categorical):
        return hashes[feature.field]
    if isinstance(feature, Cross):
        value_N = hashes[feature.fields[0]]
        for name in feature.fields[1:]:
            value_N = combine64(value_N, hashes[name])
        return value_N
    index_N = np.searchsorted(np.asarray(feature.edges, dtype=np.float64), number(feature.field), side="right")
    # The value's own hash says whether it is missing: `number` gives 0 for that.
    missing_N = hashes[feature.field] == NULL_HASH
    return np.where(missing_N, NULL_HASH, mix64(index_N.astype(np.uint64)))


def _dense(
    feature: Numeric | Rate, number: Callable[[str], npt.NDArray[np.float64]]
) -> tuple[npt.NDArray[np.float64], ...]:
    if isinstance(feature, Numeric):
        value_N = number(feature.field)
        if feature.transform == "log1p":
            value_N = np.log1p(np.maximum(value_N, 0.0))
        return (value_N * feature.scale,)
    of_N, over_N = number(feature.of), number(feature.over)
    rate_N = (of_N + feature.prior * feature.strength) / (over_N + feature.strength)
    return (rate_N, np.log1p(np.maximum(over_N, 0.0)))


@lru_cache(maxsize=64)
def _salts(spec: FeatureSpec) -> U64s:
    salts: list[int] = []
    for feature in spec.features:
        if isinstance(feature, Categorical | Bucket | Cross):
            names = feature.fields if isinstance(feature, Cross) else (feature.field,)
            salts.append(hash_text("\x00".join((type(feature).__name__.lower(), *names))))
    return np.array(salts, dtype=np.uint64)


@lru_cache(maxsize=64)
def _hashed_fields(spec: FeatureSpec) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for feature in spec.features:
        if isinstance(feature, Cross):
            names.update(dict.fromkeys(feature.fields))
        elif isinstance(feature, Categorical | Bucket):
            names[feature.field] = None
    return tuple(names)


def _hash_columns(columns: Columns, names: tuple[str, ...]) -> dict[str, U64s]:
    """Return `hash_values` of several columns; those of integers without nulls are mixed in one call."""
    hashes: dict[str, U64s] = {}
    whole: dict[str, U64s] = {}
    for name in names:
        column = _column(columns, name)
        if pa.types.is_int64(column.type) and not column.null_count:
            whole[name] = column.to_numpy().view(np.uint64)
        else:
            hashes[name] = hash_values(column)
    if whole:
        hashes.update(zip(whole, mix64(np.stack(list(whole.values()))), strict=True))
    return hashes


def _column(columns: Columns, name: str) -> pa.Array:
    column = columns.column(name) if isinstance(columns, pa.RecordBatch) else columns[name]
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _rows(columns: Columns) -> int:
    if isinstance(columns, pa.RecordBatch):
        return int(columns.num_rows)
    return len(next(iter(columns.values()))) if columns else 0
