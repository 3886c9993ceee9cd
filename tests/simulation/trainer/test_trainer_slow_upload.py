"""Goal: a snapshot that takes long to upload delays the next snapshot and no delta.

Method: the store takes the blob and does not return until it is told to, for longer than several `snapshot_ms`.
"""

from __future__ import annotations

import threading

import pytest
from trainer_world import COUNT, TOPICS, FaultyBlobs, World, cut, send

from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.snapshot import decode_manifest, decode_update
from headrace.contract.interfaces.blobs import Pieces
from headrace.process.moved import moved
from headrace.trainer.run import Trainer
from headrace.trainer.upload_watch import STILL_MAX_S


class SlowBlobs(FaultyBlobs):
    """Lets nothing through whose name begins so while the gate is shut."""

    def __init__(self, held: str) -> None:
        super().__init__()
        self.held = held
        self.gate, self._comes, self._went = threading.Event(), threading.Event(), threading.Event()
        self.gate.set()

    def put(self, name: str, data: bytes | Pieces) -> None:
        while name.startswith(self.held) and not self.gate.wait(0.01):
            if self._comes.is_set():
                moved()
                self._comes.clear()
                self._went.set()
        super().put(name, data)

    def comes(self, _piece: int) -> None:
        """Let one piece through; returns when the upload has said so."""
        self._went.clear()
        self._comes.set()
        assert self._went.wait(30.0)


LOOK_S = 150.0


@pytest.mark.parametrize("what", ["snapshot", "checkpoint"])
def test_an_upload_that_stands_still_shows_and_ends_the_process_and_one_that_goes_on_does_not(what):
    world = World(blobs=SlowBlobs(f"{what}s/"))
    blobs = world.blobs
    assert isinstance(blobs, SlowBlobs)
    metrics = MemoryMetrics()
    trainer = Trainer(world.deps(background=True, metrics=metrics))
    blobs.gate.clear()
    trainer.recover()

    def pass_time(seconds: float) -> None:
        for _ in range(int(seconds / LOOK_S)):
            world.clock.advance(LOOK_S)
            trainer.turn()

    trainer.turn()
    for piece in range(8):
        pass_time(STILL_MAX_S - LOOK_S)
        blobs.comes(piece)
        trainer.turn()
    assert metrics.gauges["upload_age_seconds", what] == 8 * (STILL_MAX_S - LOOK_S) > 3 * 3_600
    world.clock.advance(10 * STILL_MAX_S)
    trainer.turn()  # The whole process stood still.
    pass_time(STILL_MAX_S - LOOK_S)
    world.clock.advance(LOOK_S)
    with pytest.raises(InvariantBroken, match=rf"{what} has stood still for 18\d\d s, 1800 s are allowed"):
        trainer.turn()
    with pytest.raises(InvariantBroken, match="has stood still"):
        trainer._pause(0.0)
    blobs.gate.set()
    assert trainer.publisher is not None and trainer.checkpointer is not None
    trainer.publisher.close(30.0)
    trainer.checkpointer.close(30.0)
    trainer.turn()
    assert metrics.gauges["upload_age_seconds", what] == 0


def test_deltas_go_on_while_a_snapshot_is_uploaded():
    world = World(blobs=SlowBlobs("snapshots/"))
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
        return decode_update(world.log.partitions(TOPICS.deltas)[0][-1].value or b"")[1].version

    blobs.gate.clear()
    versions = [learn() for _ in range(5)]
    assert publisher.is_busy and len(manifests) == 1
    assert len(set(versions)) == 5 and versions[-1] == f"{trainer.run_id}-{trainer.learner.step}"
    blobs.gate.set()
    publisher.close(30.0)
    learn()
    publisher.close(30.0)
    about = [decode_update(r.value or b"")[1] for r in world.log.partitions(TOPICS.deltas)[0]]
    assert [a.base for a in about[1:]] == [a.version for a in about[:-1]]
    assert decode_manifest(manifests[-1].value or b"").step > 5
    trainer.close()
