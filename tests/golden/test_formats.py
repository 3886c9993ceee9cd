"""Goal: what a release stored is opened for ever, or refused by name. Method: its files, byte for byte, in a copy.

`data/formats-0.1` was written by the code of release 0.1 (see `write_formats.py`) and is never made anew.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import trainer_world
from write_formats import NOW_MS, PROJECT, TOPICS, stage_dependencies, trainer_dependencies

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.clock import VirtualClock
from headrace.backends.delta.leases import Leases
from headrace.backends.frontier_sqlite import SqliteFrontier
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.formats.dead_letters import decode_dead_letter, decode_retry_mark
from headrace.contract.formats.events import decode_batch, decode_punctuation
from headrace.contract.formats.positions import Position
from headrace.contract.formats.sample import parse_position
from headrace.contract.formats.snapshot import decode_manifest
from headrace.contract.formats.steps import decode_step
from headrace.contract.interfaces.log import Record
from headrace.contract.rules import Change, Written, decode_change, decode_entry
from headrace.sender import Sender
from headrace.serving.model.shared_region import SharedModel
from headrace.serving.model.updater import Updater
from headrace.stream.aggregate.stage import AggregateStage
from headrace.stream.shell.join_stage import StreamStage
from headrace.trainer.model.digest import SHA256, digest
from headrace.trainer.run import Trainer

WRITTEN = Path(__file__).parent / "data" / "formats-0.1"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())


def recorded() -> list[Record]:
    """Return the records of all topics, in the order in which they were written."""
    found = []
    for line in (WRITTEN / "records.jsonl").read_text().splitlines():
        body: dict[str, Any] = json.loads(line)
        key, value = (None if body[n] is None else base64.b64decode(body[n]) for n in ("key", "value"))
        found.append(Record(body["topic"], 0, body["offset"], key, value, body["headers"], NOW_MS))
    return found


class Stored:
    """A copy of what the release left behind."""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(WRITTEN, folder, dirs_exist_ok=True)
        self.folder, self.clock = folder, VirtualClock(NOW_MS)
        self.log, self.blobs = MemoryLog(lambda: NOW_MS), FileBlobs(folder / "store" / "blobs")
        self.log.admin().ensure_topics(TOPICS.specs(1))
        for record in recorded():
            self.log.append(record.topic, 0, record.value, record.key, record.headers)
        leases = Leases(self.blobs, self.clock, lease_ms=3_600_000)
        self.lake = DeltaLake(str(folder / "store" / "lake" / "samples"), partitions=1, leases=leases)

    def values(self, topic: str) -> list[bytes]:
        return [r.value for r in self.log.partitions(topic)[0] if r.value is not None]


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path / "copy")


def test_every_record_of_every_topic_is_read(stored: Stored):
    decoders = {
        TOPICS.steps: decode_step,
        TOPICS.model: decode_manifest,
        TOPICS.dead_letters: decode_dead_letter,
        TOPICS.retries: decode_retry_mark,
        TOPICS.features: json.loads,
        TOPICS.rules: lambda value: decode_entry(value, where="golden"),
    }
    found = {topic: [decode(v) for v in stored.values(topic)] for topic, decode in decoders.items()}
    assert {topic: len(entries) for topic, entries in found.items()} == {
        "steps": 3, "model": 2, "dead-letters": 1, "retries": 2, "features": 34, "rules": 3,
    }  # fmt: skip
    assert found["steps"][-1].positions == EXPECTED["positions"]
    assert [type(entry) for entry in found["rules"]] == [Change, Change, Written]
    assert found["model"][-1].digest == EXPECTED["learner_digest"]
    kinds = {"punctuation": decode_punctuation, "spec": lambda value: decode_change(value, where="golden")}
    counted: dict[str, int] = {}
    for record in stored.log.partitions(TOPICS.events)[0]:
        kind = record.headers["kind"]
        kinds.get(kind, decode_batch)(record.value)
        counted[kind] = counted.get(kind, 0) + 1
    assert set(counted) == {"impression", "feedback", "aggregate", "punctuation", "spec"}
    rows = [decode_batch(value).num_rows for value in stored.values(TOPICS.samples)]
    assert sum(rows) == EXPECTED["samples"]


@pytest.mark.parametrize("states_lost", range(3))
def test_the_join_goes_on_from_each_state_with_the_same_samples(stored: Stored, states_lost: int):
    manifests = sorted((stored.folder / "store" / "blobs" / "state" / "stream" / "g1" / "0").iterdir())
    for path in manifests[len(manifests) - states_lost :]:
        path.unlink()
    samples = stored.log.partitions(TOPICS.samples)[0]
    before, events = len(samples), stored.log.partitions(TOPICS.events)[0]
    stage = StreamStage(stage_dependencies(stored.log.producer(), stored.blobs, stored.clock))

    async def go_on() -> int:
        following = await stage.begin(0)
        assert following is not None
        await stage.take_all(events[following:] or events[-1:])
        return following

    assert asyncio.run(go_on()) == int(manifests[-1 - states_lost].name) + 1
    again = [decode_batch(r.value or b"") for r in samples[before:]]
    assert len(again) == 0 if states_lost == 0 else again
    if again:
        after = parse_position(samples[before].headers["after"])
        known = pa.Table.from_batches([decode_batch(r.value or b"") for r in samples[:before]])
        beyond = [row for row in known.to_pylist() if Position(row["offset"], row["rank"]) > after]
        # Columns that came since are last, and null.
        names, found = known.schema.names, pa.Table.from_batches(again)
        assert found.schema.names[: len(names)] == names
        assert all(found[name].null_count == len(found) for name in found.schema.names[len(names) :])
        assert found.select(names).to_pylist() == beyond


def test_the_aggregator_restores_its_state(stored: Stored):
    stage = AggregateStage(stage_dependencies(stored.log.producer(), stored.blobs, stored.clock))
    assert asyncio.run(stage.begin(0)) == 118


@pytest.mark.parametrize("checkpoints_lost", range(2))
def test_the_trainer_resumes_and_redoes_recorded_steps(stored: Stored, checkpoints_lost: int):
    checkpoints = sorted((stored.folder / "store" / "blobs" / "checkpoints" / "golden").iterdir())
    for path in checkpoints[len(checkpoints) - checkpoints_lost :]:
        path.unlink()
    trainer = Trainer(trainer_dependencies(stored.log, stored.blobs, stored.clock, stored.lake, trainer_world.World()))
    trainer.recover()
    assert trainer.learner.step == EXPECTED["step"]
    assert trainer.positions.to_json() == EXPECTED["positions"]
    # Steps that are learnt again have equal bits on an equal processor only.
    if not checkpoints_lost:
        assert digest(trainer.learner.state(), SHA256) == EXPECTED["learner_digest"]


@pytest.mark.parametrize("snapshots_lost", range(2))
def test_serving_takes_the_newest_snapshot_or_a_chain_of_deltas(stored: Stored, snapshots_lost: int):
    manifests = stored.log.partitions(TOPICS.model)[0]
    del manifests[len(manifests) - snapshots_lost :]
    (stored.folder / "shm").mkdir()
    shared = SharedModel(stored.folder / "shm" / "model", dim=PROJECT.recipe.row_dim, rows_max=1_000, create=True)
    updater = Updater(
        project=PROJECT,
        topics=TOPICS,
        shared=shared,
        reader=stored.log.reader(),
        blobs=stored.blobs,
        metrics=MemoryMetrics(),
        clock=stored.clock,
        stop=trainer_world.World(),
    )
    for _ in range(6):
        updater.step(0.0)
    meta = shared.meta()
    assert meta.manifest.step == EXPECTED["step"]
    assert meta.manifest.positions == EXPECTED["positions"]
    assert meta.snapshot == decode_manifest(manifests[-1].value or b"").version


def test_the_lake_is_read_at_each_version_and_its_lease_holds(stored: Stored):
    counts = [stored.lake.read(version).num_rows for version in (0, 1)]
    samples = stored.values(TOPICS.samples)
    assert counts == [
        sum(decode_batch(v).num_rows for v in samples[:8]),
        sum(decode_batch(v).num_rows for v in samples[:15]),
    ]
    state = stored.lake.state()
    assert state is not None and state.next_offsets == {0: 15}
    leases = Leases(stored.blobs, stored.clock, lease_ms=3_600_000)
    assert [(lease.holder, lease.version) for lease in leases.active()] == [("golden", 0)]


def test_a_spool_and_a_frontier_go_on(stored: Stored):
    sender = Sender("t", port=1, spool_dir=stored.folder / "spool")
    assert sender.unacked == 3
    sender.close(timeout=0.0)
    frontier = SqliteFrontier(stored.folder / "crawl" / "frontier.sqlite")
    assert frontier.pages("site") == 1 and frontier.has_body("d" * 64)
    assert [(v.key, v.values) for v in frontier.outbox(0, 10)] == [("7", '{"price":2.5}')]
    frontier.close()
