"""Goal: what is served is what the trainer has, at every version, whatever dies; and what publication forgets is seen.

Method: a trainer and a server in one log, from a seed. Both are killed and started anew, the server with its region or
without one, while snapshots are uploaded, fail, or come late. A checker compares each version that is served with the
learner at that step. Planted bugs must be seen by their digest."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from trainer_world import PROJECT, TOPICS, FaultyBlobs, World, cut, send

from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import TrainConfig
from headrace.contract.errors import Overloaded, Unavailable
from headrace.contract.formats.snapshot import Manifest, Weights, as_served, decode_manifest, decode_update
from headrace.contract.project import Project
from headrace.serving.model.shared_region import SharedModel
from headrace.serving.model.updater import Updater
from headrace.trainer.commit.publish import Publisher
from headrace.trainer.commit.served_rows import Change, ServedRows
from headrace.trainer.model.learner import TableLearner
from headrace.trainer.run import Trainer

EXPIRING = msgspec.structs.replace(
    PROJECT, recipe=msgspec.structs.replace(PROJECT.recipe, expire_after_ms=1_000, batch_rows=8)
).checked()
CONFIG = TrainConfig(wait_ms=20, publish_ms=100, snapshot_ms=1_500, lake_bytes=30_000)


class LateBlobs(FaultyBlobs):
    """Keeps what is put until `comes`, as an upload that takes long; or fails."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = 0

    def put(self, name: str, data: bytes) -> None:
        if self.fails:
            self.fails -= 1
            raise Unavailable("the store is away")
        super().put(name, data)


class Learner:
    """What the learner held after each step, by version, as it is to be served."""

    def __init__(self, rows: str) -> None:
        self.rows, self.models = rows, dict[str, tuple[dict[int, np.ndarray], dict[str, np.ndarray]]]()

    def note(self, trainer: Trainer) -> None:
        weights = trainer.learner.weights()
        values = as_served(weights.values_KV, self.rows)
        self.models[f"{trainer.run_id}-{trainer.learner.step}"] = (
            dict(zip(weights.keys_K.tolist(), values, strict=True)), weights.dense,
        )  # fmt: skip


@dataclass
class Server:
    """One replica; `restart` begins it anew with its region or without."""

    world: World
    folder: Path
    project: Project = EXPIRING
    metrics: MemoryMetrics = field(default_factory=MemoryMetrics)

    def __post_init__(self) -> None:
        self.restart(keeps_region=False)

    def restart(self, *, keeps_region: bool) -> None:
        if not keeps_region:
            recipe = self.project.recipe
            self.shared = SharedModel(self.folder / "m", dim=recipe.row_dim, rows_max=500, create=True)
        self.updater = Updater(
            project=self.project, topics=TOPICS, shared=self.shared, reader=self.world.log.reader(),
            blobs=self.world.blobs, metrics=self.metrics, clock=self.world.clock, stop=threading.Event(),
        )  # fmt: skip

    def check(self, learner: Learner) -> str:
        """Take what has come, and compare; return the version."""
        self.updater.step(0.0)
        if not self.shared.holds_model:
            return ""
        meta = self.shared.meta()
        rows, dense = learner.models[meta.manifest.version]
        keys = np.array(sorted(set(rows) | {1, 2}), np.int64)
        recipe = self.project.recipe
        found, found_dense = self.shared.read(
            lambda view: (view.lookup(keys, seed=recipe.seed, scale=recipe.row_scale), view.dense())
        )[0]
        for key, values in zip(keys.tolist(), found, strict=True):
            if key in rows:
                np.testing.assert_array_equal(values, rows[key])
        assert all((found_dense[name] == array).all() for name, array in dense.items())
        held = self.shared.held().keys_R.tolist()
        assert set(held) <= set(rows), "a row that the learner forgot is still served"
        return meta.manifest.version

    @property
    def wrong(self) -> float:
        return self.metrics.counters.get(("replica_digest_wrong_total", ""), 0)


def story(seed: int, folder: Path, *, rows: str = "float32", restarts: bool = True) -> tuple[Server, Learner, Trainer]:
    rng, world = Random(seed), World(blobs=LateBlobs())
    config, learner = msgspec.structs.replace(CONFIG, publish_values=rows), Learner(rows)
    records = [record for p in range(3) for record in cut(seed, p, 60)]

    def started() -> Trainer:
        trainer = Trainer(world.deps(project=EXPIRING, config=config))
        note = Trainer._apply

        def apply(step: object) -> None:
            note(trainer, step)  # type: ignore[arg-type]
            learner.note(trainer)

        trainer._apply = apply  # type: ignore[method-assign]
        learner.models.setdefault("", ({}, {}))
        recover = trainer._redo

        def redo(steps: list) -> None:
            learner.note(trainer)
            recover(steps)

        trainer._redo = redo  # type: ignore[method-assign]
        trainer.recover()
        return trainer

    trainer, server = started(), Server(world, folder)
    queues = {p: cut(seed, p, 60) for p in range(3)}
    for _ in range(len(records) * 4):
        what = rng.random()
        waiting = [p for p, queue in queues.items() if queue]
        if waiting and what < 0.5:
            part, after = queues[rng.choice(waiting)].pop(0)
            send(world.log, part, after=after)
        if restarts and what > 0.97:
            trainer = started()
        if restarts and 0.9 < what < 0.95:
            server.restart(keeps_region=what < 0.93)
        if isinstance(world.blobs, LateBlobs) and 0.85 < what < 0.88:
            world.blobs.fails = rng.randint(1, 3)
        trainer.turn()
        world.clock.advance(rng.choice([0.01, 0.06, 0.3]))
        if rng.random() < 0.7:
            server.check(learner)
    world.blobs.fails = 0  # type: ignore[attr-defined]
    for _ in range(40):
        trainer.turn()
        world.clock.advance(0.3)
        server.check(learner)
    return server, learner, trainer


def ends_well(server: Server, learner: Learner, trainer: Trainer) -> None:
    assert server.check(learner) == f"{trainer.run_id}-{trainer.learner.step}"
    assert server.wrong == 0
    assert sum(n for (name, _), n in server.metrics.counters.items() if name == "versions_refused_total") == 0


@pytest.mark.parametrize("rows", ["float32", "float16"])
@pytest.mark.parametrize("seed", range(3))
def test_each_version_that_is_served_is_the_learners(tmp_path: Path, seed: int, rows: str):
    ends_well(*story(seed, tmp_path, rows=rows))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 300))
def test_each_version_that_is_served_is_the_learners_long(tmp_path: Path, seed: int):
    ends_well(*story(seed, tmp_path, rows=Random(seed).choice(["float32", "float16"])))


def test_a_server_that_starts_while_a_snapshot_is_uploaded_follows_from_the_announced_one(tmp_path: Path):
    """Deltas of the chain of a snapshot that is not there yet lie in the topic: they begin where the old chain ends."""
    world, learner = World(blobs=LateBlobs()), Learner("float32")
    trainer = Trainer(world.deps(project=EXPIRING, config=CONFIG))
    trainer.recover()
    learner.note(trainer)
    manifests = world.log.partitions(TOPICS.model)[0]
    announced = decode_manifest(manifests[-1].value or b"").version
    held: list[tuple[object, ...]] = []
    publisher = trainer.publisher
    assert publisher is not None
    publisher._start = lambda write, *what: held.append((write, *what))  # type: ignore[method-assign]
    publisher._writer = SimpleNamespace(is_alive=lambda: bool(held))  # type: ignore[assignment]
    for rows, after in cut(3, 0, 60):
        send(world.log, rows, after=after)
        for _ in range(8):
            trainer.turn()
            learner.note(trainer)
            world.clock.advance(0.2)
    chains = {decode_update(r.value or b"")[1].chain for r in world.log.partitions(TOPICS.deltas)[0]}
    assert held and len(manifests) == 1 and len(chains - {announced}) >= 1, "deltas went on past the snapshot"
    late = Server(world, tmp_path)
    for _ in range(4):
        version = late.check(learner)
    assert version == f"{trainer.run_id}-{trainer.learner.step}" and late.shared.meta().snapshot == announced
    for write, *what in held:  # The upload ends: nothing is loaded, and the digest is that of the way here.
        write(*what)  # type: ignore[operator]
    for _ in range(4):
        late.check(learner)
    assert len(manifests) > 1 and late.wrong == 0 and late.shared.meta().snapshot == announced


def test_the_rows_of_a_chains_first_snapshot_are_gathered_by_its_thread(tmp_path: Path, monkeypatch):
    """The thread that learns looks at no row that it did not touch; deltas wait until the rows are gathered."""
    world, learner = World(), Learner("float32")
    trainer = Trainer(world.deps(project=EXPIRING, config=CONFIG))
    held: list[tuple[object, ...]] = []
    monkeypatch.setattr(Publisher, "_start", lambda self, write, *what: held.append((write, *what)))
    monkeypatch.setattr(Publisher, "is_busy", property(lambda self: bool(held)))
    weights = TableLearner.weights
    asked: list[int] = []
    monkeypatch.setattr(TableLearner, "weights", lambda self, *keys: asked.append(len(keys)) or weights(self, *keys))
    for rows, after in cut(3, 0, 60):
        send(world.log, rows, after=after)
    trainer.recover()

    def turn() -> None:
        trainer.turn()
        learner.note(trainer)
        asked.pop()
        world.clock.advance(0.2)

    for _ in range(4):
        turn()
    assert trainer.learner.step > 1 and len(held) == 1 and 0 not in asked
    assert not world.log.partitions(TOPICS.deltas)[0], "its digest is not known yet"
    write, *what = held[0]
    write(*what)  # type: ignore[operator]
    held.clear()
    server = Server(world, tmp_path)
    for _ in range(4):
        turn()
        version = server.check(learner)
    assert version == f"{trainer.run_id}-{trainer.learner.step}" and server.wrong == 0 and 0 not in asked


def test_a_deltas_positions_never_pass_a_row_that_was_not_sent(tmp_path: Path):
    """Sends fail at random; each delta that lies in the topic brings a server to the learner of its positions."""
    for seed in range(4):
        rng, world, learner = Random(seed), World(), Learner("float32")
        trainer = Trainer(world.deps(project=EXPIRING, config=CONFIG))
        trainer.recover()
        learner.note(trainer)
        positions: dict[str, dict[str, list[int]]] = {}
        publisher, queue = trainer.publisher, cut(seed, 0, 120)
        assert publisher is not None
        real = publisher.producer.send

        def send_or_not(*given: object, real=real, rng=rng, **named: object) -> None:
            if given[0] == TOPICS.deltas and rng.random() < 0.4:
                raise rng.choice([Overloaded("full"), Unavailable("no broker")])
            real(*given, **named)

        publisher.producer.send = send_or_not  # type: ignore[method-assign]
        (tmp_path / str(seed)).mkdir()
        server = Server(world, tmp_path / str(seed))
        while queue or trainer.source.ready_rows():
            if queue:
                rows, after = queue.pop(0)
                send(world.log, rows, after=after)
            trainer.turn()
            learner.note(trainer)
            positions[f"{trainer.run_id}-{trainer.learner.step}"] = trainer.positions.to_json()
            world.clock.advance(0.06)
            version = server.check(learner)
            if version and version in positions:
                assert server.shared.meta().manifest.positions == positions[version]
        assert server.wrong == 0


class ForgetsRemovals(ServedRows):
    """Planted: removed keys are noted, and not sent."""

    def change(self, weights: Weights) -> Change:
        found = super().change(weights)
        object.__setattr__(found, "weights", msgspec.structs.replace(found.weights, gone_K=np.empty(0, np.int64)))
        return found


def planted(tmp_path: Path, plant) -> tuple[Server, Trainer, MemoryMetrics]:
    """Let a publisher with a bug publish, while the learner forgets rows; a server follows without a checker."""
    world, metrics = World(), MemoryMetrics()
    trainer = Trainer(world.deps(project=EXPIRING, config=CONFIG, metrics=metrics))
    trainer.recover()
    assert trainer.publisher is not None
    plant(trainer.publisher)
    server, queue = Server(world, tmp_path), cut(1, 0, 120)
    for number in range(400):
        if queue:
            rows, after = queue.pop(0)
            send(world.log, rows, after=after)
        trainer.turn()
        if number % 20 == 10 and trainer.learner.rows:  # The sweep goes on a part a step: here to the end.
            now_ms = 1_000_000 + 60_000 * number
            gone = [trainer.learner.table.expire(now_ms) for _ in range(4_096)]
            trainer.publisher.note(np.concatenate(gone))
            trainer.learner.step += 1  # A step that only forgets.
        world.clock.advance(0.06)
        server.updater.step(0.0)
    return server, trainer, metrics


def test_without_a_bug_rows_that_leave_leave_serving_too(tmp_path: Path):
    server, trainer, metrics = planted(tmp_path, lambda publisher: None)
    assert server.wrong == 0 and metrics.counters.get(("errors_total", "served_digest"), 0) == 0
    assert server.shared.rows == trainer.learner.rows


def test_planted_a_removal_that_is_not_sent_is_seen(tmp_path: Path):
    def plant(publisher: Publisher) -> None:
        assert publisher._has_gathered()
        publisher._served.__class__ = ForgetsRemovals

    server, _, _ = planted(tmp_path, plant)
    assert server.wrong > 0


def test_planted_a_removal_that_nobody_notes_is_seen_at_the_next_snapshot(tmp_path: Path):
    def plant(publisher: Publisher) -> None:
        publisher.note = lambda touched_K: None  # type: ignore[method-assign]

    server, _, metrics = planted(tmp_path, plant)
    assert server.wrong > 0 and metrics.counters["errors_total", "served_digest"] > 0


def test_planted_a_delta_that_is_skipped_is_seen(tmp_path: Path):
    """It is noted as sent, and the next one is given the base of the one before."""

    def plant(publisher: Publisher) -> None:
        real, skipped = publisher.delta, [0]

        def delta(*given: object) -> bool:
            skipped[0] += 1
            if skipped[0] % 5 == 0 and publisher._touched and not publisher.wants_snapshot:
                learner = given[0]
                publisher._served.take(publisher._served.change(learner.weights(publisher._changed_keys())))  # type: ignore[attr-defined]
                publisher._touched = []
                return True
            return real(*given)  # type: ignore[arg-type]

        publisher.delta = delta  # type: ignore[method-assign]

    server, _, _ = planted(tmp_path, plant)
    assert server.wrong > 0


def test_a_manifest_says_its_format():
    assert Manifest(kind="snapshot", model="m", run="r", step=1, version="r-1").format == 1
