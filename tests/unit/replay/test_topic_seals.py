"""The seal of any position, found in the topic.

Goal: it is that of the samples up to there, wherever the records were cut and however often they were written. Method:
logs that workers left who crashed and were declared dead, from a seed; every position, beside a plain sum.
"""

from __future__ import annotations

import asyncio

import msgspec
import pyarrow as pa
import pytest
from stream_world import World

from headrace.contract.formats.positions import START, Position, orders
from headrace.contract.formats.topics import Topics
from headrace.kernels.sample_ids import seal_of
from headrace.replay.ledger.keys import KEYS
from headrace.replay.ledger.topic_seals import NotSealed, TopicSeals

SAMPLES = Topics().samples


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_every_position_has_the_seal_of_what_lies_up_to_it(seed: int):
    """Records come twice and out of turn, and the last ones are not ours."""
    world = World(seed)
    asyncio.run(world.run())
    taken = world.read()
    for headers in ({}, {"after": "x", "last": "1:1"}):
        world.log.append(SAMPLES, 0, b"foreign", None, headers)
    order_N = orders(taken["offset"].to_numpy(), taken["rank"].to_numpy())
    topic = TopicSeals(world.log.reader(), SAMPLES)
    places = [Position(*place) for place in zip(taken["offset"].to_pylist(), taken["rank"].to_pylist(), strict=True)]
    newest = topic.newest(0)
    assert newest is not None and newest.last == places[-1] and topic.at(0, START) == {}
    assert topic.following(0, places[-1]) is None
    for n, place in enumerate(places):
        found = {task: seal for task, seal in topic.at(0, place).items() if seal.count}
        assert found == seal_of(taken.filter(pa.array(order_N <= order_N[n])))
        if n:
            following = topic.following(0, places[n - 1])
            assert following is not None and following.after < place <= following.last
    for first, last in ((0, len(places) - 1), (7, 30), (30, 30)):
        rows = topic.rows(0, places[first], places[last], KEYS)
        assert rows["event_id"].to_pylist() == taken["event_id"].to_pylist()[first + 1 : last + 1]


def test_what_the_topic_does_not_hold_is_not_guessed():
    world = World(5)
    asyncio.run(world.run())
    records = world.log.partitions(SAMPLES)[0]
    topic = TopicSeals(world.log.reader(), SAMPLES)
    with pytest.raises(NotSealed, match="in no record that the topic holds"):
        topic.at(0, Position(10**6, 0))
    last = records[-1]
    bad = last.headers["sealed"].replace("[-1,-1]", "[3,0]")
    records[-1] = msgspec.structs.replace(last, headers=last.headers | {"sealed": bad})
    topic = TopicSeals(world.log.reader(), SAMPLES)
    newest = topic.newest(0)
    assert newest is not None
    with pytest.raises(NotSealed, match=r"a seal that begins after \(3, 0\)"):
        topic.at(0, newest.last)
    world.log.trim(SAMPLES, 0, len(records) - 1)
    topic = TopicSeals(world.log.reader(), SAMPLES)
    with pytest.raises(NotSealed):
        topic.at(0, Position(newest.after.offset - 5, 0))


def test_a_topic_without_samples_has_no_newest_record():
    world = World(1)
    assert TopicSeals(world.log.reader(), SAMPLES).newest(0) is None
    world.log.append(SAMPLES, 0, b"foreign", None, {})
    assert TopicSeals(world.log.reader(), SAMPLES).newest(0) is None
