"""What features are made of: hashes and numbers of columns, and the sets of values that multi-valued features have.

Pure and columnar: no Python a row, only a unique text.

Legend: N rows, M values of all lists, W values kept a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from headrace.contract.hashing import hash_text, mix64
from headrace.stream.features.few_rows import Few, Numbers, Same, Texts, arrow_of, hash_of_text

Columns: TypeAlias = Mapping[str, pa.Array | Few] | pa.RecordBatch
U64s = npt.NDArray[np.uint64]
F64s = npt.NDArray[np.float64]

NULL_HASH = np.uint64(hash_text("headrace:null"))
"""What a missing value hashes to, whatever the type."""
_NULL = int(NULL_HASH)


class Values(NamedTuple):
    """Value hashes of one feature: uint64 [W, N], and which of them are there: bool [W, N], None for all."""

    hashes_WN: U64s
    present_WN: npt.NDArray[np.bool_] | None


def column_of(columns: Columns, name: str) -> pa.Array | Few:
    """Return one column as one array."""
    column = columns.column(name) if isinstance(columns, pa.RecordBatch) else columns[name]
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def hash_values(column: pa.Array | Few) -> U64s:
    """Return one 64-bit hash a value: integers and floats by splitmix64 of their bits, text by XXH64."""
    if isinstance(column, Same):
        return np.full(column.rows, hash_values(column.one)[0])
    if isinstance(column, Texts):
        return np.array([_NULL if text is None else hash_of_text(text) for text in column.texts], np.uint64)
    if isinstance(column, Numbers):
        values_N, missing_N = column
        if values_N.dtype == np.int64:
            hashed_N = mix64(values_N.view(np.uint64))
            return hashed_N if missing_N is None else np.where(missing_N, NULL_HASH, hashed_N)
        column = arrow_of(column)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return _hash_texts(column)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    if pa.types.is_floating(column.type):
        values_N = to_numbers(column, missing=np.nan)
        # -0.0 + 0.0 is 0.0: both zeros are one value.
        hashed_N = mix64((values_N + 0.0).view(np.uint64))
        return np.where(np.isnan(values_N), NULL_HASH, hashed_N)
    if not column.null_count:
        return mix64(column.cast(pa.int64()).to_numpy(zero_copy_only=False).view(np.uint64))
    missing_N = column.is_null().to_numpy(zero_copy_only=False)
    filled = pc.fill_null(column, 0)
    hashed_N = mix64(filled.cast(pa.int64()).to_numpy(zero_copy_only=False).view(np.uint64))
    return np.where(missing_N, NULL_HASH, hashed_N)


def to_numbers(column: pa.Array | Few, *, missing: float = 0.0) -> F64s:
    """Return the values as float64 [N], `missing` for null and (when it is not NaN itself) for NaN."""
    if isinstance(column, Same):
        return np.full(column.rows, to_numbers(column.one, missing=missing)[0])
    if isinstance(column, Numbers):
        numbers_N: F64s = column.values_N.astype(np.float64)
        if column.missing_N is not None:
            numbers_N[column.missing_N] = missing
        return numbers_N if np.isnan(missing) else np.where(np.isnan(numbers_N), missing, numbers_N)
    column = arrow_of(column)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    column = column.cast(pa.float64(), safe=False)
    if column.null_count:
        column = pc.fill_null(column, missing)
    values_N: F64s = column.to_numpy(zero_copy_only=False)
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


def list_values(column: pa.Array, width: int) -> Values:
    """Return the first `width` distinct values of each list; a missing list is the one value `NULL_HASH`.

    >>> values = list_values(pa.array([["a", None, "b", "a"], [], None]), 2)
    >>> values.present_WN.tolist(), bool(values.hashes_WN[0, 2] == NULL_HASH)
    ([[True, False, True], [True, False, False]], True)
    """
    rows = len(column)
    hashes_WN = np.zeros((width, rows), np.uint64)
    present_WN = np.zeros((width, rows), np.bool_)
    lengths_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    flat = column.flatten()
    if len(flat):
        row_M = np.repeat(np.arange(rows), lengths_N)
        hash_M = hash_values(flat)
        keep_M = np.ones(len(flat), np.bool_)
        if flat.null_count:
            keep_M = flat.is_valid().to_numpy(zero_copy_only=False)
        # The sort is stable: of equal values the first one of the list leads, and the others go.
        order_M = np.lexsort((~keep_M, hash_M, row_M))
        row_O, hash_O = row_M[order_M], hash_M[order_M]
        keep_M[order_M[1:]] &= ~((row_O[1:] == row_O[:-1]) & (hash_O[1:] == hash_O[:-1]))
        counted_M = np.cumsum(keep_M)
        start_N = np.cumsum(lengths_N) - lengths_N
        before_N = np.concatenate([[0], counted_M])[start_N]
        place_M = counted_M - 1 - before_N[row_M]
        keep_M &= place_M < width
        hashes_WN[place_M[keep_M], row_M[keep_M]] = hash_M[keep_M]
        present_WN[place_M[keep_M], row_M[keep_M]] = True
    if column.null_count:
        missing_N = column.is_null().to_numpy(zero_copy_only=False)
        hashes_WN[0, missing_N] = NULL_HASH
        present_WN[0, missing_N] = True
    return Values(hashes_WN, present_WN)


def text_values(column: pa.Array, width: int, cut: Callable[[str], Iterable[str]]) -> Values:
    """Return the first `width` distinct pieces into which `cut` divides each text. Each unique text is cut once."""
    encoded = column.dictionary_encode()
    # Nobody checked that a column that came over the wire is UTF-8.
    texts = [raw.decode(errors="replace") for raw in encoded.dictionary.cast(pa.binary()).to_pylist()]
    hashes_WU = np.zeros((width, len(texts) + 1), np.uint64)
    present_WU = np.zeros((width, len(texts) + 1), np.bool_)
    hashes_WU[0, -1], present_WU[0, -1] = NULL_HASH, True
    for unique, text in enumerate(texts):
        distinct = dict.fromkeys(cut(text))
        for place, piece in zip(range(width), distinct, strict=False):
            hashes_WU[place, unique] = xxhash.xxh64_intdigest(piece.encode())
            present_WU[place, unique] = True
    indices = pc.fill_null(encoded.indices, len(texts)) if encoded.indices.null_count else encoded.indices
    index_N = indices.to_numpy(zero_copy_only=False)
    return Values(hashes_WU[:, index_N], present_WU[:, index_N])


def first_present(values: Values, width: int) -> Values:
    """Return the first `width` values that are there of each row, in order."""
    hashes_CN, present_CN = values
    if present_CN is None or len(hashes_CN) <= width:
        return values if len(hashes_CN) <= width else Values(hashes_CN[:width], None)
    place_CN = np.cumsum(present_CN, axis=0) - 1
    combination_K, row_K = np.nonzero(present_CN & (place_CN < width))
    hashes_WN = np.zeros((width, hashes_CN.shape[1]), np.uint64)
    present_WN = np.zeros(hashes_WN.shape, np.bool_)
    place_K = place_CN[combination_K, row_K]
    hashes_WN[place_K, row_K] = hashes_CN[combination_K, row_K]
    present_WN[place_K, row_K] = True
    return Values(hashes_WN, present_WN)
