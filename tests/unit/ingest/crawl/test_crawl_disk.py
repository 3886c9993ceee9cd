"""Goal: a disk that is full, read-only or fails takes nothing and is named; with room again all goes on, once. What
waits there costs nothing. Method: SQLite's own bounds and modes on the real memory; statements that it runs.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from answers_world import CRAWL, World, rows

from headrace.backends.frontier_sqlite import SqliteFrontier
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.events import decode_batch
from headrace.contract.formats.topics import Topics
from headrace.ingest.crawl import outbox_sender
from headrace.ingest.crawl.outbox_sender import OutboxSender
from headrace.ingest.crawl.scheduler import Scheduler
from headrace.process.waits import Waits

A, B = CRAWL.start
LARGE = "x" * 20_000


def refuse(world: World, how: str) -> None:
    """Let the file take no more, as a full or a read-only disk."""
    if how == "full":
        (pages,) = world.frontier._db.execute("pragma page_count").fetchone()
        world.frontier._db.execute(f"pragma max_page_count={pages}")
    else:
        world.frontier._db.execute("pragma query_only=on")


def sender(world: World, log: MemoryLog) -> OutboxSender:
    log.admin().ensure_topics(Topics().specs(1))
    epoch = world.frontier.next_epoch(world.clock.now_ms())
    return OutboxSender(world.frontier, log.producer(), Topics(), 1, MemoryMetrics(), epoch, world.clock)


def sent(log: MemoryLog) -> list[tuple[str, int, str]]:
    records = log.partitions(Topics().events)[0]
    read = [row for record in records for row in decode_batch(record.value or b"").to_pylist()]
    return [(row["key"], row["crawl_time_ms"], row["version"]) for row in read]


@pytest.mark.parametrize(("how", "why"), [("full", "full"), ("read-only", "readonly")])
def test_an_answer_that_the_disk_does_not_take_is_asked_for_again_and_written_once(
    tmp_path: Path, how: str, why: str
) -> None:
    world, log = World(tmp_path), MemoryLog()
    world.answer(A, rows("1"))
    refuse(world, how)
    with pytest.raises(Unavailable, match=rf"f\.sqlite: .*{why}.*disk is full and who may write"):
        world.answer(B, rows("2", v=LARGE))
    world.frontier.close()
    # The next process, on a disk with room.
    again = World(tmp_path, blobs=world.blobs)
    assert B in again.due(), "nothing of it was noted"
    again.answer(B, rows("2", v=LARGE))
    turns = sender(again, log)
    while turns.turn() or again.frontier.waiting():
        pass
    assert [key for key, *_ in sent(log)] == ["1", "2"]
    again.frontier.close()


def test_receipts_that_the_disk_does_not_take_send_the_same_versions_again(tmp_path: Path) -> None:
    world, log = World(tmp_path), MemoryLog()
    world.answer(A, rows("1", "2"))
    turns = sender(world, log)
    assert turns.turn()
    refuse(world, "read-only")
    with pytest.raises(Unavailable, match="readonly"):
        turns.turn()
    world.frontier.close()
    again = World(tmp_path)
    assert again.frontier.waiting() == 2
    turns = sender(again, log)
    while turns.turn() or again.frontier.waiting():
        pass
    assert len(sent(log)) == 4 and len(set(sent(log))) == 2, "readers ignore what they have"
    again.frontier.close()


@pytest.mark.parametrize("where", ["folder", "lock"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir" if where == "folder" else "open", refused)
    with pytest.raises(Unavailable, match=r"f\.sqlite: .*Read-only file system.*who may write there"):
        SqliteFrontier(tmp_path / "f.sqlite")


def test_a_file_that_is_damaged_while_it_is_open_is_no_full_disk(tmp_path: Path) -> None:
    world = World(tmp_path)

    def damaged(*_: Any) -> None:
        error = sqlite3.DatabaseError("malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error

    world.frontier._waits = damaged  # type: ignore[method-assign, assignment]
    with pytest.raises(InvariantBroken, match="damaged"):
        world.due()
    world.frontier.close()


def test_what_is_sent_the_disk_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite waits for the disk when it writes its log, and an update that changes nothing writes nothing."""
    world, log, wal = World(tmp_path), MemoryLog(), tmp_path / "f.sqlite-wal"
    synced: list[int] = []

    def fdatasync(file: int) -> None:
        assert os.fstat(file).st_ino == wal.stat().st_ino and not sent(log)[len(synced) :]
        synced.append(wal.stat().st_size)

    turns = sender(world, log)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    for number in range(1, 4):
        world.answer(A, rows(str(number)))
        assert turns.turn() and len(sent(log)) == number
        assert synced[number - 1 :] == [synced[-1]] and not turns.turn()
        world.frontier.make_safe()
        assert len(synced) == number, "nothing was noted since"
    assert sorted(set(synced)) == synced
    world.frontier.close()


def test_a_disk_that_fails_while_it_is_waited_for_sends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, log = World(tmp_path), MemoryLog()
    turns = sender(world, log)
    world.answer(A, rows("1"))

    def failed(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failed)
        for _ in range(2):
            with pytest.raises(Unavailable, match=r"f\.sqlite: .*Input/output error"):
                turns.turn()
    assert not sent(log) and turns.turn() and len(sent(log)) == 1
    world.frontier.close()


def test_what_is_due_is_found_without_reading_what_is_not_asked_for(tmp_path: Path) -> None:
    """A host with a million addresses that waits must not cost a read of them all, ten times a second."""
    world = World(tmp_path)
    told: list[str] = []
    world.frontier._db.set_trace_callback(told.append)
    world.due()
    world.frontier.next_due_ms(["shop"])
    world.frontier.waiting()
    world.frontier._db.set_trace_callback(None)
    plans = [
        row[3] for statement in told for row in world.frontier._db.execute(f"explain query plan {statement}").fetchall()
    ]
    assert plans and not [plan for plan in plans if ("SCAN" in plan and "hosts" not in plan) or "TEMP B-TREE" in plan]
    world.frontier.close()


def test_a_crawler_at_rest_looks_when_something_is_due(tmp_path: Path) -> None:
    world = World(tmp_path)
    scheduler = Scheduler(world.deps, once=False)
    assert scheduler.rest_s() == 0.1, "something is due"
    world.answer(A, rows("1"))
    world.answer(B, rows("2"))
    assert scheduler.rest_s() == 1.0
    left_ms = (world.frontier.next_due_ms(["shop"]) or 0) - world.clock.now_ms()
    world.clock.advance((left_ms - 300) / 1_000)
    assert scheduler.rest_s() == pytest.approx(0.3)
    world.frontier.close()


def test_a_sender_at_rest_waits_until_something_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, log = World(tmp_path), MemoryLog()
    turns = sender(world, log)
    stopping, rests = asyncio.Event(), [0]

    async def woken(event: asyncio.Event, within_s: float) -> None:
        rests[0] += 1
        assert within_s >= 0.5 and not world.frontier.waiting()
        if rests[0] == 2:
            stopping.set()
        else:
            await world.answers.take(world.page(A), world.response(A, rows("1")), 0.1)
        assert event.is_set() or stopping.is_set()

    monkeypatch.setattr(outbox_sender, "woken", woken)
    asyncio.run(turns.run(stopping, world.answers.noted, Waits(world.clock)))
    assert rests == [2] and len(sent(log)) == 1
    world.frontier.close()
