"""The same models as one writes them plainly, for bench/trainer.py: naive torch, Vowpal Wabbit, River.

`trainer.py vw FILE BITS ROWS [OPTIONS]` and `trainer.py river FILE ROWS` run in the environment that has
the peer, on the core that the caller pinned, and print one JSON object: samples/s of CPU and by the wall, and the log
loss of what was said before each label was learnt.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any


def vowpal_wabbit(path: str, bits: str, rows: str, *options: str) -> dict[str, float]:
    """Learn from the cache beside `path`, which is made first where it is missing."""
    from vowpalwabbit import Workspace

    cache = f"{path}.{bits}.cache"
    words = f"--data {path} --cache_file {cache} --loss_function logistic -b {bits} --quiet {' '.join(options)}"
    if not Path(cache).exists():
        Workspace(words).finish()
    cpu, wall = time.process_time(), time.perf_counter()
    model = Workspace(words)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    loss = model.get_sum_loss() / int(rows)
    model.finish()
    return {"cpu": int(rows) / cpu, "wall": int(rows) / wall, "log_loss": loss}


def river(path: str, rows: str) -> dict[str, float]:
    """Learn with River's logistic regression from dictionaries that are made before the clock starts."""
    from river import linear_model, optim

    model = linear_model.LogisticRegression(optim.AdaGrad(0.1), intercept_lr=0.1)
    samples, loss = [], 0.0
    with open(path, encoding="utf-8") as file:
        for _, line in zip(range(int(rows)), file, strict=False):
            label, *words = line.replace("|", "").split()
            features = {f"{a}{b}": 1.0 for a, b in zip(words[::2], words[1::2], strict=True)}
            samples.append((features, label == "1"))
    cpu, wall = time.process_time(), time.perf_counter()
    for features, clicked in samples:
        said = model.predict_proba_one(features)[True]
        loss -= math.log(min(max(said if clicked else 1 - said, 1e-6), 1.0))
        model.learn_one(features, clicked)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu": len(samples) / cpu, "wall": len(samples) / wall, "log_loss": loss / len(samples)}


class NaiveDeepFM:
    """DeepFM as the tutorials write it: sparse embeddings under Adagrad, layers under Adam, autograd."""

    def __init__(self, *, ids: int, slots: int, dim: int, hidden: tuple[int, ...]) -> None:
        import torch

        self.torch = torch
        self.linear = torch.nn.Embedding(ids, 1, sparse=True)
        self.embedding = torch.nn.Embedding(ids, dim, sparse=True)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.uniform_(self.embedding.weight, -0.01, 0.01)
        layers: list[Any] = []
        width = slots * dim
        for size in hidden:
            layers += [torch.nn.Linear(width, size), torch.nn.ReLU()]
            width = size
        self.deep = torch.nn.Sequential(*layers, torch.nn.Linear(width, 1))
        tables = [*self.linear.parameters(), *self.embedding.parameters()]
        self.optimizers = [torch.optim.Adagrad(tables, lr=0.02), torch.optim.Adam(self.deep.parameters(), lr=0.001)]

    def learn(self, ids_BF: Any, label_B: Any) -> Any:
        """Take one step and return the log-odds of before it."""
        embedded = self.embedding(ids_BF)
        total = embedded.sum(1)
        pairs = 0.5 * (total * total - (embedded * embedded).sum(1)).sum(1)
        logits = self.linear(ids_BF).sum((1, 2)) + pairs + self.deep(embedded.flatten(1))[:, 0]
        loss = self.torch.nn.functional.binary_cross_entropy_with_logits(logits, label_B, reduction="sum")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for parameter in self.deep.parameters():
            parameter.grad /= len(label_B)
        for optimizer in self.optimizers:
            optimizer.step()
        return logits.detach()


if __name__ == "__main__":
    print(json.dumps({"vw": vowpal_wabbit, "river": river}[sys.argv[1]](*sys.argv[2:])))
