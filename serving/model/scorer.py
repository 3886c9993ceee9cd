"""Scores N candidates of one context, with the featurizer and the forward pass of training. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import msgspec
import numpy as np
import pyarrow as pa

from headrace.contract.checks.unknown_fields import meant_field, shown, undeclared
from headrace.contract.errors import EventRejected, listed
from headrace.contract.privacy import Privacy
from headrace.contract.project import LISTS, FieldType, Project, Recipe
from headrace.contract.spec import EVENT_TIME, FeatureSpec
from headrace.serving.features import Served
from headrace.serving.model.shared_region import View
from headrace.stream.features.featurize import featurize
from headrace.stream.features.few_rows import Few, Numbers, Same, arrow_of, few_of
from headrace.trainer.model.scoring import Float32s, score

_TAKEN: dict[FieldType, frozenset[type]] = {
    "int64": frozenset({int, type(None)}),
    "float64": frozenset({float, int, type(None)}),
    "string": frozenset({str, type(None)}),
    "bool": frozenset({bool, type(None)}),
    "list[string]": frozenset({type(None)}),
    "list[int64]": frozenset({type(None)}),
}
_EXACT_FLOAT = 2**53
Column: TypeAlias = pa.Array | Few


@lru_cache(maxsize=8)
def spec_of(spec_json: str) -> FeatureSpec:
    """Return the spec that a model was trained on."""
    return msgspec.json.decode(spec_json, type=FeatureSpec)


@lru_cache(maxsize=8)
def inputs_of(spec_json: str) -> frozenset[str]:
    """Return the columns that a spec's features read."""
    return frozenset(name for feature in spec_of(spec_json).features for name in feature.inputs())


@lru_cache(maxsize=8)
def recipe_of(recipe_json: str) -> Recipe:
    """Return the recipe that a model was trained with."""
    return msgspec.json.decode(recipe_json, type=Recipe)


def merge(
    project: Project,
    context: Mapping[str, Any],
    candidates: Sequence[Mapping[str, Any]],
    privacy: Privacy | None = None,
) -> dict[str, Column]:
    """Return the raw columns of all candidates. A candidate's field wins over the context's; a missing one is null.

    Private fields are hashed as the gateway hashes them, or the model would know no feature of them.

    Raises `EventRejected` (`unknown_field`, `bad_type`) that names the field.
    """
    declared, private = project.impression.fields, project.impression.private
    if project.impression.unknown == "refuse":
        for where, name in unknown_fields(project, context, candidates).items():
            meant = meant_field(name, declared)
            raise EventRejected("unknown_field", f"{where} is not declared; declared are {listed(declared)}.{meant}")
    own = frozenset[str]().union(*candidates)
    columns: dict[str, Column] = {}
    for name, kind in declared.items():
        common = context.get(name)
        varies = name in own
        values = [c.get(name, common) for c in candidates] if varies else [common]
        if name in private:
            values = [str(v) if type(v) is int else v or None for v in values]
        if not set(map(type, values)) <= _TAKEN[kind]:
            values = [_fitted(value, name, kind) for value in values]
        try:
            column = few_of(values, kind)
        except (pa.ArrowException, OverflowError) as error:
            raise EventRejected("bad_type", f"field {name!r} must be {kind} or null: {error}.") from error
        if name in private and privacy is not None:
            column = privacy.column(arrow_of(column))
        columns[name] = column if varies else Same(column, len(candidates))
    return columns


def unknown_fields(
    project: Project, context: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], most: int = 100
) -> dict[str, str]:
    """Return fields that the project does not declare, `most` at most: the name of each by where it stands first, such
    as `$.context.pirce`."""
    known = project.impression.fields.keys() | project.impression.private.keys()
    found: dict[str, str] = {}
    if known.issuperset(frozenset[str]().union(context, *candidates)):
        return found
    for where, fields in (("context", context), *((f"candidates[{i}]", c) for i, c in enumerate(candidates))):
        if not fields.keys() <= known:
            names = undeclared(fields, known)
            known |= set(names)
            found |= {f"$.{where}.{shown(name)}": name for name in names[: most - len(found)]}
        if len(found) >= most:
            break
    return found


def _fitted(value: Any, name: str, kind: FieldType) -> Any:
    """Return the value as the gateway takes it: 5.0 is an int64, 5.5 and True are not."""
    if type(value) in _TAKEN[kind]:
        return value
    if isinstance(value, list) and kind in LISTS:
        item: FieldType = "string" if kind == "list[string]" else "int64"
        return [_fitted(one, name, item) for one in value]
    if kind == "int64" and isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT_FLOAT:
        return int(value)
    raise EventRejected("bad_type", f"field {name!r} must be {kind} or null; got {type(value).__name__}.")


def rank(view: View, raw: Mapping[str, Column], served: Served, *, rows: int, event_time_ms: int) -> Float32s:
    """Return the probability of each candidate from one version of the model: float32 [N, T], tasks as the recipe's
    heads.

    Args:
        raw: as `merge` returns.
        served: what `FeatureMemory.look_up` found.
        rows: how many candidates there are.
        event_time_ms: when the request came: the time of the impressions that it makes.
    """
    spec, recipe = spec_of(view.meta.spec_json), recipe_of(view.meta.recipe_json)
    columns = {**raw, **served.columns(inputs_of(view.meta.spec_json))}
    columns[EVENT_TIME] = Same(Numbers(np.array([event_time_ms])), rows)
    slots_NF, numeric_ND = featurize(columns, spec)
    return score(
        recipe,
        spec,
        slots_NF,
        numeric_ND,
        lookup=lambda keys_K: view.lookup(keys_K, seed=recipe.seed, scale=recipe.row_scale, dim=recipe.row_dim),
        dense=view.dense(),
    )
