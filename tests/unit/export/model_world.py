"""What tests of the model's export share: a project of many kinds of features, models of it that have learnt, serving's
own scores, and the export's two programs to ask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pyarrow as pa
import torch

from headrace.contract.formats.events import ARROW_TYPES
from headrace.contract.formats.snapshot import FORMAT, Manifest, Weights
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.recipe import Recipe
from headrace.contract.spec import (
    Bucket,
    Categorical,
    Counter,
    Cross,
    FeatureSpec,
    MultiValued,
    Numeric,
    Pairs,
    Quantile,
    Rate,
    Text,
    TimePart,
)
from headrace.serving.model.row_table import split_initial
from headrace.serving.model.shared_region import Meta, SharedModel
from headrace.stream.features.featurize import featurize
from headrace.trainer.export.export import Exported, export_model
from headrace.trainer.export.inputs import declared_types
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.learner import TableLearner, make_learner
from headrace.trainer.model.scoring import score

TASKS = ("click", "like", "dwell")
PROJECT = Project(
    name="taken",
    impression=ImpressionType(
        tag="t.impression",
        key="user",
        fields={
            "user": "int64", "item": "int64", "price": "float64", "paid": "bool", "tags": "list[string]",
            "title": "string",
        },
    ),
    feedback=tuple(FeedbackType(name=name, tag=f"t.{name}", fields={"item": "int64"}) for name in TASKS),
    tasks=tuple(Task(name=name, feedback=name, window_ms=1_000) for name in TASKS),
    features=FeatureSpec(
        counters=(Counter(name="item", key="item", counts=("impression", "click")),),
        features=(
            Categorical(field="item"),
            Cross(fields=("user", "item")),
            MultiValued(field="tags", values_max=3),
            Numeric(field="price"),
            Pairs(fields=("item", "paid", "title")),
            Text(field="title", values_max=2),
            Rate(of="counter.item.click", over="counter.item.impression"),
            TimePart(part="hour"),
            Bucket(field="price", edges=(1.0, 2.0)),
            Quantile(field="price", edges=(0.0, 1.0, 4.0)),
        ),
    ),
).checked()  # fmt: skip
SPEC = PROJECT.features
TYPES = declared_types(PROJECT, SPEC)
ARROW = {**ARROW_TYPES, "float32": pa.float32()}
SMALL: dict[str, Any] = {"dim": 3, "hidden": (5, 4), "init_scale": 0.3}
"""Few numbers, which are large enough to see."""


def events(rng: Random, rows: int, *, ids: int = 12) -> dict[str, pa.Array]:
    """Return raw columns: values that repeat, values that are missing, empty lists, lists with nothing in them."""
    price = pa.array([rng.choice([None, 0.0, -1.0, rng.random() * 5, float("nan")]) for _ in range(rows)])
    columns: dict[str, list[Any]] = {
        "user": [rng.choice([None, rng.randrange(ids)]) for _ in range(rows)],
        "item": [rng.choice([None, rng.randrange(ids), rng.randrange(ids)]) for _ in range(rows)],
        "paid": [rng.choice([None, True, False]) for _ in range(rows)],
        "tags": [rng.choice([None, [], [None], ["a"], ["b", "a", "b"], list("cdefg")]) for _ in range(rows)],
        "title": [rng.choice([None, "", "a", "Big red a", "é"]) for _ in range(rows)],
        "event_time_ms": [rng.randrange(10**12) for _ in range(rows)],
        "counter.item.impression": [float(rng.randrange(9)) for _ in range(rows)],
        "counter.item.click": [float(rng.randrange(3)) for _ in range(rows)],
    }
    found = {name: pa.array(values, ARROW[TYPES[name]]) for name, values in columns.items()}
    return found | {"price": price.cast(pa.float64())}


def learnt(recipe: Recipe, seed: int = 1, steps: int = 5) -> TableLearner:
    """Return a learner of `SPEC` after a few steps."""
    learner, rng = make_learner(recipe.checked(SPEC), SPEC), np.random.default_rng(seed)
    value_T = np.array([name in recipe.values for name in recipe.heads])
    for step in range(steps):
        slots, numeric = featurize(events(Random(seed * 100 + step), 48), SPEC)
        task = rng.integers(0, len(recipe.heads), 48).astype(np.int8)
        label = np.where(
            value_T[task], rng.exponential(3.0, 48) * rng.integers(0, 2, 48), rng.integers(0, 2, 48)
        ).astype(np.float32)
        at_ms = np.full(48, step * 1_000)
        learner.learn(Batch(slots, numeric, label, np.ones(48, np.float32), at_ms, task, at_ms * 48 + np.arange(48)))
    return learner


def manifest_of(recipe: Recipe, spec: FeatureSpec = SPEC) -> Manifest:
    """Return a snapshot's manifest, as the publisher writes it."""
    return Manifest(
        kind="snapshot", model="taken", run="r1", step=5, version="r1-5", positions={"0": [5, 0]}, spec=spec.digest(),
        spec_json=msgspec.json.encode(spec).decode(), recipe_json=msgspec.json.encode(recipe).decode(),
        dim=recipe.row_dim, digest="d" * 64, blob="snapshots/taken/r1-000000000005", created_ms=7,
        format=FORMAT, digest_kind="sum128",
    )  # fmt: skip


def exported(recipe: Recipe, weights: Weights, target: Path, spec: FeatureSpec = SPEC, **how: Any) -> Exported:
    """Export into `target`."""
    types = TYPES | {name: "string" for feature in spec.features for name in feature.inputs() if name not in TYPES}
    return export_model(manifest_of(recipe, spec), weights, target, types=types, **how)


def served(
    recipe: Recipe, weights: Weights, slots: np.ndarray, numeric: np.ndarray, folder: Path, spec: FeatureSpec = SPEC
) -> dict[str, np.ndarray]:
    """Return what serving's shared memory holds and scores of these features, by task."""
    path = folder / "region"
    shared = SharedModel(path, dim=recipe.row_dim, rows_max=1_000, create=True)
    kept = split_initial(weights, recipe)
    manifest = manifest_of(recipe, spec)
    shapes = {name: list(array.shape) for name, array in weights.dense.items()}
    meta = Meta(manifest, manifest.version, manifest.spec_json, manifest.recipe_json, shapes, 1, 0)
    shared.load_snapshot(kept, meta)

    def use(view: Any) -> np.ndarray:
        def lookup(keys: np.ndarray) -> np.ndarray:
            return view.lookup(keys, seed=recipe.seed, scale=recipe.row_scale, dim=recipe.row_dim)

        return score(recipe, spec, slots, numeric, lookup=lookup, dense=view.dense())

    scores, _ = shared.read(use)
    path.unlink()
    return {task: scores[:, t] for t, task in enumerate(recipe.heads)}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file, where they lie on the disk."""
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(begin - 8))
    kinds = {"I64": "<i8", "F32": "<f4"}
    return {
        name: np.memmap(path, kinds[each["dtype"]], "r", begin + each["data_offsets"][0], tuple(each["shape"]))
        for name, each in header.items()
        if name != "__metadata__"
    }


class Programs:
    """Both exported programs of a folder, ready to be asked."""

    def __init__(self, folder: Path) -> None:
        self.said = json.loads((folder / "inputs.json").read_text())
        self.rows = tensors(folder / self.said["look_up"]["file"]) if "look_up" in self.said else None
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.program = torch.export.load(folder / "model.pt2").module()

    def ask(self, slots: np.ndarray, numeric: np.ndarray) -> dict[str, Mapping[str, np.ndarray]]:
        """Return what they say of these features, by program and task."""
        first = slots if self.rows is None else looked_up(self.rows, slots, self.said["unknown_id"])
        names, heads = ([each["name"] for each in self.said[which]] for which in ("inputs", "outputs"))
        by_onnx = self.session.run(heads, dict(zip(names, (first, numeric), strict=True)))
        by_torch = self.program(torch.from_numpy(first), torch.from_numpy(numeric))
        return {
            "onnx": dict(zip(heads, by_onnx, strict=True)),
            "torch": {name: array.numpy() for name, array in by_torch.items()},
        }


def asked(folder: Path, slots: np.ndarray, numeric: np.ndarray) -> dict[str, Mapping[str, np.ndarray]]:
    """Return what both exported programs say of these features, by program and task."""
    return Programs(folder).ask(slots, numeric)


def looked_up(rows: dict[str, np.ndarray], slots: np.ndarray, rule: dict[str, Any]) -> np.ndarray:
    """Return the values of each id by the rule of inputs.json, in plain NumPy."""
    keys, ids = rows["keys"], slots.reshape(-1)
    values = first_values(ids, rule)
    at = np.minimum(np.searchsorted(keys, ids), len(keys) - 1)
    known = keys[at] == ids
    values[known] = rows["values"][at[known]]
    return values.reshape(*slots.shape, 1 + rule["dim"])


def first_values(ids: np.ndarray, rule: dict[str, Any]) -> np.ndarray:
    """Return the values of ids without a row."""
    values = np.zeros((len(ids), 1 + rule["dim"]), np.float32)
    state = mixed(ids.view(np.uint64) ^ mixed(np.array([rule["seed"]], np.uint64)))
    for column in range(1, 1 + rule["dim"]):
        state = mixed(state)
        unit = (state >> np.uint64(11)).astype(np.float64) / 2**53
        values[:, column] = (2 * unit - 1) * np.float64(np.float32(rule["scale"]))
    values[ids == rule["pad"]] = 0
    return values


def mixed(bits: np.ndarray) -> np.ndarray:
    """Return SplitMix64's finalizer."""
    z = bits + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
