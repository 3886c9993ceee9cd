"""The one featurizer: raw fields and counters to slot ids and numbers, for stream, trainer, serving and replay.

Pure and columnar: a row's result depends on that row and the specification alone, so any split into batches gives the
same bits. `headrace.contract.spec` describes the kinds of features, and `transforms` computes them.

Legend: N rows, F slots a row, D dense numbers a row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

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
    rows, plan = _rows(columns), _plan(spec)
    inputs = Inputs(columns, rows)
    values_FN = np.empty((len(plan.salts_F), rows), dtype=np.uint64)
    numeric_ND = np.empty((rows, plan.numerics), dtype=np.float32)
    pads: list[tuple[int, npt.NDArray[np.bool_]]] = []
    with np.errstate(over="ignore"):
        inputs.hash_together(plan.hashed)
        if plan.rates:
            rate_RN, weight_RN = inputs.rate_together(plan.rates)
            numeric_ND[:, plan.rate_at_R], numeric_ND[:, plan.rate_at_R + 1] = rate_RN.T, weight_RN.T
        for slot, field in plan.categoricals:
            values_FN[slot] = inputs.hashes(field)
        for feature, at, width in plan.others:
            if not width:
                for column, column_N in enumerate(dense_numbers(feature, inputs), at):
                    numeric_ND[:, column] = column_N
                continue
            hashes_WN, present_WN = slot_values(feature, inputs)
            values_FN[at : at + width] = hashes_WN
            if present_WN is not None:
                pads.append((at, ~present_WN))
    slots_NF = np.empty((rows, len(plan.salts_F)), np.uint64)
    _salted(plan.salts_F, values_FN, slots_NF)
    for first, absent_WN in pads:
        slots_NF[:, first : first + len(absent_WN)][absent_WN.T] = np.uint64(PAD % 2**64)
    return slots_NF.view(np.int64), numeric_ND


class _Plan(NamedTuple):
    """What a specification fixes."""

    salts_F: U64s
    numerics: int
    hashed: tuple[str, ...]
    """Columns that are hashed ahead, together."""
    rates: tuple[Rate, ...]
    rate_at_R: npt.NDArray[np.int64]
    """At which of its numbers each rate begins."""
    categoricals: tuple[tuple[int, str], ...]
    """Slot and column."""
    others: tuple[tuple[Feature, int, int], ...]
    """Feature, its first slot and how many it has; of one that gives numbers its first number and 0."""


@lru_cache(maxsize=64)
def _plan(spec: FeatureSpec) -> _Plan:
    slot = dense = 0
    rates, rate_at, categoricals, others = [], [], [], []
    for feature in spec.features:
        if isinstance(feature, Categorical):
            categoricals.append((slot, feature.field))
        elif isinstance(feature, Rate):
            rates.append(feature)
            rate_at.append(dense)
        else:
            others.append((feature, slot if feature.slots else dense, feature.slots))
        slot += feature.slots
        dense += feature.numerics
    return _Plan(
        _salts(spec), dense, _hashed_fields(spec), tuple(rates), np.array(rate_at, np.int64), tuple(categoricals),
        tuple(others),
    )  # fmt: skip


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


def _hashed_fields(spec: FeatureSpec) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for feature in spec.features:
        if isinstance(feature, Categorical | Bucket | Cross | Pairs):
            names.update(dict.fromkeys(feature.inputs()))
    return tuple(names)


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
