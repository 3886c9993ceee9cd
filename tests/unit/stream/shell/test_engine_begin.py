"""Goal: a partition begins afresh only where nothing was ever stored of it and its log is whole; else a person decides.
Method: the engine's own `_take`, with a consumer that says where the group and the log stand."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from headrace.backends.log.memory import MemoryLog
from headrace.contract.errors import InvariantBroken
from headrace.contract.interfaces.log import Record, TopicSpec
from headrace.stream.shell.engine import Engine


class Consumer:
    """A log that begins and ends somewhere."""

    def __init__(self, earliest: int, end: int | None) -> None:
        self.earliest, self.end = earliest, end

    async def earliest_offsets(self, tp: Any) -> dict[Any, int]:
        return {tp: self.earliest}

    @property
    def _thread(self) -> Any:
        return SimpleNamespace(_thread=None, _consumer=None)

    def highwater(self, _tp: Any) -> int | None:
        return self.end

    async def seek_wait(self, _offsets: Any) -> None:
        """The wanted record comes by itself."""


class Stage:
    """A stage whose state goes on from an offset, or that has none."""

    def __init__(self, wanted: int | None) -> None:
        self.wanted = wanted

    async def begin(self, _partition: int) -> int | None:
        return self.wanted

    async def take_all(self, records: Any) -> None:
        """Never called: nothing is handed on."""

    def drop(self, partitions: set[int]) -> None:
        """There is no state."""


class Message:
    """One record as Faust hands it over."""

    def __init__(self, offset: int) -> None:
        self.partition, self.offset, self.key, self.value = 0, offset, None, b"x"
        self.headers, self.timestamp, self.acked = (), 0.0, False

    def ack(self, _consumer: Any) -> None:
        self.acked = True


def offer(
    folder: Path,
    offset: int,
    *,
    wanted: int | None,
    earliest: int = 0,
    end: int | None = 100,
    begin_afresh: bool = False,
) -> tuple[Message, list[Record], int]:
    """Offer the first record that comes, at `offset`; return it, what waits to be handed on, and the next offset."""

    async def run() -> tuple[Message, list[Record], int]:
        engine = Engine(
            "headrace-join-g1",
            "127.0.0.1:1",
            "events",
            1,
            folder,
            open_reader=MemoryLog().reader,
            begin_afresh=begin_afresh,
        )
        engine.app.consumer = Consumer(earliest, end)
        message = Message(offset)
        await engine._take(Stage(wanted), SimpleNamespace(message=message))  # type: ignore[arg-type]
        return message, list(engine._waiting), engine.next[0]

    return asyncio.run(run())


def test_the_first_start_reads_a_whole_log_from_its_beginning(tmp_path: Path) -> None:
    _, waiting, following = offer(tmp_path, 0, wanted=None)
    assert ([record.offset for record in waiting], following) == ([0], 1)


@pytest.mark.parametrize(("offset", "earliest"), [(7, 0), (3, 3), (7, 3)])
def test_a_state_that_is_gone_is_refused_and_only_a_person_begins_afresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, offset: int, earliest: int
) -> None:
    with pytest.raises(InvariantBroken, match=r"events/0: nothing is stored.*headrace join --begin-afresh.*generation"):
        offer(tmp_path, offset, wanted=None, earliest=earliest)
    with caplog.at_level(logging.WARNING):
        *_, following = offer(tmp_path, offset, wanted=None, earliest=earliest, begin_afresh=True)
    assert following == earliest + (offset == earliest)
    assert "beginning afresh" in caplog.messages[-1]


def test_a_state_that_is_there_is_gone_on_from_whatever_the_flag_says(tmp_path: Path) -> None:
    for begin_afresh in (False, True):
        message, waiting, following = offer(tmp_path, 4, wanted=9, begin_afresh=begin_afresh)
        assert (message.acked, waiting, following) == (True, [], 9)


def test_a_log_that_ends_below_the_state_was_made_anew_and_is_refused(tmp_path: Path) -> None:
    for begin_afresh in (False, True):
        with pytest.raises(InvariantBroken, match=r"from offset 1000001, the log ends at 5000.*log.generation"):
            offer(tmp_path, 0, wanted=1_000_001, end=5_000, begin_afresh=begin_afresh)
    assert offer(tmp_path, 0, wanted=100)[2] == 100, "it may end there"
    assert offer(tmp_path, 0, wanted=101, end=None)[2] == 101, "an end that nobody knows says nothing"


def test_a_partition_from_which_no_record_came_yet_has_a_lag(tmp_path: Path) -> None:
    async def run() -> None:
        log = MemoryLog()
        log.admin().ensure_topics([TopicSpec("events", 3)])
        for partition in (0, 0, 0, 1, 1, 2):
            log.append("events", partition, b"x", None, {})
        engine = Engine("headrace-join-g1", "127.0.0.1:1", "events", 3, tmp_path, open_reader=log.reader)
        consumer = engine.app.consumer = Consumer(0, 3)
        await engine._take(Stage(None), SimpleNamespace(message=Message(0)))  # type: ignore[arg-type]
        engine._waiting.clear()
        engine._ends.read(log.reader())
        assert engine.lag() == 2, "nobody told yet which other partitions it has"
        consumer._committed_offset = {TP("events", 1): 1}
        consumer._read_offset = {TP("events", p): None for p in range(3)} | {TP("other", 7): 5}
        engine._look()
        engine._ends.read(log.reader())
        assert engine.lag() == 2 + 1 + 1
        assert engine._standing() == {0: 1, 1: 1, 2: None}
        engine._forget(Stage(None), {1, 2})  # type: ignore[arg-type]
        assert engine.lag() == 2

    asyncio.run(run())


def test_a_repeat_is_acknowledged_when_what_it_repeats_is_durable_and_not_before(tmp_path: Path) -> None:
    async def run() -> list[bool]:
        engine = Engine("headrace-join-g1", "127.0.0.1:1", "events", 1, tmp_path, open_reader=MemoryLog().reader)
        engine.app.consumer = Consumer(0, 100)
        messages = [Message(0), Message(0), Message(0)]
        for message in messages[:2]:
            await engine._take(Stage(None), SimpleNamespace(message=message))  # type: ignore[arg-type]
        before = [message.acked for message in messages]
        engine.acknowledge(0, 0)
        await engine._take(Stage(None), SimpleNamespace(message=messages[2]))  # type: ignore[arg-type]
        return [*before, *(message.acked for message in messages)]

    assert asyncio.run(run()) == [False, False, False, True, False, True]


def test_what_is_taken_away_while_it_begins_is_not_gone_on_with(tmp_path: Path) -> None:
    """The store is slow, and the group gives the partition to another one meanwhile, or anew to this one."""

    async def run() -> tuple[Message, Engine, set[int]]:
        engine = Engine("headrace-join-g1", "127.0.0.1:1", "events", 1, tmp_path, open_reader=MemoryLog().reader)
        engine.app.consumer = Consumer(0, 100)
        dropped: set[int] = set()

        class Slow(Stage):
            async def begin(self, partition: int) -> int | None:
                engine._forget(self, {partition})
                dropped.clear()
                return await super().begin(partition)

            def drop(self, partitions: set[int]) -> None:
                dropped.update(partitions)

        message = Message(0)
        await engine._take(Slow(None), SimpleNamespace(message=message))  # type: ignore[arg-type]
        again = Message(0)
        assert (engine.next, list(engine._waiting), dropped) == ({}, [], {0})
        await engine._take(Stage(None), SimpleNamespace(message=again))  # type: ignore[arg-type]
        assert [record.offset for record in engine._waiting] == [0]
        return message, engine, dropped

    message, engine, _ = asyncio.run(run())
    assert not message.acked and engine.next == {0: 1}
