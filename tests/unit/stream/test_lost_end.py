"""Goal: a broker that comes back without what it had confirmed leaves no hole that nobody sees: what can be sent again
is, and the rest is refused by name. Method: the stages over a log in memory, whose topics lose their ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from join_world import PROJECT, records, traffic
from stream_world import CONFIG, Blobs, QuickStore, read_samples

from headrace.backends.clock import VirtualClock
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import Config, LogConfig
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.positions import START, Position, Positions
from headrace.contract.formats.samples_topic.kept_samples import read_on_at
from headrace.contract.formats.topics import Topics
from headrace.process.waits import Waits
from headrace.stream.aggregate.stage import AggregateStage
from headrace.stream.join.join import JoinState
from headrace.stream.shell.dependencies import StageDependencies
from headrace.stream.shell.engine import Engine
from headrace.stream.shell.join_stage import StreamStage
from headrace.stream.shell.log_ends import LogEnds
from headrace.stream.sink.stage import SinkStage

TOPICS = Topics()
SAMPLES, EVENTS, FEATURES = TOPICS.samples, TOPICS.events, TOPICS.features


class World:
    """A log with events, a store, and stages that come and go."""

    def __init__(self, count: int = 120) -> None:
        self.log, self.blobs = MemoryLog(lambda: 0), Blobs()
        self.log.admin().ensure_topics(TOPICS.specs(1))
        self.log.topics[EVENTS][0] = records(traffic(1, count), Random(1))

    def stage(self, kind: Any, *, begin_afresh: bool = False) -> Any:
        deps = StageDependencies(
            project=PROJECT,
            config=Config(join=CONFIG.join, ingest=CONFIG.ingest, log=LogConfig(partitions=1)),
            topics=TOPICS,
            producer=self.log.producer(),
            blobs=self.blobs,
            metrics=MemoryMetrics(),
            clock=VirtualClock(),
            open_reader=self.log.reader,
            begin_afresh=begin_afresh,
        )
        stage = kind(deps)
        if isinstance(stage, StreamStage):
            stage._store = QuickStore(self.blobs, Waits(deps.clock))
        return stage

    def begin(self, kind: Any, *, begin_afresh: bool = False) -> int | None:
        """Return where a new process of the stage goes on."""
        return asyncio.run(self.stage(kind, begin_afresh=begin_afresh).begin(0))  # type: ignore[no-any-return]

    def run(self, kind: Any, stop: int | None = None) -> None:
        """Let a new process of the stage take the events up to offset `stop`, in two states, and store it."""

        async def work() -> None:
            stage = self.stage(kind)
            taken = self.log.partitions(EVENTS)[0][await stage.begin(0) or 0 : stop]
            for some in (taken[: len(taken) // 2], taken[len(taken) // 2 :]):
                await stage.take_all(some)
                await stage.finish()

        asyncio.run(work())

    def end(self, topic: str) -> int:
        return self.log.reader().end_offsets(topic)[0]


def test_samples_that_are_gone_are_sent_again_from_an_older_state() -> None:
    world = World()
    world.run(StreamStage)
    kept = world.log.partitions(SAMPLES)[0][:]
    newest = world.begin(StreamStage)
    world.log.cut(SAMPLES, 0, len(kept) - 1)
    older = world.begin(StreamStage)
    assert newest and older and 0 < older < newest
    world.run(StreamStage)
    join = JoinState(PROJECT, CONFIG.join, silent_ms=300, partition=0)
    wanted = [e.batch for record in world.log.partitions(EVENTS)[0] if (e := join.take(record)) is not None]
    assert read_samples(world.log, 0, join.schema).num_rows == sum(batch.num_rows for batch in wanted)


def test_where_no_state_is_left_the_join_begins_with_the_log() -> None:
    world = World()
    world.run(StreamStage)
    world.log.cut(SAMPLES, 0, 0)
    assert world.begin(StreamStage) == 0
    world.log.trim(EVENTS, 0, 3)
    with pytest.raises(InvariantBroken, match=r"samples/0 lost what .* events/0 begins at offset 3: .*--begin-afresh"):
        world.begin(StreamStage)
    assert world.begin(StreamStage, begin_afresh=True) is None, "the engine begins where the log does"


def test_samples_that_retention_deleted_are_not_missed() -> None:
    world = World()
    world.run(StreamStage)
    newest = world.begin(StreamStage)
    world.log.trim(SAMPLES, 0, world.end(SAMPLES))
    assert world.begin(StreamStage) == newest


def test_another_workers_record_at_the_same_offset_is_not_taken_for_what_was_sent() -> None:
    world = World()
    world.run(StreamStage)
    last = world.log.partitions(SAMPLES)[0][-1]
    newest = world.begin(StreamStage)
    world.log.cut(SAMPLES, 0, last.offset)
    world.log.append(SAMPLES, 0, last.value, None, {**last.headers, "sender": "another"})
    assert (world.begin(StreamStage) or 0) < (newest or 0)


@pytest.mark.parametrize("kind", [StreamStage, AggregateStage])
def test_a_state_of_events_that_are_gone_is_refused(kind: Any) -> None:
    world = World()
    world.run(kind)
    following = world.begin(kind)
    assert following
    world.log.cut(EVENTS, 0, following - 1)
    with pytest.raises(InvariantBroken, match=rf"events/0: the state was made of .* {following - 1}, and the log ends"):
        world.begin(kind)
    world.log.append(EVENTS, 0, b"another", None, {})
    world.log.append(EVENTS, 0, b"and more", None, {})
    with pytest.raises(InvariantBroken, match=r"another record lies there now.*log\.generation"):
        world.begin(kind)
    world.log.trim(EVENTS, 0, world.end(EVENTS))
    assert world.begin(kind) == following, "what retention deleted tells nothing"


def test_counters_that_are_gone_are_written_again() -> None:
    world = World()
    world.run(AggregateStage)
    end = world.end(FEATURES)
    assert end > 1 and (world.begin(AggregateStage) or 0) > 0
    world.log.cut(FEATURES, 0, 0)
    following = world.begin(AggregateStage)
    assert following == 0
    world.run(AggregateStage, len(records(traffic(1, 120), Random(1))))
    assert world.end(FEATURES) >= end


@pytest.mark.parametrize("topic", [SAMPLES, FEATURES])
def test_a_receipt_that_goes_back_stops_the_stage(topic: str) -> None:
    world, kind = World(), StreamStage if topic == SAMPLES else AggregateStage

    async def work() -> None:
        stage = world.stage(kind)
        await stage.begin(0)
        events = world.log.partitions(EVENTS)[0][:]
        for event in events[: len(events) // 2]:
            await stage.take_all([event])
        await stage.tick()
        assert world.end(topic) >= 2
        world.log.cut(topic, 0, 1)
        await stage.take_all(events[len(events) // 2 :])
        stage.deps.producer.poll(0.0)
        with pytest.raises(Unavailable, match=rf"{topic}/0 gave a record offset 1, and had given \d+ before"):
            await stage.tick()
        with pytest.raises(Unavailable):
            await stage.finish()

    asyncio.run(work())
    assert not world.blobs.list("state/stream/g1/0") and not world.blobs.list("state/aggregate/g1")


# -- readers


def log_of(places: list[tuple[int, int]]) -> MemoryLog:
    """Return a topic of samples with records from one position to another, by their offsets in `events`."""
    log = MemoryLog(lambda: 0)
    log.admin().ensure_topics(TOPICS.specs(1))
    for after, last in places:
        name = "-1:-1" if after < 0 else f"{after}:0"
        log.append(SAMPLES, 0, b"", None, {"after": name, "last": f"{last}:0"})
    return log


WHOLE = [(-1, 2), (2, 5), (5, 6), (6, 9)]


@pytest.mark.parametrize(
    ("places", "position", "following", "wanted"),
    [
        (WHOLE, 5, 2, 2),
        (WHOLE, 9, 4, 4),
        (WHOLE, 7, 3, 3),
        ([*WHOLE, (2, 5), (5, 9)], 9, 6, 6),
        ([*WHOLE, (12, 13)], 9, 4, 4),
        (WHOLE[:2], 9, 4, 0),
        ([*WHOLE[:2], (9, 12), (9, 12)], 9, 4, 0),
        ([*WHOLE[:1], (9, 12), *WHOLE[1:], (9, 12)], 9, 4, 4),
        ([*WHOLE[:2], (5, 9), (9, 12), (2, 5), (5, 9)], 9, 6, 0),
        ([], 9, 4, 0),
    ],
    ids=[
        "in the midst", "at the end", "within a record", "after repeats", "before one out of turn", "an end gone",
        "gone and written on", "a hole that was filled", "what comes next lies before", "an empty topic",
    ],
)  # fmt: skip
def test_a_reader_goes_on_where_its_samples_do(
    places: list[tuple[int, int]], position: int, following: int, wanted: int
) -> None:
    found = read_on_at(log_of(places).reader(), SAMPLES, 0, Position(position, 0), following)
    assert found == wanted


def test_what_retention_deleted_is_the_readers_own_to_judge() -> None:
    log = log_of(WHOLE)
    log.trim(SAMPLES, 0, 3)
    assert read_on_at(log.reader(), SAMPLES, 0, Position(2, 0), 1) == 1
    assert read_on_at(log.reader(), SAMPLES, 0, START, 4) == 4


def test_the_sink_reads_a_topic_that_lost_its_end_from_its_beginning() -> None:
    class Lake:
        def state(self, version: int | None = None) -> Any:
            return SimpleNamespace(positions=Positions(1, {0: Position(9, 0)}), next_offsets={0: 4})

    log = log_of(WHOLE)

    def begin() -> int | None:
        stage = SinkStage(Config(), Lake(), MemoryMetrics(), VirtualClock(), open_reader=log.reader)  # type: ignore[arg-type]
        return asyncio.run(stage.begin(0))

    assert begin() == 4
    log.cut(SAMPLES, 0, 2)
    assert begin() == 0


# -- while a stage runs


def test_a_log_that_ends_before_what_was_taken_stops_the_stage() -> None:
    log = log_of(WHOLE)
    reader, ends = log.reader(), LogEnds(SAMPLES, log.reader, dict, lambda: {0: 4})
    ends.read(reader)
    log.cut(SAMPLES, 0, 2)
    ends.read(reader)
    ends.look()
    ends.read(reader)
    with pytest.raises(Unavailable, match=r"samples/0 was taken up to offset 4 and ends at 2"):
        ends.look()


class Consumer:
    """A client that knows where the log begins and ends."""

    async def earliest_offsets(self, tp: Any) -> dict[Any, int]:
        return {tp: 0}

    def highwater(self, _tp: Any) -> int:
        return 100


class Message(SimpleNamespace):
    def ack(self, _consumer: Any) -> None:
        """Nothing is committed here."""


def messages(*told: tuple[int, float]) -> Iterator[Any]:
    for offset, at_s in told:
        said = Message(partition=0, offset=offset, timestamp=at_s, key=None, value=b"x", headers=())
        yield SimpleNamespace(message=said)


def test_another_record_at_an_offset_that_was_taken_stops_the_stage(tmp_path: Any) -> None:
    class Begun:
        async def begin(self, _partition: int) -> int | None:
            return None

    async def work() -> None:
        engine = Engine("headrace-join-g1", "127.0.0.1:1", "events", 1, tmp_path, open_reader=MemoryLog().reader)
        engine.app.consumer = Consumer()
        for event in messages((0, 1.0), (1, 1.5), (0, 1.0), (1, 1.5), (2, 2.0), (0, 9.0)):
            await engine._take(Begun(), event)  # type: ignore[arg-type]
        assert [record.offset for record in engine._waiting] == [0, 1, 2]
        for event in messages((1, 9.5)):
            await engine._take(Begun(), event)  # type: ignore[arg-type]
        with pytest.raises(Unavailable, match=r"events/0: another record lies at offset 2 than was taken from there"):
            for event in messages((2, 10.0)):
                await engine._take(Begun(), event)  # type: ignore[arg-type]

    asyncio.run(work())
