"""Vowpal Wabbit and River on the rows of bench/quality.py, for the environment that has them.

`quality.py ROWS.npz SAID.npy vw OPTIONS N` or `... river RATE N` learns the first N rows once, in order, and
writes what was said before each label was learnt: float32 [N].
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np


def vowpal_wabbit(rows: Any, options: str, count: int, scratch: Path) -> Any:
    """Return probabilities. Slots are ids of a namespace each, numbers named values of one more."""
    text, said = scratch / "rows.vw", scratch / "said.txt"
    if not text.exists():
        with text.open("w") as file:
            for label, ids, numbers in zip(rows["labels"].tolist(), rows["slots"], rows["numbers"], strict=True):
                words = " ".join(f"|s{i} {key:x}" for i, key in enumerate(ids.view(np.uint64).tolist()))
                values = " ".join(f"n{i}:{value:.5g}" for i, value in enumerate(numbers.tolist()) if value)
                file.write(f"{'1' if label else '-1'} {words} |n {values}\n")
    with text.open() as file:
        part = scratch / f"rows{count}.vw"
        part.write_text("".join(line for _, line in zip(range(count), file, strict=False)))
    words = f"-d {part} --loss_function logistic --link logistic -b 24 --quiet -p {said} {options}"
    subprocess.run(
        [sys.executable, "-c", f"from vowpalwabbit import Workspace; Workspace({words!r}).finish()"], check=True
    )
    return np.loadtxt(said, dtype=np.float32)


def river(rows: Any, rate: str, count: int) -> Any:
    """Return probabilities of River's logistic regression under Adagrad."""
    from river import linear_model, optim

    model = linear_model.LogisticRegression(optim.AdaGrad(float(rate)), intercept_lr=float(rate))
    said = np.empty(count, np.float32)
    for row in range(count):
        features: dict[str, float] = {f"{i}.{key}": 1.0 for i, key in enumerate(rows["slots"][row].tolist())}
        features |= {f"n{i}": value for i, value in enumerate(rows["numbers"][row].tolist())}
        chance = model.predict_proba_one(features)[True]
        said[row] = 0.5 if math.isnan(chance) else chance
        model.learn_one(features, bool(rows["labels"][row]))
    return said


def main() -> None:
    """Learn and write."""
    data, out, kind, option, count = sys.argv[1:]
    rows = dict(np.load(data))
    said = (
        vowpal_wabbit(rows, option, int(count), Path(data).parent) if kind == "vw" else river(rows, option, int(count))
    )
    np.save(out, said)


if __name__ == "__main__":
    main()
