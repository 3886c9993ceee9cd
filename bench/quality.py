"""Progressive AUC and log loss over KuaiRand's days: each batch is scored, then learnt, in time order, once.

1. Recipes: the best one is chosen by log loss on the first three days among a small grid, and reported on all days and
   on the days after the third. Groups of features were drafted with all ten days in sight; kept are those that the
   first three days alone would keep (the last columns of the ablation).
2. Ablation: the best recipe without one group of features, and with one choice of it undone.
3. Peers, on the same features (slots as named ids, numbers as numbers), each the best of a small grid, chosen alike:
   Vowpal Wabbit (-l 0.1, 0.25, 0.5, each with and without --ftrl) and River (logistic regression, Adagrad 0.02, 0.1).

`--peers PYTHON` names an environment with vowpalwabbit and river:

    python -m venv /tmp/peers && /tmp/peers/bin/pip install vowpalwabbit river
    python bench/quality.py --data ../shared/data/kuairand --peers /tmp/peers/bin/python
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

sys.path.insert(0, str(Path(__file__).parent))

from harness.figures import Figure, show
from harness.quality_rows import GROUPS, Rows, load, spec_of

from headrace.contract.recipe import Recipe
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.learner import make_learner
from headrace.trainer.recipes import dcn, deepfm, fm, logistic

CHOOSE_DAYS = 3
Floats = npt.NDArray[np.float32]
BEST = dcn(lr_table=0.01, lr_dense=0.003, hidden=(128,), dense_average=0.995, batch_rows=32)


@dataclass(frozen=True)
class Result:
    """One run: what was said before each label was learnt."""

    name: str
    auc: float
    log_loss: float
    auc_rest: float
    log_loss_rest: float
    auc_choice: float
    log_loss_choice: float


def area(said_N: Floats, label_N: Floats) -> float:
    """Return the AUC by ranks, ties half. Source: Mann, Whitney, 1947."""
    _, place_N, count_U = np.unique(said_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(count_U) - (count_U - 1) / 2)[place_N]
    positives = float(label_N.sum())
    negatives = len(label_N) - positives
    return float((rank_N[label_N > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def loss(said_N: Floats, label_N: Floats) -> float:
    """Return the mean log loss in nats."""
    p_N = np.clip(said_N.astype(np.float64), 1e-6, 1 - 1e-6)
    return float(-np.where(label_N > 0, np.log(p_N), np.log(1 - p_N)).mean())


def judged(name: str, said_N: Floats, rows: Rows) -> Result:
    """Return the figures of a run over all days, the days after the choice, and the days of the choice."""
    choice_N = rows.day_N < CHOOSE_DAYS
    parts = [np.ones(len(said_N), bool), ~choice_N if not choice_N.all() else choice_N, choice_N]
    figures = [f(said_N[part], rows.label_N[part]) for part in parts for f in (area, loss)]
    result = Result(name, *figures)
    print(
        f"{name:<44} all {result.auc:.4f} {result.log_loss:.4f}   after day {CHOOSE_DAYS} {result.auc_rest:.4f} "
        f"{result.log_loss_rest:.4f}   first {CHOOSE_DAYS} {result.auc_choice:.4f} {result.log_loss_choice:.4f}",
        flush=True,
    )
    return result


def learnt(name: str, recipe: Recipe, rows: Rows, groups: tuple[str, ...]) -> Result:
    """Score and learn all rows once."""
    spec = spec_of(groups)
    slots_NF, numeric_ND = rows.featurized(spec)
    learner = make_learner(recipe, spec)
    said_N, one_N = np.empty(len(rows.label_N), np.float32), np.ones(len(rows.label_N), np.float32)
    for at in range(0, len(said_N), recipe.batch_rows):
        part = slice(at, at + recipe.batch_rows)
        batch = Batch(slots_NF[part], numeric_ND[part], rows.label_N[part], one_N[part], rows.time_ms_N[part])
        said_N[part] = learner.learn(batch).prediction_B
    return judged(name, said_N, rows)


def first_days(rows: Rows) -> Rows:
    """Return the rows of the days that choices are made on."""
    few_N = rows.day_N < CHOOSE_DAYS
    columns = {name: column.filter(pa.array(few_N)) for name, column in rows.columns.items()}
    return Rows(columns, rows.label_N[few_N], rows.time_ms_N[few_N], rows.day_N[few_N])


def chosen(rows: Rows, groups: tuple[str, ...]) -> Recipe:
    """Return the recipe of the least log loss on the first days, among models, rates, widths and batches."""
    few = first_days(rows)
    grid = [
        model(lr_table=0.01, lr_dense=dense, hidden=hidden, dense_average=0.995, batch_rows=batch)
        for model, dense, hidden, batch in itertools.product(
            (deepfm, dcn), (0.001, 0.003), ((64, 32), (128,)), (32, 64)
        )
    ]
    results = [
        learnt(f"choice: {r.model}, dense {r.lr_dense}, hidden {r.hidden}, batch {r.batch_rows}", r, few, groups)
        for r in grid
    ]
    return grid[int(np.argmin([r.log_loss for r in results]))]


def ablated(best: Recipe, rows: Rows, groups: tuple[str, ...]) -> Iterator[Result]:
    """Yield the best recipe without one thing."""
    for group in groups:
        if group not in ("ids", "rates"):
            yield learnt(f"without {group}", best, rows, tuple(g for g in groups if g != group))
    yield learnt("without any counter", best, rows, ("ids", "profile"))
    yield learnt("without dense_average", _changed(best, dense_average=0.0), rows, groups)
    yield learnt("batches of 512", _changed(best, batch_rows=512), rows, groups)
    common: dict[str, Any] = {"batch_rows": best.batch_rows}
    averaged = {"dense_average": best.dense_average, "lr_dense": best.lr_dense, "lr_table": best.lr_table}
    yield learnt("deepfm", deepfm(**common, **averaged, hidden=best.hidden), rows, groups)
    yield learnt("fm", fm(**common, **averaged, updates="batch"), rows, groups)
    yield learnt("logistic", logistic(**common), rows, groups)


def peers(python: str, rows: Rows, groups: tuple[str, ...]) -> Iterator[tuple[str, Result]]:
    """Yield each peer's best."""
    slots_NF, numeric_ND = rows.featurized(spec_of(groups))
    few = int((rows.day_N < CHOOSE_DAYS).sum())
    plain = str(Path(__file__).parent / "peers" / "quality.py")
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.npz"
        np.savez(data, slots=slots_NF, numbers=numeric_ND, labels=rows.label_N)

        def run(*words: str) -> Floats:
            out = Path(scratch) / "said.npy"
            subprocess.run([python, plain, str(data), str(out), *words], check=True, stdout=subprocess.DEVNULL)
            said_N: Floats = np.load(out)
            return said_N

        grids = {
            "vowpal wabbit": [
                ("vw", f"-l {rate}{extra}")
                for rate, extra in itertools.product(("0.1", "0.25", "0.5"), ("", " --ftrl --ftrl_alpha 0.05"))
            ],
            "river": [("river", rate) for rate in ("0.02", "0.1")],
        }
        for peer, grid in grids.items():
            losses = [loss(run(*words, str(few)), rows.label_N[:few]) for words in grid]
            best = grid[int(np.argmin(losses))]
            yield peer, judged(f"{peer} {' '.join(best[1:])}", run(*best, str(len(rows.label_N))), rows)


def _changed(recipe: Recipe, **changes: Any) -> Recipe:
    return msgspec.structs.replace(recipe, **changes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="KuaiRand's folder, of any number of days")
    parser.add_argument("--quick", action="store_true", help="the first three days, no choice and no ablation")
    parser.add_argument("--peers", default="", metavar="PYTHON", help="the Python that has vowpalwabbit and river")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, groups = time.monotonic(), tuple(GROUPS)
    rows = load(args.data, CHOOSE_DAYS if args.quick else 0)
    print(
        f"{len(rows.label_N):,} rows of {int(rows.day_N.max()) + 1} days, {time.monotonic() - began:.0f} s", flush=True
    )
    best = BEST if args.quick else chosen(rows, groups)
    print(json.dumps({"recipe": msgspec.to_builtins(best)}))
    ours = learnt("headrace", best, rows, groups)
    others = dict(peers(args.peers, rows, groups)) if args.peers else {}
    figures = []
    for field in ("auc", "log_loss", "auc_rest", "log_loss_rest"):
        value, unit = getattr(ours, field), "nats" if "loss" in field else ""
        figures.append(Figure(f"quality_{field}", round(value, 4), unit))
        for peer, result in others.items():
            theirs = getattr(result, field)
            figures.append(
                Figure(
                    f"quality_{field}_vs_{peer.split()[0]}",
                    round(value, 4),
                    unit,
                    peer,
                    round(theirs, 4),
                    round(value / theirs, 4),
                )
            )
    for result in () if args.quick else ablated(best, rows, groups):
        figures.append(Figure(f"quality_auc: {result.name}", round(result.auc, 4), ""))
    show(figures)


if __name__ == "__main__":
    main()
