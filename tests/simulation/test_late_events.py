"""Goal: an outage of a day comes through by itself, each event once, and the watermark does not wait for it.

Method: a seed lets a sender spool for a day; part of what it holds was delivered before, and its acks were lost. It
hands all of it to a gateway that remembers nothing, some of it twice. Settlers are killed at any of their effects. Then
the log is joined from its beginning, in several cuts: every impression is one sample with its right label.
"""

from __future__ import annotations

import pytest
from late_world import LateWorld, outcome, wrong
from letters_world import TOPICS

from headrace.contract.formats.dead_letters import TOO_LATE, decode_retry_mark
from headrace.contract.formats.events import PUNCTUATION, decode_batch, decode_punctuation
from headrace.ingest.dead_letters.letters import read_letters, superseded
from headrace.ingest.dead_letters.look_up import LookUp
from headrace.replay.ledger.draw import draw_gateways
from headrace.replay.ledger.ledger import Ledger


def outage(seed: int, kills: int) -> tuple[LateWorld, int]:
    """Live through the outage and its end; return the world and how many events the sender gave twice."""
    world = LateWorld(seed)
    random = world.random
    world.pass_time(1_800)
    spool, delivered = [], 0
    for _ in range(random.randint(20, 40)):
        world.pass_time(random.choice([20.0, 1_800.0, 3_600.0]))
        chunks = world.visit()
        spool += chunks
        # They came through, and the acks did not.
        through = [chunk for chunk in chunks if random.random() < 0.3]
        for chunk in through:
            world.send(chunk)
        delivered += len(through)
        if len(chunks) == 2 and len(through) == 1:
            # The other one is a day late: the click finds no impression that waits.
            world.wanted[chunks[0][2][0]["request_id"]] = False
    world.pass_time(86_400 - 3_600 * 12)
    world.restart()
    world.acked.clear()
    again = [chunk for chunk in spool if random.random() < 0.2]
    for chunk in [*spool, *again]:
        world.send(chunk)
        if random.random() < 0.1:
            # Its acks are lost once more.
            world.restart()
    world.turn()
    while left := [chunk for chunk in spool if chunk[0] not in world.acked]:
        # What a killed gateway had not acked.
        for chunk in left:
            world.send(chunk)
        world.turn()
    world.pass_time(30)
    assert {name for name, _, _ in spool} <= world.acked, "it may forget everything"
    newest = max(decode_punctuation(r.value).time_ms for r in world.records() if r.headers["kind"] == PUNCTUATION)
    assert newest > world.clock.now_ms() - 60_000, "nobody waits for late events"
    world.settle_with_kills(kills)
    for _ in range(2):
        # The last windows end.
        world.clock.advance(30.0)
        world.turn()
    return world, delivered


def check(seed: int, kills: int) -> LateWorld:
    world, delivered = outage(seed, kills)
    states, samples = world.join()
    assert wrong(world, samples) == []
    counts = outcome(states)
    assert counts["impressions"] == len(world.wanted) and counts["feedback"] == world.clicks
    assert counts["too_late"] == counts["bad_records"] == 0
    for cut in (2, 7, 1_000):
        assert world.join(cut)[1] == samples, "replay is equal"
    assert delivered == 0 or world.counts.totals["late_settled_total:repeated"] > 0 or kills
    assert closes(world), "read = appended + dead_lettered + repeated"
    return world


def closes(world: LateWorld) -> bool:
    """Draw the ledger's first part, as `take_stock` does."""
    reader = world.log.reader()
    end = reader.end_offsets(TOPICS.dead_letters)[0]
    letters = list(read_letters(reader, TOPICS.dead_letters, end))
    marks = [decode_retry_mark(value) for _, value in world.clients().writer.read(0)]
    fates: dict[str, int] = {}
    for _, fate in superseded(letters, marks):
        fates[fate] = fates.get(fate, 0) + 1
    rows, said = 0, []
    for record in world.records():
        if record.headers["kind"] == PUNCTUATION:
            said.append(decode_punctuation(record.value or b""))
        else:
            rows += decode_batch(record.value or b"").num_rows
    ledger = Ledger()
    draw_gateways(ledger, rows, len(letters), said, fates)
    assert ledger.dead_lettered == 0 and all(letter.content.reason == TOO_LATE for letter in letters)
    return ledger.read == ledger.appended + ledger.dead_lettered + ledger.repeated


@pytest.mark.parametrize("seed", range(3))
def test_an_outage_of_a_day_comes_through_by_itself(seed: int) -> None:
    world = check(seed, kills=0)
    assert world.counts.totals["late_waiting"] == world.counts.totals["late_unknown"] == 0


@pytest.mark.parametrize("seed", range(3, 9))
def test_a_settler_that_is_killed_loses_nothing_and_doubles_nothing(seed: int) -> None:
    check(seed, kills=3)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(9, 150))
def test_an_outage_of_a_day_comes_through_whoever_is_killed(seed: int) -> None:
    check(seed, kills=seed % 6)


def test_without_looking_up_what_came_through_before_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LookUp, "_look_in_log", lambda *_: None)
    with pytest.raises(AssertionError):
        for seed in range(3):
            check(seed, kills=0)
