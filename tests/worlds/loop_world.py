"""A project's whole loop in memory, under virtual time: events, the real join, the real trainer, /v1/rank.

What a project declares is what runs: any option can be tried from its declaration to the score that is served.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from headrace.contract.project import Project
from headrace.serving.api.app import ServingApp, ServingDependencies, make_app
from headrace.serving.features import FeatureMemory
from headrace.serving.model.shared_region import SharedModel
from headrace.serving.model.updater import Updater
from headrace.stream.join.join import JoinState
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
