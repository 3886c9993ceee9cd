"""Goal: a task that learns a value runs from its declaration to the served score, whatever the objective and policy.

Method: items with known rates and mean values; the whole loop in memory. What /v1/rank says of each item must be near
its true mean value, on the value's own scale, and the trainer's figures must be told.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving_world import Client
from trainer_world import TOPICS
from trainer_world import World as TrainerWorld

from headrace.backends.clock import VirtualClock
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import JoinConfig, ServeConfig
from headrace.contract.formats.events import (
    Punctuation,
    batch_from_rows,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.formats.sample import format_position
from headrace.contract.interfaces.log import Record
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, FeatureSpec, Numeric
from headrace.replay.as_trained import as_trained
from headrace.serving.api.app import ServingApp, make_app
from headrace.serving.api.dependencies import ServingDependencies
from headrace.serving.features import FeatureMemory
from headrace.serving.model.shared_region import SharedModel
from headrace.serving.model.updater import Updater
from headrace.stream.join.join import JoinState
from headrace.trainer.recipes import multitask
from headrace.trainer.run import Trainer

JOIN = JoinConfig(early_feedback_ms=2_000)


@dataclass(frozen=True)
class Shown:
    """One impression and what came of it: feedback by type, how long after, and its value."""

    time_ms: int
    fields: dict[str, Any]
    feedback: tuple[tuple[str, int, float | None], ...] = ()


class Loop:
    """One partition of a project. `tick_ms` of event time go into a record; the trainer takes a turn after each."""

    def __init__(self, project: Project, *, tick_ms: int = 200, begin_ms: int = 1_000_000) -> None:
        self.project, self.tick_ms = project, tick_ms
        self.world = TrainerWorld(clock=VirtualClock(begin_ms))
        self.join = JoinState(project, JOIN, silent_ms=1_000, partition=0)
        self.metrics = MemoryMetrics()
        self.trainer = Trainer(self.world.deps(project=project, metrics=self.metrics))
        self.trainer.recover()
        self._offset = 0
        self.samples: list[Any] = []

    def run(self, shown: Sequence[Shown]) -> None:
        """Let impressions and feedback come at their times, until the last window has passed."""
        events: list[tuple[int, str, dict[str, Any]]] = []
        for n, one in enumerate(shown):
            key = str(one.fields[self.project.impression.key])
            lead = {"request_id": f"r{n}", "place": 0, "key": key}
            row = {"event_id": f"i{n}", "event_time_ms": one.time_ms, **lead, **one.fields}
            events.append((one.time_ms, "impression", row))
            for kind, after_ms, value in one.feedback:
                at_ms = one.time_ms + after_ms
                row = {"event_id": f"{kind}{n}", "event_time_ms": at_ms, "value": value, **lead}
                declared = next(f.fields for f in self.project.feedback if f.name == kind)
                events.append((at_ms, kind, row | {name: one.fields.get(name) for name in declared}))
        events.sort(key=lambda event: event[0])
        wait_ms = max(task.window_ms + task.correct_ms for task in self.project.tasks)
        at, now_ms = 0, events[0][0]
        while now_ms < events[-1][0] + wait_ms + 2 * self.tick_ms:
            now_ms += self.tick_ms
            tick = []
            while at < len(events) and events[at][0] < now_ms:
                tick.append(events[at])
                at += 1
            self._tick(tick, now_ms)

    def _tick(self, events: Iterable[tuple[int, str, dict[str, Any]]], now_ms: int) -> None:
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for _, kind, row in events:
            by_kind.setdefault(kind, []).append(row)
        for kind, rows in sorted(by_kind.items(), key=lambda item: item[0] != "impression"):
            if kind == "impression":
                schema, headers = impression_schema(self.project), {"kind": "impression"}
            else:
                declared = next(f for f in self.project.feedback if f.name == kind)
                schema, headers = feedback_schema(self.project, declared), {"kind": "feedback", "type": kind}
            self._take(encode_batch(batch_from_rows(rows, schema)), headers)
        self._take(encode_punctuation(Punctuation("g", 1, now_ms)), {"kind": "punctuation"})
        self.world.clock.advance(self.tick_ms / 1_000)
        while self.trainer.turn():
            pass
        self.trainer._tell()

    def _take(self, value: bytes, headers: dict[str, str]) -> None:
        emitted = self.join.take(Record("events", 0, self._offset, None, value, headers, 0))
        self._offset += 1
        if emitted is not None:
            lead = {"after": format_position(emitted.after), "last": format_position(emitted.last)}
            self.world.log.append(TOPICS.samples, 0, encode_batch(emitted.batch), None, lead)
            self.samples += emitted.batch.to_pylist()

    def serve(self, folder: Path) -> Client:
        """Return who asks a serving process that has taken the trainer's newest model."""
        recipe = self.project.recipe
        self.trainer.close()
        shared = SharedModel(folder / "model", dim=recipe.row_dim, rows_max=100_000, create=True)
        updater = Updater(
            project=self.project, topics=TOPICS, shared=shared, reader=self.world.log.reader(), blobs=self.world.blobs,
            metrics=MemoryMetrics(), clock=self.world.clock, stop=threading.Event(),
        )  # fmt: skip
        for _ in range(8):
            updater.step(0.0)
        features = FeatureMemory()
        features.is_caught_up = True
        deps = ServingDependencies(
            project=self.project, config=ServeConfig(candidates_max=500), shared=shared, features=features,
            metrics=MemoryMetrics(), metrics_text=lambda: b"", clock=self.world.clock, impressions=None,
        )  # fmt: skip
        return Client(make_app(ServingApp(deps)))


def asked(client: Client, candidates: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return what /v1/rank says of candidates: the main task's under ""."""
    answer = client.post("/v1/rank", json={"request_id": "q", "context": {}, "candidates": list(candidates)})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return {"": np.array(body["scores"]), **{name: np.array(s) for name, s in body.get("tasks", {}).items()}}


torch.set_num_threads(1)
RATE_I = np.array([0.1, 0.2, 0.3, 0.4])
MEAN_I = np.array([40.0, 30.0, 60.0, 90.0])
"""Of a sale; so an impression's value is 4, 6, 18 and 36."""
POLICIES = {
    "window": {},
    "eager": {"policy": "eager"},
    "corrected": {"correct_ms": 3_000},
}


def project_of(objective: str, policy: dict, *, recipe=None) -> Project:
    tasks = ("sale", "revenue")
    chosen = recipe or multitask(tasks, objectives={"revenue": objective}, dim=4, hidden=(8,), lr_table=0.05)
    return Project(
        impression=ImpressionType(tag="i", key="user", fields={"user": "int64", "item": "int64", "price": "float64"}),
        feedback=(FeedbackType(name="sale", tag="s"),),
        tasks=(
            Task(name="sale", feedback="sale", window_ms=2_000),
            Task(name="revenue", feedback="sale", window_ms=2_000, **policy),
        ),
        features=FeatureSpec(features=(Categorical(field="item"), Numeric(field="price"))),
        recipe=chosen,
    ).checked()


def shown(count: int, *, late: bool, seed: int = 3) -> list[Shown]:
    """Return impressions; with `late` a third of the sales come after the window."""
    rng = np.random.default_rng(seed)
    out = []
    for n in range(count):
        item = int(rng.integers(4))
        sale = ()
        if rng.random() < RATE_I[item]:
            after_ms = (
                int(rng.integers(2_100, 4_500)) if late and rng.random() < 0.33 else int(rng.integers(-300, 1_900))
            )
            sale = (("sale", after_ms, float(rng.gamma(4.0, MEAN_I[item] / 4))),)
        fields = {"user": n % 50, "item": item, "price": float(rng.lognormal(9, 1))}
        out.append(Shown(1_000_000 + 5 * n, fields, sale))
    return out


@pytest.mark.parametrize(
    ("objective", "policy"),
    [
        ("tweedie", "window"),
        ("tweedie", "eager"),
        ("weighted", "corrected"),
        ("squared", "corrected"),
        ("huber", "window"),
    ],
)
def test_a_value_is_learnt_and_served_on_its_own_scale(objective, policy, tmp_path):
    events = shown(6_000, late=policy == "corrected")
    loop = Loop(project_of(objective, POLICIES[policy]))
    loop.run(events)
    sold = {f"i{n}": one.feedback[0][2] for n, one in enumerate(events) if one.feedback}
    positive = [row for row in loop.samples if row["task"] == "revenue" and row["label"] > 0]
    assert len(positive) > 1_000 and all(row["value"] == sold[row["event_id"]] for row in positive)
    assert all(row["value"] is None for row in loop.samples if row["label"] == 0)
    assert any(row["correction"] for row in positive) == (policy != "window")

    said = asked(loop.serve(tmp_path), [{"user": 1, "item": i, "price": 8_000.0} for i in range(4)])["revenue"]
    true = RATE_I * MEAN_I
    assert (np.argsort(said) == np.argsort(true)).all()
    if objective != "huber":
        assert abs(said.mean() / true.mean() - 1) < 0.2, said
    standing = loop.trainer.evaluation.standing("revenue")
    figures = standing.figures
    assert not standing.is_provisional and figures.concordance > 0.6
    assert figures.rmse_constant > 0 and figures.mae_constant > 0
    if objective != "huber":
        assert figures.rmse < figures.rmse_constant
    told = {name: loop.metrics.gauges[f"slice_{name}", "revenue"] for name in ("mae", "rmse", "concordance")}
    assert told["rmse"] > told["mae"] > 0 and told["concordance"] > 0.6
    replayed = as_trained(loop.project, TOPICS, loop.world.log.reader(), None)
    assert replayed.equal is True


def test_a_sale_without_a_value_is_refused_and_counted(tmp_path):
    events = shown(300, late=False)
    bare = [Shown(e.time_ms, e.fields, tuple((k, a, None) for k, a, _ in e.feedback)) for e in events]
    loop = Loop(project_of("tweedie", {}))
    loop.run(bare)
    sales = sum(bool(e.feedback) for e in events)
    assert loop.metrics.total("samples_refused_total") == sales > 30
