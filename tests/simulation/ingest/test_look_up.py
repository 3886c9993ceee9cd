"""What is looked up of a late event, and what is said where the log no longer reaches back."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from archive_world import new_archive
from ingest_world import PROJECT, START_MS, impression
from late_world import Ids, State
from letters_world import CORRECTED, TOPICS, P, World

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.stored_ids import LakeIds
from headrace.backends.log.archived import ArchivedReader
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import ArchiveConfig
from headrace.contract.errors import Unavailable
from headrace.contract.formats.dead_letters import TOO_LATE, DeadLetter
from headrace.contract.formats.events import PUNCTUATION
from headrace.contract.formats.positions import Position
from headrace.contract.hashing import partition_of
from headrace.ingest.dead_letters.letters import Filter, Letter
from headrace.ingest.dead_letters.look_up import LookUp, Verdict
from headrace.stream.sink.archive import EventArchive

HOUR_MS = 3_600_000


def letter(event_id: str, event_type: str = "impression", *, user: int = 1, at_ms: int = START_MS) -> Letter:
    told = DeadLetter(
        reason=TOO_LATE,
        detail="",
        origin="a",
        tag="shop.impression",
        event_id=event_id,
        event_type=event_type,
        event_time_ms=at_ms,
        partition=partition_of(str(user), P),
    )
    return Letter(hash(event_id) % 10**6, told)


def grown(trim: bool) -> World:
    """Return a log of ten hours, with an event at the first and the fifth; the first three may be deleted."""
    world = World()
    for hour in range(10):
        if hour in (0, 5):
            at_s = world.clock.now_ms() // 1000
            world.offer("shop.impression", [impression(hour, user_id=1)], f"c{hour}", at_s)
        for partition in range(P):
            for _ in range(4):
                world.clock.advance(HOUR_MS / 4000 / P)
                world.log.append(TOPICS.events, partition, b"{}", None, {"kind": PUNCTUATION})
    if trim:
        for partition in range(P):
            world.log.trim(TOPICS.events, partition, 13)
    return world


class Joined:
    """A join whose newest state has this watermark in every partition; None: it stored none."""

    def __init__(self, watermark_ms: int | None) -> None:
        self.watermark_ms = watermark_ms

    def joined(self, partition: int) -> Any:
        return None if self.watermark_ms is None else self


class Away(Joined):
    """The store does not answer."""

    def joined(self, partition: int) -> Any:
        raise Unavailable("away")


def judge(world: World, one: Letter, stored: Ids | None = None, joined: Joined | None = None) -> Verdict | None:
    look_up = LookUp(PROJECT, TOPICS, world.log.reader(), stored, joined, skew_ms=60_000)
    return look_up.verdicts([one]).get(one.offset)


@pytest.mark.parametrize("trim", [False, True])
def test_the_log_tells_as_far_as_it_reaches(trim: bool) -> None:
    world = grown(trim)
    fifth_ms = START_MS + 5 * HOUR_MS
    assert judge(world, letter("e5", at_ms=fifth_ms)) == "repeated"
    assert judge(world, letter("e5", "click", at_ms=fifth_ms)) == "new", "another type is another event"
    assert judge(world, letter("e6", at_ms=fifth_ms)) == "new"
    assert judge(world, letter("e0")) == ("unknown" if trim else "repeated")
    assert judge(world, letter("e7")) == ("unknown" if trim else "new")


def test_the_archive_tells_what_the_topic_has_no_longer(tmp_path: Path) -> None:
    world = grown(trim=False)
    archive = new_archive(tmp_path, world.clock, P)
    stage = EventArchive(
        *(ArchiveConfig(), TOPICS.events, archive, MemoryMetrics(), world.clock),
        open_reader=lambda: world.log.reader(verbatim=True),
        partitions=lambda: range(P),
        kept_ms=-1,
    )
    stage._one_round(frozenset(range(P)))
    for partition in range(P):
        world.log.trim(TOPICS.events, partition, 13)
    reader = ArchivedReader(world.log.reader(), archive, TOPICS.events, holder="retry")
    look_up = LookUp(PROJECT, TOPICS, reader, None, skew_ms=60_000)
    asked = {"repeated": letter("e0"), "new": letter("e7")}
    asked |= {"late": letter("e5", at_ms=START_MS + 5 * HOUR_MS)}
    told = look_up.verdicts(list(asked.values()))
    assert [told[one.offset] for one in asked.values()] == ["repeated", "new", "repeated"]
    reader.close()


def test_the_lake_tells_what_the_log_has_no_longer() -> None:
    world = grown(trim=True)
    whole = State(world.log.reader().end_offsets(TOPICS.events)[0])
    assert judge(world, letter("e0"), Ids({"e0"}, whole)) == "repeated"
    assert judge(world, letter("e7"), Ids({"e0"}, whole)) == "new"
    assert judge(world, letter("k0", "click"), Ids({"k0"}, whole)) == "repeated"
    assert judge(world, letter("k7", "click"), Ids({"k0"}, whole)) == "unknown", "a late click is in no sample"
    assert judge(world, letter("e7"), Ids(set(), State(whole.positions.at(0).offset, START_MS + 1))) == "unknown"
    assert judge(world, letter("e7"), Ids(set(), None)) == "unknown"
    assert judge(world, letter("e7"), Ids(set(), State(14))) is None, "the lake is behind"
    assert judge(world, letter("k7", "click"), Ids(set(), State(14))) is None, "its sample may be on its way"
    assert judge(world, letter("e7"), Ids(set(), whole, away=True)) is None
    asked = Ids(set(), whole)
    judge(world, letter("e7", at_ms=START_MS + 5), asked)
    begin_ms = START_MS - START_MS % HOUR_MS
    assert asked.asked == [("event_id", begin_ms, begin_ms + HOUR_MS)], "its hour alone"


def test_where_nobody_sees_anything_any_more_the_joins_state_tells_what_the_lake_holds() -> None:
    world = grown(trim=True)
    first_ms = next(r.timestamp_ms for r in world.log.partitions(TOPICS.events)[0] if r.offset == 13)
    over = Joined(first_ms + 2 * HOUR_MS)
    quiet = Ids(set(), State(12))
    assert judge(world, letter("e7"), quiet, over) == "new", "no sample will ever be resolved after what was deleted"
    assert judge(world, letter("k7", "click"), quiet, over) == "unknown"
    assert judge(world, letter("e7"), quiet, Joined(first_ms)) is None, "windows may be open"
    assert judge(world, letter("e7"), quiet, Joined(None)) is None
    assert judge(world, letter("e7"), quiet, Away(0)) is None
    for partition in range(P):
        world.log.append(TOPICS.samples, partition, b"", None, {})
    assert judge(world, letter("e7"), quiet, over) is None, "the sink is behind"
    assert judge(world, letter("e7"), Ids(set(), State(12, following=1)), over) == "new"


def test_an_hour_that_cannot_be_read_holds_up_no_other() -> None:
    class Damaged(Ids):
        def stored(self, ids: Collection[str], column: str, begin_ms: int, end_ms: int) -> frozenset[str]:
            if begin_ms <= START_MS < end_ms:
                raise Unavailable("a file is gone")
            return super().stored(ids, column, begin_ms, end_ms)

    world = grown(trim=True)
    lake = Damaged({"e1"}, State(world.log.reader().end_offsets(TOPICS.events)[0]))
    look_up = LookUp(PROJECT, TOPICS, world.log.reader(), lake, skew_ms=60_000)
    there, later = letter("e0"), letter("e1", at_ms=START_MS + HOUR_MS)
    assert look_up.verdicts([there, later]) == {later.offset: "repeated"}


def test_what_was_unknown_and_is_found_by_now_is_not_taken_twice() -> None:
    world = World()
    world.offer("shop.impression", [impression(1)], "c", START_MS // 1000 - 7_200)
    for partition in range(P):
        for _ in range(3):
            world.log.append(TOPICS.events, partition, b"{}", None, {"kind": PUNCTUATION})
        world.log.trim(TOPICS.events, partition, 2)
    for stored, decide, fate in ((Ids(set(), None), "", "unknown"), (Ids({"e1"}, State(3)), "take", "repeated")):
        look_up = LookUp(CORRECTED, TOPICS, world.log.reader(), stored, skew_ms=60_000)
        report = world.retry(look_up=look_up).retry(Filter(), "take" if decide else "")
        assert getattr(report, fate) == 1
    assert world.rows() == []


def test_what_nobody_can_tell_is_the_users_to_decide() -> None:
    for decide, rows in (("take", 1), ("drop", 0)):
        world = World()
        world.offer("shop.impression", [impression(1)], "c", START_MS // 1000 - 7_200)
        assert [one.content.reason for one in world.letters()] == [TOO_LATE]
        for partition in range(P):
            for _ in range(3):
                world.log.append(TOPICS.events, partition, b"{}", None, {"kind": PUNCTUATION})
            world.log.trim(TOPICS.events, partition, 2)
        look_up = LookUp(CORRECTED, TOPICS, world.log.reader(), None, skew_ms=60_000)
        report = world.retry(look_up=look_up).retry(Filter())
        assert (report.unknown, report.appended, world.states()) == (1, 0, {0: "unknown"})
        assert world.retry(look_up=look_up).retry(Filter()).skipped == {"unknown before": 1}
        world.retry(look_up=look_up).retry(Filter(), decide)
        assert (len(world.rows()), world.states()) == (rows, {0: "retried"})
        assert world.retry(look_up=look_up).retry(Filter(), decide).offered == 0


def test_a_letter_that_is_old_by_the_time_of_its_retry_is_looked_up() -> None:
    world = World()
    world.offer("shop.cart", [{"request_id": "r", "user_id": 1, "event_id": "k"}], "c")
    world.clock.advance(10_000.0)
    report = world.retry().retry(Filter())
    assert report.refused == {TOO_LATE: 1}
    newer = world.letters()[1].content
    assert (newer.retry_of, newer.attempts, newer.event_id, newer.origin) == (0, 1, "k", "10.0.0.1")
    for wanted in ({"appended": 1}, {"offered": 0}):
        look_up = LookUp(CORRECTED, TOPICS, world.log.reader(), None, skew_ms=60_000)
        report = world.retry(look_up=look_up).retry(Filter())
        assert {name: getattr(report, name) for name in wanted} == wanted
    assert [row["event_id"] for row in world.rows()] == ["k"]
    assert world.states() == {0: "refused", 1: "retried"}


def sample(event_id: str, at_ms: int, feedback_id: str | None) -> dict[str, Any]:
    return {"event_id": event_id, "event_time_ms": at_ms, "feedback_id": feedback_id}


def test_a_lake_on_disk_is_asked_for_single_hours(tmp_path: Path) -> None:
    lake = DeltaLake(str(tmp_path / "lake"))
    ids = LakeIds(lake)
    assert ids.state() is None and ids.stored({"a"}, "event_id", 0, 10) == frozenset()
    schema = pa.schema([("event_id", pa.string()), ("event_time_ms", pa.int64()), ("feedback_id", pa.string())])
    rows = [sample("a", START_MS, None), sample("b", START_MS + HOUR_MS, "k"), sample("c", START_MS + HOUR_MS, None)]
    lake.append([pa.RecordBatch.from_pylist(rows, schema=schema)], {0: 3}, {0: Position(3, 0)})
    begin_ms = START_MS - START_MS % HOUR_MS
    assert ids.stored({"a", "b", "d"}, "event_id", begin_ms, begin_ms + HOUR_MS) == {"a"}
    assert ids.stored({"a", "b", "d"}, "event_id", begin_ms, begin_ms + 2 * HOUR_MS) == {"a", "b"}
    assert ids.stored({"k", "b"}, "feedback_id", begin_ms, begin_ms + 2_000 * HOUR_MS) == {"k"}
    state = ids.state()
    assert state is not None and state.positions.at(0) == Position(3, 0)


def test_marks_of_before_and_after_are_one_format() -> None:
    old = b'{"reason":"bad_type","detail":"d","origin":"o","tag":"t"}'
    told = msgspec.json.decode(old, type=DeadLetter)
    assert (told.event_type, told.event_time_ms, told.partition) == ("", 0, -1)
