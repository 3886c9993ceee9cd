"""The one featurizer: raw fields and counters to slot ids and numbers, for stream, trainer, serving and replay.

Pure and columnar: a row's result depends on that row and the specification alone, so any split into batches gives the
same bits. `headrace.contract.spec` describes the kinds of features, and `transforms` computes them.

Legend: N rows, F slots a row, D dense numbers a row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec
import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.errors import InvariantBroken
from headrace.contract.hashing import hash_text
from headrace.contract.spec import PAD, Bucket, Categorical, Cross, Feature, FeatureSpec, Pairs, Rate
from headrace.kernels.hashes import combine
from headrace.stream.features.few_rows import Numbers, Same, Texts
from headrace.stream.features.transforms import Inputs, dense_numbers, pairs_of, slot_values
from headrace.stream.features.values import Columns, U64s

# The tables mark empty places with 0 and -1 pads: neither is ever the slot id of a value.
_LOWEST, _HIGHEST = np.uint64(1), np.uint64(2**64 - 2)


def featurize(columns: Columns, spec: FeatureSpec) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return (slots int64 [N, F], numeric float32 [N, D]), features in the specification's order.

    Args:
        columns: a record batch, or columns by name, Arrow's or those of `few_rows`. Every field that a feature reads
            must be there, of the type that the project declares (counters float32); nulls are welcome.

    A slot id holds the bits of an unsigned hash; it is never 0, and -1 (`PAD`) only where a multi-valued feature has
    fewer values than slots. A missing value has a slot of its own; as a number it is 0. NaN is missing. A number
    beyond float32 becomes infinite, and the learner refuses its sample.

    >>> from headrace.contract.spec import MultiValued
    >>> spec = FeatureSpec(features=(MultiValued(field="tags", values_max=3), MultiValued(field="likes", values_max=2)))
    >>> slots, _ = featurize({"tags": pa.array([["a", "b"], []]), "likes": pa.array([["a"], ["b", "a"]])}, spec)
    >>> slots.shape, (slots == PAD).tolist(), bool(slots[0, 0] == slots[0, 3])
    ((2, 5), [[False, False, True, False, True], [True, True, True, False, False]], False)
    """
    rows = _rows(columns)
    inputs = Inputs(columns, rows)
    inputs.hash_together(_hashed_fields(spec))
    with np.errstate(over="ignore"):
        inputs.rate_together(_rates(spec))
    values_FN = np.empty((spec.slots, rows), dtype=np.uint64)
    numeric_ND = np.empty((rows, spec.numerics), dtype=np.float32)
    pads: list[tuple[int, npt.NDArray[np.bool_]]] = []
    slot = dense = 0
    for feature in spec.features:
        if feature.slots:
            hashes_WN, present_WN = slot_values(feature, inputs)
            values_FN[slot : slot + feature.slots] = hashes_WN
            if present_WN is not None:
                pads.append((slot, ~present_WN))
            slot += feature.slots
        else:
            with np.errstate(over="ignore"):
                for column_N in dense_numbers(feature, inputs):
                    numeric_ND[:, dense] = column_N
                    dense += 1
    slots_NF = np.empty((rows, spec.slots), np.uint64)
    _salted(_salts(spec), values_FN, slots_NF)
    for first, absent_WN in pads:
        slots_NF[:, first : first + len(absent_WN)][absent_WN.T] = np.uint64(PAD % 2**64)
    return slots_NF.view(np.int64), numeric_ND


@numba.njit(cache=True)
def _salted(salts_F: U64s, values_FN: U64s, slots_NF: U64s) -> None:
    """Write each value's slot id: its hash under its slot's salt, between the ids that tables keep for themselves."""
    for f in range(values_FN.shape[0]):
        for n in range(values_FN.shape[1]):
            slots_NF[n, f] = min(max(combine(salts_F[f], values_FN[f, n]), _LOWEST), _HIGHEST)


def split_check(columns: pa.RecordBatch, spec: FeatureSpec, *, step: int = 1) -> None:
    """Raise `InvariantBroken` when a batch cut into pieces of `step` rows gives other bits than the whole.

    For the tests of a project with functions of its own: one that looks at its neighbours is found here.
    """
    whole = featurize(columns, spec)
    for start in range(0, columns.num_rows, step):
        part = featurize(columns.slice(start, step), spec)
        for i, kind in enumerate(("slots", "numbers")):
            if whole[i][start : start + step].tobytes() != part[i].tobytes():
                raise InvariantBroken(
                    f"rows {start} to {start + len(part[i])} have other {kind} alone than among {columns.num_rows}: a "
                    "feature function looks at more than its row."
                )


@lru_cache(maxsize=64)
def _salts(spec: FeatureSpec) -> U64s:
    """Return one salt a slot; all slots of a multi-valued feature share theirs, so that a value is one id in each."""
    salts: list[int] = []
    for feature in spec.features:
        if isinstance(feature, Categorical | Bucket | Cross):
            salts.append(hash_text("\x00".join((type(feature).__name__.lower(), *feature.inputs()))))
        elif isinstance(feature, Pairs):
            space = str(feature.space)
            salts += [hash_text("\x00".join(("pairs", one, two, space))) for one, two in pairs_of(feature)]
        elif feature.slots:
            salts += [hash_text(msgspec.json.encode(_identity(feature)))] * feature.slots
    return np.array(salts, dtype=np.uint64)


def _identity(feature: Feature) -> dict[str, Any]:
    """Return what a feature's ids depend on: all but how many values are kept, so that a bound may grow."""
    plain: dict[str, Any] = msgspec.to_builtins(feature)
    for part in (plain, *plain.get("parts", ())):
        part.pop("values_max", None)
    return plain


@lru_cache(maxsize=64)
def _hashed_fields(spec: FeatureSpec) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for feature in spec.features:
        if isinstance(feature, Categorical | Bucket | Cross | Pairs):
            names.update(dict.fromkeys(feature.inputs()))
    return tuple(names)


@lru_cache(maxsize=64)
def _rates(spec: FeatureSpec) -> tuple[Rate, ...]:
    return tuple(feature for feature in spec.features if isinstance(feature, Rate))


def _rows(columns: Columns) -> int:
    if isinstance(columns, pa.RecordBatch):
        return int(columns.num_rows)
    for column in columns.values():
        match column:
            case Same(rows=rows):
                return rows
            case Numbers(values_N=values_N):
                return len(values_N)
            case Texts(texts=texts):
                return len(texts)
            case _:
                return len(column)
    return 0
