"""The hash of a sample's id, by which seals count, and its sums. Pure, columnar.

A sample is an impression, a task, and whether it corrects a negative: hash = SplitMix64(XXH64(impression) xor
XXH64(task, seed 0, or 1 for a correction)). It is part of stored formats: a sample has the same hash for ever.

Legend: N samples, T tasks, 2 whether it corrects.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.formats.seals import Seal
from headrace.contract.hashing import hash_text
from headrace.kernels.arrays import I32s, I64s, U8s, U64s
from headrace.kernels.hashes import hash64_texts, mix

Rows: TypeAlias = Any
"""A record batch or a table."""


def id_hashes(rows: Rows) -> U64s:
    """Return the hash of each sample's id: uint64 [N]. `rows` have `event_id`, `task` and, perhaps, `correction`."""
    code_N, names = _tasks(rows)
    return _hashes(rows, code_N, names)


def seal_of(rows: Rows) -> dict[str, Seal]:
    """Return the seal of these samples, by task."""
    code_N, names = _tasks(rows)
    counts_T, sums_T = np.zeros(len(names), np.int64), np.zeros(len(names), np.uint64)
    _add_up(_hashes(rows, code_N, names), code_N, counts_T, sums_T)
    return {name: Seal(int(counts_T[t]), int(sums_T[t])) for t, name in enumerate(names) if counts_T[t]}


def sum_of(hash_N: U64s) -> int:
    """Return the sum of hashes modulo 2**64."""
    return int(np.add.reduce(hash_N, dtype=np.uint64)) if len(hash_N) else 0


def _tasks(rows: Rows) -> tuple[I32s, list[str]]:
    tasks = pc.dictionary_encode(_column(rows, "task"))
    return tasks.indices.to_numpy(), tasks.dictionary.to_pylist()


def _hashes(rows: Rows, code_N: I32s, names: list[str]) -> U64s:
    hash_N = hash64_texts(_column(rows, "event_id"))
    salts_T2 = np.array([_salts(name) for name in names], np.uint64).reshape(len(names), 2)
    _salt(hash_N, code_N, _corrections(rows), salts_T2)
    return hash_N


@lru_cache(maxsize=256)
def _salts(task: str) -> tuple[int, int]:
    return hash_text(task, salt=0), hash_text(task, salt=1)


def _column(rows: Rows, name: str) -> pa.Array:
    column = rows[name]
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    # A column of one chunk may come back as a list of it.
    array = pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole
    return array if array.type == pa.string() else array.cast(pa.string())


def _corrections(rows: Rows) -> U8s:
    if rows.schema.get_field_index("correction") < 0:
        return np.zeros(rows.num_rows, np.uint8)
    filled = pc.fill_null(rows["correction"], False).cast(pa.uint8())
    corrections_N: npt.NDArray[np.uint8] = filled.to_numpy()
    return corrections_N


@numba.njit(cache=True)
def _salt(hash_N: U64s, code_N: I32s, corrects_N: U8s, salts_T2: U64s) -> None:
    for n in range(hash_N.shape[0]):
        hash_N[n] = mix(hash_N[n] ^ salts_T2[code_N[n], corrects_N[n]])


@numba.njit(cache=True)
def _add_up(hash_N: U64s, code_N: I32s, counts_T: I64s, sums_T: U64s) -> None:
    for n in range(hash_N.shape[0]):
        counts_T[code_N[n]] += 1
        sums_T[code_N[n]] += hash_N[n]
