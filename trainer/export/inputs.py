"""What an exported model takes and gives, in words for a program: every input by feature, dtype, shape and how it is
made, and every output. Pure.

From raw events to these inputs it is `headrace.stream.features.featurize` that leads, with the specification that the
manifest holds: nothing of hashing or counting is in the exported model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from headrace.contract.crawl import external_columns
from headrace.contract.errors import InvariantBroken
from headrace.contract.project import Project
from headrace.contract.recipe import Recipe
from headrace.contract.spec import EVENT_TIME, PAD, Feature, FeatureSpec
from headrace.stream.export.columns import FeatureColumn, feature_columns
from headrace.trainer.export.programs import ROWS_AXIS
from headrace.trainer.export.rows import KEYS
from headrace.trainer.export.rows import VALUES as STORED_VALUES
from headrace.trainer.export.torch_scorer import NUMERIC, SLOTS, VALUES
from headrace.trainer.model.scoring import dims_of

FEATURIZE = "headrace.stream.features.featurize.featurize(columns, spec)"
_LOG_ODDS = "the probability of a positive, 0 to 1"
_VALUE = "the expected value of an impression, on the value's own scale"


def describe(recipe: Recipe, features: FeatureSpec, types: Mapping[str, str], *, rows_file: str) -> dict[str, Any]:
    """Return what `inputs.json` says.

    Args:
        types: of every column that a feature may read, see `declared_types`.
        rows_file: where ids are looked up, "" where the model does it itself.
    """
    slots, numerics = features.slots, features.numerics
    ids = {
        "name": SLOTS,
        "dtype": "int64",
        "shape": [ROWS_AXIS, slots],
        "made": f"{FEATURIZE}[0]: a 64-bit hash a place, {PAD} where a feature has no value for its place",
        "columns": list(_columns(features, is_slots=True)),
    }
    values = {
        "name": VALUES,
        "dtype": "float32",
        "shape": [ROWS_AXIS, slots, 1 + recipe.row_dim],
        "made": f"what {rows_file} holds for each id of `look_up.ids`, by the rule of `look_up`",
    }
    numbers = {
        "name": NUMERIC,
        "dtype": "float32",
        "shape": [ROWS_AXIS, numerics],
        "made": f"{FEATURIZE}[1], as it is: the model standardizes what its recipe standardizes",
        "columns": list(_columns(features, is_slots=False)),
    }
    first = [values, numbers] if rows_file else [ids, numbers]
    said: dict[str, Any] = {
        "inputs": first,
        "outputs": [
            {"name": name, "dtype": "float32", "shape": [ROWS_AXIS], "says": _LOG_ODDS if is_odds else _VALUE}
            for name, is_odds in ((name, recipe.objective(name) == "log_loss") for name in recipe.heads)
        ],
        "reads": list(_reads(features, types)),
        "unknown_id": _unknown(recipe),
    }
    if rows_file:
        said["look_up"] = {"ids": ids, "file": rows_file, "keys": KEYS, "values": STORED_VALUES, "order": "ascending"}
    if recipe.slot_dims:
        said["embedding_numbers"] = dims_of(recipe, features).tolist()
    return said


def declared_types(project: Project, features: FeatureSpec) -> dict[str, str]:
    """Return the type of every column that a feature may read: `float32` of counters, else as a project writes it."""
    found: dict[str, str] = {EVENT_TIME: "int64", **project.impression.fields}
    found |= dict.fromkeys(features.counter_columns(), "float32")
    return found | external_columns(project.crawls)


def _columns(features: FeatureSpec, *, is_slots: bool) -> Iterator[dict[str, Any]]:
    """Yield the places of each feature along the input's second axis."""
    for column, feature in _with_features(features):
        if column.is_slots == is_slots:
            yield {
                "name": column.name,
                "first": column.first,
                "width": column.width,
                "reads": list(feature.inputs()),
                "made": _first_line(feature),
                "feature": msgspec.to_builtins(feature),
            }


def _with_features(features: FeatureSpec) -> Iterator[tuple[FeatureColumn, Feature]]:
    """Yield every feature's columns with the feature that makes them."""
    slot = dense = 0
    columns = list(feature_columns(features))
    for feature in features.features:
        begin, width = (slot, feature.slots) if feature.slots else (dense, feature.numerics)
        for column in columns:
            if column.is_slots == bool(feature.slots) and begin <= column.first < begin + width:
                yield column, feature
        slot, dense = slot + feature.slots, dense + feature.numerics


def _first_line(feature: Feature) -> str:
    return (inspect.getdoc(type(feature)) or "").partition("\n")[0]


def _reads(features: FeatureSpec, types: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the columns that featurizing needs, each once."""
    seen: dict[str, None] = {}
    for feature in features.features:
        seen.update(dict.fromkeys(feature.inputs()))
    for name in seen:
        if name not in types:
            raise InvariantBroken(f"a feature reads {name!r}, which the project does not declare.")
        yield {"name": name, "type": types[name]}


def _unknown(recipe: Recipe) -> dict[str, Any]:
    """Return what an id gives that has no row."""
    return {
        "rule": "weight 0, and as embedding the numbers that a row of this key begins with: as serving scores it",
        "function": "headrace.trainer.model.tables.table.initial_values(keys, dim=dim, seed=seed, scale=scale)",
        "dim": recipe.row_dim,
        "seed": recipe.seed,
        "scale": recipe.row_scale,
        "pad": PAD,
        "pad_rule": "zeros",
    }
