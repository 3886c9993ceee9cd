"""Goal: whatever was taken is acked in the end, and under one chunk id, so that the gateway counts it once.

Method: the outbox from a seed on a real folder and a clock in the hand: events, chunks, acks, connections that end, a
gateway that knows a smaller bound, crashes at any point with half a record behind. The checker is the other side: it
knows which chunk brought which event, and nothing of the outbox.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from random import Random

import msgpack
import pytest

from headrace.contract.errors import Overloaded
from headrace.sender.outbox import Outbox

TAGS = ("a", "b", "shut")


class Side:
    """The gateway's side: what chunks brought, and which were acked."""

    def __init__(self) -> None:
        self.chunks_of: defaultdict[int, set[str]] = defaultdict(set)
        self.acked: set[int] = set()
        self.acks: set[str] = set()

    def take(self, name: str, body: list[bytes]) -> None:
        for entry in body:
            self.chunks_of[msgpack.unpackb(entry[12:])].add(name)


def _open(folder: Path) -> Outbox:
    return Outbox(folder, window=3, bytes_max=60_000, chunk_bytes=600, message_max=1 << 20, fsync=False)


def _crash(outbox: Outbox, random: Random) -> None:
    """End as kill -9 does: nothing is closed in order, and half a record may be at the end of a file."""
    files = sorted(outbox.spool.folder.rglob("*.seg"))
    outbox.spool.forsake()
    if files and random.random() < 0.5:
        with random.choice(files).open("ab") as file:
            file.write(b"\xff\0\0\0half")


@pytest.mark.parametrize("seed", range(12))
def test_crashes_lose_nothing_and_make_nothing_twice(tmp_path: Path, seed: int) -> None:
    random, side, taken, now_s = Random(seed), Side(), set[int](), 0.0
    outbox, on_the_way = _open(tmp_path), list[str]()
    for step in range(1_500):
        now_s += random.random() * 0.2
        what = random.random()
        if what < 0.5:
            try:
                entry = b"\x92\xd7\x00" + bytes(8) + b"\x00" + msgpack.packb(step)
                outbox.add(random.choice(TAGS), entry, now_s)
                taken.add(step)
            except Overloaded:
                pass
        elif what < 0.6:
            outbox.close_chunks(now_s, 0.1, away=random.random() < 0.2)
        elif what < 0.8:
            if (chunk := outbox.lanes.take(now_s)) is not None:
                side.take(chunk.id, chunk.body)
                if chunk.tag != "shut" or random.random() < 0.1:
                    on_the_way.append(chunk.id)
        elif what < 0.95:
            if on_the_way:
                name = on_the_way.pop(random.randrange(len(on_the_way)))
                outbox.acked(name)
                side.acks.add(name)
        elif what < 0.98:
            outbox.lanes.ended(now_s)
            outbox.cut_large()
            on_the_way = []
        else:
            _crash(outbox, random)
            outbox, on_the_way = _open(tmp_path), []
    for _ in range(10_000):
        now_s += 6.0
        outbox.close_chunks(now_s, 0.0, away=False)
        while (chunk := outbox.lanes.take(now_s)) is not None:
            side.take(chunk.id, chunk.body)
            outbox.acked(chunk.id)
            side.acks.add(chunk.id)
        outbox.lanes.ended(now_s)
        if not outbox.unacked:
            break
    brought = {event for event, names in side.chunks_of.items() if names & side.acks}
    assert taken <= brought and set(side.chunks_of) <= taken
    assert {event: names for event, names in side.chunks_of.items() if len(names) > 1} == {}
    assert outbox.unacked == 0 and all(lane.bytes == 0 for lane in outbox.lanes)
    outbox.close()
    assert list(tmp_path.rglob("*.seg")) == [] and list(tmp_path.glob("*.damaged")) == []


def test_what_is_cut_twice_over_a_crash_has_the_same_ids(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        outbox = _open(tmp_path)
        if not ids:
            for number in range(20):
                outbox.add("a", b"\x92\xd7\x00" + bytes(8) + b"\x00" + msgpack.packb(number), 0.0)
            outbox.close_chunks(1.0, 0.0, away=False)
        outbox.message_max = 128 + 4 + 50
        settle = outbox._settle
        outbox._settle = lambda *_: None  # type: ignore[method-assign]
        outbox.cut_large()
        ids.append([chunk.id for chunk in outbox.lanes.of("a").ready])
        outbox._settle = settle  # type: ignore[method-assign]
        outbox.spool.forsake()
    assert len(ids[0]) > 3 and set(ids[0]) <= set(ids[1]), "the gateway knows the parts, whichever copy comes first"
