"""Goal: a snapshot that takes long to upload delays the next snapshot and no delta.

Method: the store takes the blob and does not return until it is told to, for longer than several `snapshot_ms`.
"""

from __future__ import annotations

import threading

import pytest
from trainer_world import COUNT, TOPICS, FaultyBlobs, World, cut, send

from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.snapshot import decode_manifest, decode_weights
from headrace.trainer.run import Trainer
from headrace.trainer.upload_watch import UPLOAD_MAX_S


class SlowBlobs(FaultyBlobs):
    """Lets no snapshot through while the gate is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def put(self, name: str, data: bytes) -> None:
        assert name.startswith("trainers/") or self.gate.wait(30.0)
        super().put(name, data)


def test_an_upload_that_never_returns_shows_and_ends_the_process_after_a_bound():
    world = World(blobs=SlowBlobs())
    assert isinstance(world.blobs, SlowBlobs)
    metrics = MemoryMetrics()
    trainer = Trainer(world.deps(background=True, metrics=metrics))
    world.blobs.gate.clear()
    trainer.recover()
    for _ in range(6):
        trainer.turn()
        world.clock.advance(UPLOAD_MAX_S / 6)
    assert metrics.gauges["upload_age_seconds", ""] == UPLOAD_MAX_S * 5 / 6
    trainer.turn()
    world.clock.advance(1.0)
    with pytest.raises(InvariantBroken, match=r"has taken 3601 s, 3600 s are allowed"):
        trainer.turn()
    with pytest.raises(InvariantBroken, match="has taken"):
        trainer._pause(0.0)
    world.blobs.gate.set()
    assert trainer.publisher is not None
    trainer.publisher.close(30.0)
    trainer.turn()
    assert metrics.gauges["upload_age_seconds", ""] == 0


def test_deltas_go_on_while_a_snapshot_is_uploaded():
    world = World(blobs=SlowBlobs())
    records = cut(6, 0, COUNT)
    trainer = Trainer(world.deps(background=True))
    trainer.recover()
    publisher, blobs = trainer.publisher, world.blobs
    assert publisher is not None and isinstance(blobs, SlowBlobs)
    publisher.close(30.0)
    manifests = world.log.partitions(TOPICS.model)[0]
    assert len(manifests) == 1

    def learn() -> str:
        """Learn one record, let more than `snapshot_ms` pass, and return the version that was published last."""
        rows, after = records.pop(0)
        send(world.log, rows, after=after)
        for _ in range(4):
            trainer.turn()
            world.clock.advance(0.6)
        return decode_weights(world.log.partitions(TOPICS.deltas)[0][-1].value or b"")[1].version

    blobs.gate.clear()
    versions = [learn() for _ in range(5)]
    assert publisher.is_busy and len(manifests) == 1
    assert len(set(versions)) == 5 and versions[-1] == f"{trainer.run_id}-{trainer.learner.step}"
    blobs.gate.set()
    publisher.close(30.0)
    learn()
    publisher.close(30.0)
    about = [decode_weights(r.value or b"")[1] for r in world.log.partitions(TOPICS.deltas)[0]]
    assert [a.base for a in about[1:]] == [a.version for a in about[:-1]]
    assert decode_manifest(manifests[-1].value or b"").step > 5
    trainer.close()
