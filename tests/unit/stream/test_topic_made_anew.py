"""Goal: a topic that was deleted and made anew is told from the one that a state was made of, however far it has grown.
Method: join, aggregator and sink store what they read of a topic; then the log in memory makes it anew."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random
from typing import Any

import pytest
from join_world import PROJECT, records, traffic
from stream_world import CONFIG, Blobs, QuickStore
from trainer_world import samples

from headrace.backends.clock import VirtualClock
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import Config
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.positions import Position
from headrace.contract.formats.topics import Topics
from headrace.contract.rules import rules_of
from headrace.process.waits import Waits
from headrace.stream.aggregate.stage import AggregateStage
from headrace.stream.join.state import read_manifest
from headrace.stream.shell.dependencies import StageDependencies
from headrace.stream.shell.join_stage import StreamStage
from headrace.stream.sink.stage import SinkStage
from headrace.stream.stored_rules import StoredRules, stored_rules

TOPICS = Topics()


class World:
    """A log whose topics can be made anew, and a store that knows nothing of it."""

    def __init__(self) -> None:
        self.log, self.blobs = MemoryLog(lambda: 0), Blobs()
        self.log.admin().ensure_topics(TOPICS.specs(1))

    def make_anew(self, topic: str) -> None:
        self.log.delete(topic)
        self.log.admin().ensure_topics(TOPICS.specs(1))

    def stage(self, kind: Any, *, knows: bool = True, begin_afresh: bool = False) -> Any:
        deps = StageDependencies(
            project=PROJECT,
            config=Config(join=CONFIG.join, ingest=CONFIG.ingest, log=Config().log.__class__(partitions=1)),
            topics=TOPICS,
            producer=self.log.producer(),
            blobs=self.blobs,
            metrics=MemoryMetrics(),
            clock=VirtualClock(),
            begin_afresh=begin_afresh,
            topic_id=self.log.admin().topic_id(TOPICS.events) if knows else "",
        )
        stage = kind(deps)
        if isinstance(stage, StreamStage):
            stage._store = QuickStore(self.blobs, Waits(deps.clock))
        return stage


async def store_some(stage: Any) -> int:
    """Let a stage read some events and store its state; return the offset to go on from."""
    taken = records(traffic(1, 60), Random(1))
    await stage.begin(0)
    await stage.take_all(taken)
    await stage.finish()
    return taken[-1].offset + 1


def test_a_state_of_the_join_says_by_which_rules_it_and_its_log_were_read() -> None:
    world = World()
    asyncio.run(store_some(world.stage(StreamStage)))
    (found,) = stored_rules(world.blobs, 1, 1)
    assert found == StoredRules(0, {1: rules_of(PROJECT)}, first=rules_of(PROJECT))
    for name in world.blobs.list("state/stream/g1/0"):
        world.blobs.put(name, b"damaged")
    assert stored_rules(world.blobs, 1, 1) == [StoredRules(0)], "there is a state, and nobody can say of what"


@pytest.mark.parametrize("kind", [StreamStage, AggregateStage])
def test_a_state_of_a_topic_that_is_no_more_is_refused(kind: Any) -> None:
    async def work() -> None:
        world = World()
        following = await store_some(world.stage(kind))
        assert await world.stage(kind).begin(0) == following
        world.make_anew(TOPICS.events)
        for begin_afresh in (False, True):
            with pytest.raises(InvariantBroken, match=r"deleted and made anew(?s:.*)log.generation"):
                await world.stage(kind, begin_afresh=begin_afresh).begin(0)
        assert await world.stage(kind, knows=False).begin(0) == following, "a broker that tells no id"

    asyncio.run(work())


@pytest.mark.parametrize("kind", [StreamStage, AggregateStage])
def test_a_state_without_an_id_is_gone_on_from_and_gets_one(kind: Any) -> None:
    async def work() -> None:
        world = World()
        following = await store_some(world.stage(kind, knows=False))
        stage = world.stage(kind)
        assert await stage.begin(0) == following
        await stage.finish()
        world.make_anew(TOPICS.events)
        assert await world.stage(kind).begin(0) == following, "nothing was read, so nothing was stored"

    asyncio.run(work())


def test_the_id_is_a_field_that_older_readers_pass_over() -> None:
    async def work() -> None:
        world = World()
        stage = world.stage(StreamStage)
        await store_some(stage)
        (name,) = world.blobs.list("state/stream/g1/0")
        assert read_manifest(world.blobs.items[name])["topic_id"] == world.log.admin().topic_id(TOPICS.events)

    asyncio.run(work())


def test_a_lake_of_a_samples_topic_that_is_no_more_is_refused_before_and_while_it_is_written(tmp_path: Path) -> None:
    world = World()
    rows = samples(1, 0, 20)

    def lake(samples_id: str) -> DeltaLake:
        return DeltaLake(str(tmp_path / "lake"), partitions=1, samples_id=samples_id)

    def append(to: DeltaLake, first: int, count: int) -> None:
        batch = rows.slice(first, count)
        last = Position(batch["offset"][-1].as_py(), batch["rank"][-1].as_py())
        to.append([batch], {0: first + count}, {0: last})

    before = world.log.admin().topic_id(TOPICS.samples)
    append(lake(""), 0, 5)
    append(lake(before), 5, 5)
    assert lake(before).state() == lake("").state()
    world.make_anew(TOPICS.samples)
    now = lake(world.log.admin().topic_id(TOPICS.samples))
    for attempt in (now.state, lambda: append(now, 10, 5)):
        with pytest.raises(InvariantBroken, match=r"made anew.*log.generation"):
            attempt()
    with pytest.raises(InvariantBroken, match="made anew"):
        asyncio.run(SinkStage(Config(), now, MemoryMetrics(), VirtualClock()).begin(0))
    assert lake("").read().num_rows == 10
