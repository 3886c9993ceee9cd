"""Samples/s of one thread, and the log loss of what was said before each label was learnt.

1. DeepFM, 26 slots x 16 and layers 128-64, on a seeded stream (ids by a power law, 10 to 1,000,000 a slot, labels from
   hidden weights), beside the same model in naive torch: Embedding(sparse) + Adagrad, Adam, autograd, batches alike.
2. Logistic regression and a factorization machine on KuaiRand's ten days (12 features, in time order), beside Vowpal
   Wabbit's logistic regression reading its cache and River's from dictionaries. Ours gets batches of slot ids: what a
   cache holds. VW has the best of -l 0.25, 0.5 (its default) and 1 by log loss on this stream; ours is the recipe.

Sides take turns on core 0, each alone; a figure is the median of the rounds, by CPU time of the process (VW's parser is
a thread of its own) and by the wall. `--peers PYTHON` names an environment with vowpalwabbit and river:

    python -m venv /tmp/peers && /tmp/peers/bin/pip install vowpalwabbit river
    python bench/trainer.py --data ../shared/data/kuairand --peers /tmp/peers/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import torch

sys.path.insert(0, str(Path(__file__).parent))

from harness.figures import Figure, show
from peers.trainer import NaiveDeepFM

from headrace.contract.recipe import Recipe
from headrace.contract.spec import Categorical, FeatureSpec
from headrace.stream.features.featurize import featurize
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.learner import make_learner
from headrace.trainer.recipes import deepfm, fm, logistic, logistic_ftrl

SLOTS, DIM, HIDDEN = 26, 16, (128, 64)
NAMES = (
    *("user_id", "video_id", "author_id", "tab", "tag", "upload_type", "video_type", "user_active_degree"),
    *("duration", "music_id", "music_type", "register_days_range"),
)
DURATIONS = (5e3, 7e3, 1e4, 1.5e4, 2e4, 3e4, 4.5e4, 6e4, 9e4, 1.2e5, 1.8e5, 3e5)
Floats = npt.NDArray[np.float32]
Result = dict[str, float]


def categorical(names: tuple[str, ...]) -> FeatureSpec:
    """Return a spec of one slot a name."""
    return FeatureSpec(features=tuple(Categorical(field=name) for name in names))


def log_loss(said_N: Floats, label_N: Floats) -> float:
    """Return the mean log loss in nats."""
    p_N = np.clip(said_N.astype(np.float64), 1e-6, 1 - 1e-6)
    return float(-np.where(label_N > 0, np.log(p_N), np.log(1 - p_N)).mean())


def timed(step: Callable[[int, int], Floats], label_N: Floats, batch_rows: int, warm_rows: int) -> Result:
    """Learn all rows in batches; the rates leave out the first `warm_rows`, the loss leaves out nothing."""
    said_N, rows = np.empty(len(label_N), np.float32), len(label_N)
    cpu = wall = 0.0
    began = -1
    for at in range(0, rows, batch_rows):
        if began < 0 and at >= warm_rows:
            began, cpu, wall = at, time.process_time(), time.perf_counter()
        said_N[at : at + batch_rows] = step(at, min(at + batch_rows, rows))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu": (rows - began) / cpu, "wall": (rows - began) / wall, "log_loss": log_loss(said_N, label_N)}


def ours(recipe: Recipe, names: tuple[str, ...], slots_NF: npt.NDArray[np.int64], label_N: Floats, warm: int) -> Result:
    """Learn with the recipe's learner."""
    learner = make_learner(recipe, categorical(names))
    none_ND, one_N = np.zeros((len(label_N), 0), np.float32), np.ones(len(label_N), np.float32)
    time_N = np.arange(len(label_N))

    def step(a: int, b: int) -> Floats:
        return learner.learn(Batch(slots_NF[a:b], none_ND[a:b], label_N[a:b], one_N[a:b], time_N[a:b])).prediction_B

    return timed(step, label_N, recipe.batch_rows, warm)


def naive(recipe: Recipe, ids_NF: npt.NDArray[np.int64], label_N: Floats, warm: int) -> Result:
    """Learn with naive torch."""
    model = NaiveDeepFM(ids=int(ids_NF.max()) + 1, slots=SLOTS, dim=DIM, hidden=HIDDEN)
    ids, labels = torch.from_numpy(ids_NF), torch.from_numpy(label_N)

    def step(a: int, b: int) -> Floats:
        said: Floats = torch.sigmoid(model.learn(ids[a:b], labels[a:b])).numpy()
        return said

    return timed(step, label_N, recipe.batch_rows, warm)


def stream(rows: int, seed: int = 7) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats]:
    """Return slot ids, the same as numbers of an embedding's rows, and labels."""
    random = np.random.default_rng(seed)
    sizes = np.geomspace(10, 1_000_000, SLOTS).astype(np.int64)
    value_NF = np.minimum((sizes ** random.random((rows, SLOTS))).astype(np.int64), sizes) - 1
    ids_NF = value_NF + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    hidden = (random.normal(size=int(sizes.sum())) * 0.4).astype(np.float32)
    chance_N = 1 / (1 + np.exp(1.0 - hidden[ids_NF].sum(axis=1)))
    label_N = (random.random(rows) < chance_N).astype(np.float32)
    # Numbers of rows lie close together; ids of slots are hashes.
    slots_NF = (ids_NF.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)).view(np.int64)
    return slots_NF, ids_NF, label_N


def kuairand(folder: Path, out: Path) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return slot ids and labels in time order, and write the same rows for VW and River."""
    rows = pa.csv.read_csv(next(iter(sorted(folder.glob("impressions_*.csv.gz")))))
    columns = dict(zip(rows.column_names, rows.columns, strict=True))
    for name, key in (("users.csv.gz", "user_id"), ("videos.csv.gz", "video_id")):
        table = pa.csv.read_csv(folder / name)
        at = pc.index_in(rows[key], value_set=table[key].combine_chunks())
        columns |= {c: table[c].take(at) for c in table.column_names if c != key}
    edge = np.searchsorted(np.array(DURATIONS), rows["duration_ms"].to_numpy(), side="right")
    columns["duration"] = pa.chunked_array([pa.array(edge)])
    raw = {name: columns[name].combine_chunks() for name in NAMES}
    slots_NF, _ = featurize(raw, categorical(NAMES))
    label_N = rows["is_click"].to_numpy().astype(np.float32)
    texts = [pc.fill_null(raw[name].cast(pa.string()), "none").to_pylist() for name in NAMES]
    with open(out, "w", encoding="utf-8") as file:
        for label, *values in zip(label_N.tolist(), *texts, strict=True):
            words = (f"|{chr(97 + i)} {value.translate(_CLEAN) or 'none'}" for i, value in enumerate(values))
            file.write(f"{'1' if label else '-1'} {' '.join(words)}\n")
    return slots_NF, label_N


_CLEAN = str.maketrans({" ": "_", ":": "_", "|": "_", "\n": "_"})


def peer(python: str, *words: str) -> Result:
    """Run a peer in its own environment and process."""
    plain = str(Path(__file__).parent / "peers" / "trainer.py")
    done = subprocess.run([python, plain, *words], capture_output=True, text=True, check=True)
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found


def tell(name: str, mine: list[Result], peer_name: str = "", theirs: list[Result] | None = None) -> Iterator[Figure]:
    """Yield rate by CPU, by the wall and log loss, beside a peer's."""
    for key, unit in (("cpu", "samples/s"), ("wall", "samples/s"), ("log_loss", "nats")):
        value = median(result[key] for result in mine)
        label = f"{name}_log_loss" if key == "log_loss" else f"{name}_per_{key}_second"
        if theirs:
            other = median(result[key] for result in theirs)
            yield Figure(label, round(value, 4), unit, peer_name, round(other, 4), round(value / other, 3))
        else:
            yield Figure(label, round(value, 4), unit)


def deep(rows: int, rounds: int) -> Iterator[Figure]:
    """Measure DeepFM beside naive torch."""
    slots_NF, ids_NF, label_N = stream(rows)
    recipe = deepfm(dim=DIM, hidden=HIDDEN, batch_rows=512)
    mine, theirs = [], []
    names = tuple(f"c{i}" for i in range(SLOTS))
    ours(recipe, names, slots_NF[:4_096], label_N[:4_096], 0)  # compiles
    for _ in range(rounds):
        mine.append(ours(recipe, names, slots_NF, label_N, rows // 5))
        theirs.append(naive(recipe, ids_NF, label_N, rows // 5))
    yield from tell("deepfm", mine, "naive torch", theirs)


def linear_models(folder: Path, python: str, rounds: int, river_rows: int) -> Iterator[Figure]:
    """Measure the linear models and the factorization machine beside Vowpal Wabbit and River."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kuairand.vw"
        slots_NF, label_N = kuairand(folder, path)
        rows = str(len(label_N))
        recipes = {
            "logistic": logistic(),
            "logistic_by_batch": logistic(updates="batch", lr_table=0.1, l2_table=0.0, lr_dense=0.003, batch_rows=64),
            "logistic_ftrl": logistic_ftrl(),
            "fm": fm(),
        }
        mine: dict[str, list[Result]] = {name: [] for name in recipes}
        vw: dict[str, list[Result]] = {rate: [] for rate in ("0.25", "0.5", "1")}
        others: list[Result] = []
        for recipe in recipes.values():
            ours(recipe, NAMES, slots_NF[:4_096], label_N[:4_096], 0)
        for _ in range(rounds):
            for name, recipe in recipes.items():
                mine[name].append(ours(recipe, NAMES, slots_NF, label_N, 0))
            if python:
                for rate, found in vw.items():
                    found.append(peer(python, "vw", str(path), "20", rows, f"-l {rate}"))
                others.append(peer(python, "river", str(path), str(river_rows)))
        best = min(vw.values(), key=lambda found: found[0]["log_loss"] if found else 0.0)
        for name, found in mine.items():
            yield from tell(name, found, "vowpal wabbit", best)
        if others:
            yield from tell(
                f"logistic_first_{river_rows}", [_first(mine, slots_NF, label_N, river_rows)], "river", others
            )


def _first(mine: dict[str, list[Result]], slots_NF: npt.NDArray[np.int64], label_N: Floats, rows: int) -> Result:
    """Return what the logistic recipe does on the first rows alone, at the rates of the whole stream."""
    part = ours(logistic(), NAMES, slots_NF[:rows], label_N[:rows], 0)
    return {key: median(r[key] for r in mine["logistic"]) for key in ("cpu", "wall")} | {"log_loss": part["log_loss"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one round of 200,000 samples instead of three of 1,000,000"
    )
    parser.add_argument("--data", type=Path, help="KuaiRand's folder; without it only DeepFM is measured")
    parser.add_argument("--peers", default="", metavar="PYTHON", help="the Python that has vowpalwabbit and river")
    args = parser.parse_args()
    os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    rows, rounds = (200_000, 1) if args.quick else (1_000_000, 3)
    figures = list(deep(rows, rounds))
    if args.data:
        figures += linear_models(args.data, args.peers, rounds, 20_000 if args.quick else 167_281)
    show(figures)


if __name__ == "__main__":
    main()
