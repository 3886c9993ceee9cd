"""Goal: one tag that the gateway does not take holds no other back. Method: the lanes alone, on a clock in the hand."""

from __future__ import annotations

import itertools
from pathlib import Path

from headrace.sender.lanes import Chunk, Lanes
from headrace.sender.segment import Segment


def _closed(lanes: Lanes, tag: str, count: int = 1) -> list[Chunk]:
    chunks = [Chunk(tag, Segment(Path("none")), 0.0) for _ in range(count)]
    for chunk in chunks:
        lanes.ready(chunk)
    return chunks


def _taken(lanes: Lanes, now_s: float) -> list[str]:
    tags = []
    while (chunk := lanes.take(now_s)) is not None:
        tags.append(chunk.tag)
    return tags


def test_the_oldest_goes_first_and_each_tag_has_its_window() -> None:
    lanes = Lanes(window=2)
    _closed(lanes, "bad", 3)
    _closed(lanes, "good", 3)
    assert _taken(lanes, 0.0) == ["bad", "bad", "good", "good"]


def test_a_tag_without_an_ack_tries_one_chunk_at_a_time_and_waits_longer_each_time() -> None:
    lanes, now_s, waits = Lanes(window=8), 0.0, []
    bad = _closed(lanes, "bad", 8)
    for _ in range(8):
        good = _closed(lanes, "good", 1)
        while "bad" not in (sent := _taken(lanes, now_s)):
            assert set(sent) <= {"good"}, "others go on meanwhile"
            for chunk in good:
                lanes.acked(chunk.id)
            good = _closed(lanes, "good", 1)
            now_s += 0.125
        waits.append(now_s)
        assert sent.count("bad") == (8 if len(waits) == 1 else 1)
        for chunk in good:
            lanes.acked(chunk.id)
        lanes.ended(now_s)
    assert [b - a for a, b in itertools.pairwise(waits)] == [0, 0.5, 1, 2, 4, 5, 5]
    assert _taken(lanes, now_s + 5) == ["bad"]
    taken = next(chunk for chunk in bad if lanes.acked(chunk.id) is not None)
    assert taken and len(_taken(lanes, now_s + 5)) == 7, "one ack opens the window again"


def test_a_gateway_that_restarts_makes_no_tag_wait() -> None:
    lanes = Lanes(window=4)
    for tag in ("a", "b"):
        _closed(lanes, tag, 2)
    for _ in range(2):
        assert set(_taken(lanes, 1.0)) == {"a", "b"}
        lanes.ended(1.0)


def test_what_was_on_its_way_goes_again_before_what_is_newer() -> None:
    lanes = Lanes(window=4)
    first = _closed(lanes, "a", 2)
    _taken(lanes, 0.0)
    lanes.ended(0.0)
    _closed(lanes, "a", 1)
    assert lanes.take(0.0) is first[0]


def test_a_chunk_that_nobody_takes_goes_behind_the_others_of_its_tag() -> None:
    lanes = Lanes(window=1)
    poison, good = _closed(lanes, "a", 2)
    for _ in range(3):
        assert lanes.take(0.0) is poison
        lanes.ended(0.0)
    assert lanes.take(100.0) is good
    lanes.acked(good.id)
    assert lanes.take(100.0) is poison, "it is kept and tried, for ever"


def test_tags_take_turns_where_one_chunk_ends_every_connection_at_once() -> None:
    lanes = Lanes(window=4)
    _closed(lanes, "poison", 2)
    good = _closed(lanes, "good", 1)
    for _ in range(2):
        assert _taken(lanes, 0.0)[0] == "poison"
        lanes.ended(0.0)
    turns = []
    for _ in range(4):
        (tag,) = _taken(lanes, 0.0)
        turns.append(tag)
        lanes.ended(0.0)
    assert sorted(turns[:2]) == ["good", "poison"] and turns[:2] == turns[2:]
    while _taken(lanes, 0.0) != ["good"]:
        lanes.ended(0.0)
    lanes.acked(good[0].id)
    _closed(lanes, "good", 2)
    assert sorted(_taken(lanes, 0.0)) == ["good", "good", "poison"], "and one ack ends that"


def test_what_is_due_next_is_known() -> None:
    lanes = Lanes(window=1)
    assert lanes.next_s(0.0, 0.01) is None
    lane = lanes.of("a")
    lane.open = Chunk("a", Segment(Path("none")), 7.0)
    assert lanes.next_s(7.0, 0.5) == 7.5
    _closed(lanes, "a")
    assert _taken(lanes, 7.0) == ["a"] and lanes.next_s(7.0, 0.5) is None, "it may not send: its chunk grows meanwhile"
    assert lanes.oldest_sent_s() == 7.0
