"""Goal: what lies behind a change of rules takes it: the lake holds rows of both, the trainer learns by its own spec,
the account closes, serving goes over with the snapshot. Method: one log with changes through the real rooms.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from join_world import LONG, PROJECT, records
from rules_world import LATE, SCHEMAS, WIDE, changing
from serving_world import SPEC, Client, Trainer
from serving_world import World as Serving

from headrace.backends.clock import VirtualClock
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import Config
from headrace.contract.formats.events import encode_batch
from headrace.contract.formats.sample import conform, format_position, matrix, sample_schema
from headrace.contract.formats.topics import Topics
from headrace.contract.rules import change_of, encode_change
from headrace.replay.ledger.take_stock import take_stock
from headrace.serving.api.app import make_app
from headrace.stream.features.featurize import featurize
from headrace.stream.join.join import JoinState
from headrace.stream.sink.stage import SinkStage
from headrace.trainer.source.batch import to_batch
from headrace.trainer.source.source import Source

TOPICS = Topics()


class World:
    """A log in which the rules change, its samples in their topic, and a lake."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.log, self.lake = MemoryLog(lambda: 0), DeltaLake(str(folder / "lake"))
        self.log.admin().ensure_topics(TOPICS.specs(1))
        self.log.append(TOPICS.rules, 0, encode_change(change_of(PROJECT, 1, now_ms=0)), None, {})
        join = JoinState(PROJECT, LONG, silent_ms=300, partition=0)
        batches: list[pa.RecordBatch] = []
        for record in records(changing(seed, 600, 2, order=(1, 2)), Random(seed), SCHEMAS):
            self.log.append(TOPICS.events, 0, record.value, None, record.headers)
            if (emitted := join.take(record)) is not None:
                headers = {"after": format_position(emitted.after), "last": format_position(emitted.last)}
                self.log.append(TOPICS.samples, 0, encode_batch(emitted.batch), None, headers)
                batches.append(emitted.batch)
        self.samples = pa.concat_tables([pa.Table.from_batches([b]) for b in batches], promote_options="default")

    def store(self, commits: int = 3) -> None:
        """Let the sink store all samples, in a few commits."""
        stage = SinkStage(Config(), self.lake, MemoryMetrics(), VirtualClock())

        async def run() -> None:
            await stage.begin(0)
            stored = self.log.partitions(TOPICS.samples)[0]
            for n, record in enumerate(stored):
                await stage.take(record)
                if n % (len(stored) // commits + 1) == 0:
                    await stage.finish()
            await stage.finish()

        asyncio.run(run())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, 5)


def test_rows_of_several_digests_lie_side_by_side_in_the_lake(world: World):
    assert len(set(world.samples["spec"].to_pylist())) == 2
    world.store()
    order = [("offset", "ascending"), ("rank", "ascending")]
    stored = world.lake.read().sort_by(order)
    expected = world.samples.sort_by(order)
    assert set(stored.column_names) == set(expected.column_names)
    assert stored.select(expected.column_names).to_pylist() == expected.to_pylist()


@pytest.mark.parametrize("project", [PROJECT, LATE, WIDE], ids=["before", "windows", "after"])
def test_the_trainer_featurizes_rows_of_another_digest_again(world: World, project):
    world.store()
    digest, schema = project.features.digest(), sample_schema(project)
    task = project.tasks[0].name
    project = msgspec.structs.replace(project, recipe=msgspec.structs.replace(project.recipe, task=task))
    source = Source(project, world.log.reader(), TOPICS.samples, generation=1, metrics=MemoryMetrics(), lake=world.lake)
    live = Source(project, world.log.reader(), TOPICS.samples, generation=1, metrics=MemoryMetrics())
    source.begin(None)
    live.begin(None)
    while not live.ready_rows():
        live.poll(0.0)
    expected = conform(world.samples.filter(pc.equal(world.samples["task"], task)), schema)
    for one in (source, live):
        rows = one.take(one.propose(10_000)).sort_by([("offset", "ascending"), ("rank", "ascending")])
        batch = one.batch(rows)
        assert rows.num_rows == expected.num_rows, "never dropped"
        slots_NF, numeric_ND = featurize(expected.combine_chunks().to_batches()[0], project.features)
        assert batch.slots_BF.tobytes() == slots_NF.tobytes(), "never learnt as they are"
        assert batch.numeric_BD.tobytes() == numeric_ND.tobytes()
    own = expected.filter(pc.equal(expected["spec"], digest)).combine_chunks()
    assert 0 < own.num_rows < expected.num_rows
    again = to_batch(own, project)
    slots = matrix(own["slots"].combine_chunks(), project.features.slots)
    assert again.slots_BF.tobytes() == slots.tobytes(), "rows of its own digest are what the join made"


@pytest.mark.parametrize("project", [PROJECT, WIDE], ids=["old project", "new project"])
def test_the_account_closes_whatever_project_lies_on_disk(world: World, project):
    world.store()
    ledger = take_stock(project, Config(join=LONG), TOPICS, world.log.reader(), world.lake)
    assert ledger.closes, ledger
    assert ledger.stored == ledger.samples == world.samples.num_rows
    assert {"click", "order", "soon", "stay"} <= ledger.tasks.keys()
    assert ledger.late > 0 and sum(filter(None, world.samples["correction"].to_pylist())) > 5


def test_a_correction_comes_beside_a_negative_and_is_learnt_with_its_weight(world: World):
    rows = world.samples.to_pylist()
    told: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        told.setdefault((row["event_id"], row["task"]), []).append(row)
    late = [rows for rows in told.values() if any(r["correction"] and r["weight"] == 3.0 for r in rows)]
    assert late
    for several in late:
        labels = sorted((r["label"], r["correction"]) for r in several)
        assert labels in ([(0.0, False), (1.0, True)], [(1.0, True)]), "the negative may still be waited for"
    table = world.samples.filter(pc.equal(world.samples["task"], "click"))
    batch = to_batch(conform(table, sample_schema(LATE)), LATE)
    assert batch.weight_B.tolist() == table["weight"].to_pylist() and 3.0 in batch.weight_B


def test_serving_goes_over_to_another_spec_with_the_snapshot(tmp_path: Path):
    serving = Serving(tmp_path)
    client, rng = Client(make_app(serving.app)), Random(1)
    other = msgspec.structs.replace(SPEC, features=SPEC.features[::-1])
    body = {"request_id": "r1", "context": {"user": 3, "price": 2.0}, "candidates": [{"item": 1}, {"item": 2}]}
    said = []
    for run, spec in (("a", SPEC), ("b", other)):
        trainer = Trainer(serving, run=run)
        trainer.learn(rng)
        trainer.snapshot(spec=spec.digest(), spec_json=msgspec.json.encode(spec).decode())
        trainer.delta(trainer.learn(rng), spec=spec.digest())
        serving.follow()
        model, answer = client.get("/v1/model").json(), client.post("/v1/rank", json=body)
        assert answer.status_code == 200 and answer.json()["version"] == trainer.version
        assert model["spec"] == spec.digest()
        said.append(answer.json()["scores"])
    assert said[0] != said[1]
