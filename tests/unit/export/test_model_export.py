"""Goal: an exported model says what serving says, to 1e-5, and its folder is whole, the same for the same snapshot, and
tells what is in it. Method: models of every family that have learnt raw events; what onnxruntime and `torch.export` say
of other events is held against serving's shared memory; broken modules and writers on purpose."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import torch
from model_world import (
    PROJECT,
    SMALL,
    SPEC,
    TASKS,
    TYPES,
    Programs,
    asked,
    events,
    exported,
    learnt,
    served,
    tensors,
)

from headrace.contract.errors import ConfigRejected, InvariantBroken, Unavailable
from headrace.contract.formats.snapshot import Weights
from headrace.contract.functions import ModelShape, model_function
from headrace.contract.recipe import Recipe
from headrace.contract.spec import PAD, Categorical, FeatureSpec, Numeric
from headrace.stream.features.featurize import featurize
from headrace.trainer import recipes
from headrace.trainer.export import export as exporting
from headrace.trainer.export.export import TOLERANCE, refuse_there
from headrace.trainer.export.torch_scorer import TorchScorer
from headrace.trainer.model.scoring import shapes_of


@model_function("taken_towers", version=1)
def taken_towers(shape: ModelShape) -> torch.nn.Module:
    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(shape.slots * shape.dim + shape.numerics, 6)
            self.last = torch.nn.Linear(6, shape.tasks)

        def forward(self, embedding_BFE, linear_BF, numeric_BD):
            x = torch.cat([embedding_BFE.flatten(1), numeric_BD], dim=1)
            return self.last(torch.tanh(self.first(x))) + linear_BF.sum(1, keepdim=True)

    return Towers()


class Broken(torch.nn.Module):
    """A layer that an exporter does not take."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.weight = how, torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        if self.how == "branch":
            return x * self.weight if float(x.sum().detach()) > 0 else x
        return torch.special.bessel_j0(x) * self.weight


def broken(shape: ModelShape, how: str) -> torch.nn.Module:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = torch.nn.ModuleDict({"odd": Broken(how)})

        def forward(self, embedding_BFE, linear_BF, numeric_BD):
            return self.steps["odd"](linear_BF).sum(1, keepdim=True).expand(-1, shape.tasks)

    return Net()


@model_function("taken_branch", version=1)
def taken_branch(shape: ModelShape) -> torch.nn.Module:
    return broken(shape, "branch")


@model_function("taken_bessel", version=1)
def taken_bessel(shape: ModelShape) -> torch.nn.Module:
    return broken(shape, "bessel")


VALUES = {"objectives": {"like": "tweedie", "dwell": "squared"}}
FAMILIES: dict[str, Recipe] = {
    "logistic": recipes.logistic(),
    "fm": recipes.fm(**SMALL),
    "deepfm": recipes.deepfm(**SMALL),
    "dcn": recipes.dcn(**SMALL | {"cross_rank": 4}),
    "module_of": recipes.module_of("taken_towers", calibrate=True, **SMALL),
    "multitask": recipes.multitask(TASKS, **SMALL, **VALUES),
    "late_positives": recipes.late_positives(recipes.logistic(), weighted=False),
}
"""A recipe of each function of `headrace.trainer.recipes` that changes how a model scores."""
OTHERS: dict[str, Recipe] = {
    "logistic_ftrl": recipes.logistic_ftrl(),
    "weighted": recipes.late_positives(recipes.deepfm(**SMALL)),
    "rare": recipes.rare_positives(recipes.fm(**SMALL), negative_share=0.5),
    "bounded": recipes.bounded(recipes.deepfm(**SMALL), admit_after=2, expire_after_ms=2_000),
    "slots": recipes.dcn(**SMALL, slot_dims={"item": 1, "tags": 0}, slot_optimizers={"item": "ftrl"}),
    "full rank": recipes.dcn(**SMALL | {"cross_rank": 0, "cross_layers": 3}, tasks=TASKS),
    "calibrated": recipes.deepfm(**SMALL, calibrate=True),
    "linear values": recipes.logistic(updates="batch", tasks=TASKS, **VALUES),
    "weighted values": recipes.deepfm(**SMALL, objectives={"click": "weighted"}),
    "modules of tasks": recipes.module_of("taken_towers", **SMALL, tasks=TASKS, objectives={"like": "huber"}),
    "recent": recipes.deepfm(**SMALL, recent_base=True, tasks=("click", "like")),
}


def check(recipe: Recipe, weights: Weights, folder: Path, **how: Any) -> None:
    """Export, and hold both programs against serving on events that the model has and has not seen."""
    done = exported(recipe, weights, folder / "out", **how)
    assert done.inline is not bool(how) or not done.rows
    slots, numeric = featurize(events(Random(77), 120, ids=40), SPEC)
    known = np.isin(slots, weights.keys_K)
    assert known.any() and (~known & (slots != PAD)).any() and (slots == PAD).any()
    wanted = served(recipe, weights, slots, numeric, folder)
    programs = Programs(folder / "out")
    for program, said in programs.ask(slots, numeric).items():
        assert list(said) == list(recipe.heads) == list(done.tasks)
        for task, scores in said.items():
            assert scores.dtype == np.float32 and np.isfinite(wanted[task]).all()
            away = np.abs(scores - wanted[task]) / np.maximum(np.abs(wanted[task]), 1)
            assert away.max() <= TOLERANCE, (program, task, away.max())
            assert np.unique(wanted[task]).size > 20
    # One row and none are answered too.
    for rows in (1, 0):
        for said in programs.ask(slots[:rows], numeric[:rows]).values():
            assert {task: scores.shape for task, scores in said.items()} == dict.fromkeys(recipe.heads, (rows,))


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_says_what_serving_says(name: str, tmp_path: Path) -> None:
    check(FAMILIES[name], learnt(FAMILIES[name]).weights(), tmp_path)


@pytest.mark.parametrize("name", ["logistic", "multitask"])
def test_rows_that_are_looked_up_and_came_in_half_the_bytes_say_the_same(name: str, tmp_path: Path) -> None:
    check(FAMILIES[name], halved(learnt(FAMILIES[name]).weights()), tmp_path, inline_bytes=0)


def halved(weights: Weights) -> Weights:
    """Return the weights with rows as float16 keeps them."""
    return Weights(weights.keys_K, weights.values_KV.astype(np.float16).astype(np.float32), weights.dense)


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("how", [{}, {"inline_bytes": 0}], ids=["inline", "looked up"])
def test_other_recipes_say_the_same(name: str, how: dict[str, int], tmp_path: Path) -> None:
    check(OTHERS[name], learnt(OTHERS[name]).weights(), tmp_path, **how)


def test_an_empty_table_and_one_row(tmp_path: Path) -> None:
    recipe = recipes.fm(dim=1, init_scale=0.3)
    weights = learnt(recipe).weights()
    slots, numeric = featurize(events(Random(5), 30), SPEC)
    for rows, how in ((0, {}), (1, {}), (1, {"inline_bytes": 0})):
        some = Weights(weights.keys_K[:rows], weights.values_KV[:rows], weights.dense)
        folder = tmp_path / f"{rows}{len(how)}"
        assert exported(recipe, some, folder, **how).rows == rows
        wanted = served(recipe, some, slots, numeric, tmp_path)["click"]
        for said in asked(folder, slots, numeric).values():
            np.testing.assert_allclose(said["click"], wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["ids", "numbers"])
def test_models_of_ids_alone_and_of_numbers_alone(kind: str, tmp_path: Path) -> None:
    only = Categorical(field="item") if kind == "ids" else Numeric(field="price")
    spec, rng = FeatureSpec(features=(only,)), np.random.default_rng(3)
    slots, numeric = featurize(events(Random(5), 30), spec)
    for recipe in (recipes.logistic(), recipes.dcn(dim=1, hidden=(3,), init_scale=0.3)):
        dense = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes_of(recipe, spec).items()}
        keys = np.unique(slots)[:4]
        weights = Weights(keys, rng.normal(size=(len(keys), 1 + recipe.row_dim)).astype(np.float32), dense)
        out = tmp_path / f"{recipe.model}-{kind}"
        exported(recipe, weights, out, spec)
        wanted = served(recipe, weights, slots, numeric, tmp_path, spec)["click"]
        for said in asked(out, slots, numeric).values():
            np.testing.assert_allclose(said["click"], wanted, rtol=0, atol=TOLERANCE)


def test_a_number_that_no_model_takes_is_said_as_serving_says_it(tmp_path: Path) -> None:
    recipe = FAMILIES["multitask"]
    weights = learnt(recipe).weights()
    exported(recipe, weights, tmp_path / "out")
    slots, numeric = featurize(events(Random(5), 4), SPEC)
    numeric[0, 0], numeric[1, 1], numeric[2, 2] = np.inf, -np.inf, np.nan
    wanted = served(recipe, weights, slots, numeric, tmp_path)
    for said in asked(tmp_path / "out", slots, numeric).values():
        for task in TASKS:
            assert np.isnan(wanted[task][:3]).all() and np.isfinite(wanted[task][3])
            np.testing.assert_allclose(said[task], wanted[task], rtol=TOLERANCE, atol=TOLERANCE)


def test_tasks_may_be_called_as_anything_within_the_models(tmp_path: Path) -> None:
    names = ("add", "v3", "exp", "é.x", "kept_rows", "rows", "n0.1")
    recipe = recipes.logistic(task="v3", updates="batch", tasks=names)
    weights = learnt(recipe).weights()
    exported(recipe, weights, tmp_path / "out")
    slots, numeric = featurize(events(Random(5), 9), SPEC)
    wanted = served(recipe, weights, slots, numeric, tmp_path)
    for said in asked(tmp_path / "out", slots, numeric).values():
        for task in names:
            np.testing.assert_allclose(said[task], wanted[task], rtol=0, atol=TOLERANCE)
    taken = recipes.logistic(task="slots")
    with pytest.raises(ConfigRejected, match="task 'slots' is called as an input"):
        exported(taken, learnt(taken).weights(), tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


AGAIN = """
import sys
from pathlib import Path
sys.path[:0] = [{worlds!r}]
from model_world import SMALL, exported, learnt
from headrace.trainer import recipes
recipe = recipes.deepfm(**SMALL)
for name, how in (("inline", {{}}), ("looked-up", {{"inline_bytes": 0}})):
    exported(recipe, learnt(recipe).weights(), Path({out!r}) / name, **how)
"""


def test_the_same_snapshot_gives_the_same_bytes_in_another_process_and_place(tmp_path: Path) -> None:
    recipe = FAMILIES["deepfm"]
    other = tmp_path / "elsewhere"
    program = AGAIN.format(worlds=str(Path(__file__).parent), out=str(other))
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": "77"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    weights = learnt(recipe).weights()
    # Rows of a table lie in an order that depends on history.
    turned = Weights(weights.keys_K[::-1].copy(), weights.values_KV[::-1].copy(), weights.dense)
    for name, how in (("inline", {}), ("looked-up", {"inline_bytes": 0})):
        exported(recipe, turned, tmp_path / name, **how)
        assert digests(tmp_path / name) == digests(other / name)
        for path in (tmp_path / name).iterdir():
            text = path.read_bytes()
            assert str(tmp_path).encode() not in text and str(Path(__file__).parents[3]).encode() not in text, path


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_folder_tells_what_is_in_it(tmp_path: Path) -> None:
    recipe, out = FAMILIES["multitask"], tmp_path / "out"
    weights = learnt(recipe).weights()
    done = exported(recipe, weights, out, inline_bytes=0)
    manifest, said = (json.loads((out / f"{name}.json").read_text()) for name in ("manifest", "inputs"))
    assert (done.version, done.chain, done.seq, done.digest) == ("r1-5", "r1-5", 0, "d" * 64)
    assert manifest["version"] == "r1-5" and manifest["tasks"] == list(TASKS) and manifest["task"] == "click"
    there = digests(out)
    del there["manifest.json"]
    assert {file["name"]: file["sha256"] for file in manifest["files"]} == there
    assert all((out / file["name"]).stat().st_size == file["bytes"] for file in manifest["files"])
    # Every place of the inputs has one feature, and the shapes are those of the model.
    ids, numbers = said["look_up"]["ids"], said["inputs"][1]
    for each, width in ((ids, SPEC.slots), (numbers, SPEC.numerics)):
        places = [column["first"] + i for column in each["columns"] for i in range(column["width"])]
        assert places == list(range(width)) and each["shape"] == ["rows", width]
        assert all(column["made"] and column["name"].startswith("feature.") for column in each["columns"])
    model = onnx.load(out / "model.onnx")
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    assert {each["name"]: each["shape"] for each in said["inputs"]} == shapes
    assert {p.key: p.value for p in model.metadata_props}["headrace.version"] == "r1-5"
    assert {each["name"]: each["type"] for each in said["reads"]}.items() <= TYPES.items()
    reads = {name for feature in PROJECT.features.features for name in feature.inputs()}
    assert {each["name"] for each in said["reads"]} == reads
    assert [each["says"].partition(" ")[2][:5] for each in said["outputs"]] == ["proba", "expec", "expec"]
    # The rows, to look into and to look up.
    rows, order = pq.read_table(out / "rows.parquet"), np.argsort(weights.keys_K)
    found = tensors(out / "rows.safetensors")
    assert rows["key"].to_pylist() == found["keys"].tolist() == weights.keys_K[order].tolist()
    assert found["values"].tobytes() == weights.values_KV[order].tobytes()
    assert [[w, *e] for w, e in zip(rows["weight"].to_pylist(), rows["embedding"].to_pylist(), strict=True)] == (
        weights.values_KV[order].tolist()
    )


@pytest.mark.parametrize(
    ("module", "by"), [("taken_branch", "torch.export"), ("taken_bessel", "ONNX")], ids=["branch", "operation"]
)
def test_a_module_that_cannot_be_exported_is_refused_by_the_name_of_its_layer(
    module: str, by: str, tmp_path: Path
) -> None:
    recipe = recipes.module_of(module, **SMALL)
    with pytest.raises(ConfigRejected, match=rf"module '{module}' .* layer 'steps.odd' \(Broken\) .* by {by}"):
        exported(recipe, learnt(recipe).weights(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_program_that_says_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchScorer, "_first_values", lambda self, slots: torch.zeros(*slots.shape, self.width))
    recipe = recipes.fm(dim=1, init_scale=0.3)
    with pytest.raises(InvariantBroken, match=r"model.onnx says .* another thing than the model"):
        exported(recipe, learnt(recipe).weights(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = FAMILIES["logistic"], tmp_path / "out"
    weights = learnt(recipe).weights()

    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_parquet", full)
        with pytest.raises(Unavailable, match="the disk is full"):
            exported(recipe, weights, out)
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ConfigRejected, match="is there already"):
        exported(recipe, weights, out)
    (out / "mine").unlink()
    exported(recipe, weights, out)
    before = digests(out)
    with pytest.raises(ConfigRejected, match="is there already"):
        refuse_there(out)
    assert digests(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_remedy(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigRejected, match=rf"{missing} is not installed: pip install 'headrace\[export\]'"):
        exported(FAMILIES["logistic"], learnt(FAMILIES["logistic"]).weights(), tmp_path / "out")
