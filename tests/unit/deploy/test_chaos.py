"""Goal: chaos repeats itself from a seed, sends events that the project allows, and sees what is lost or twice.

Method: the plan drawn twice; the load's events through a gateway into the memory log; then the log is tampered with.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from ingest_world import PROJECT, Counts, HandClock, dependencies, message

from headrace.backends.log.memory import MemoryAdmin, MemoryLog, MemoryProducer, MemoryReader
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.events import decode_batch, encode_batch
from headrace.contract.formats.topics import Topics
from headrace.deploy.local.chaos.account import Account, all_there, closes, count
from headrace.deploy.local.chaos.load import Emitted, Events
from headrace.deploy.local.chaos.plan import LATE_S, SECOND, SECOND_WORKER, draw_kills, needed, victims_of
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.gateway import Gateway
from headrace.replay.ledger.ledger import Ledger

TOPICS = Topics()


def emitted_log() -> tuple[MemoryLog, Emitted]:
    """Return a log into which a gateway put what the load emitted."""
    log, emitted, events = MemoryLog(), Emitted(), Events(PROJECT, 3)
    MemoryAdmin(log).ensure_topics(TOPICS.specs(2))
    clock = HandClock()
    gateway = Gateway(
        dependencies(MemoryProducer(log), Counts(), clock, project=PROJECT, topics=TOPICS, partitions=2), "g"
    )
    for number in range(200):
        kind, tag, record = events.next()
        emitted.good.add((kind, record["request_id"]))
        if number % 2:
            del record["event_id"]
        gateway.offer(message(tag, [record], f"c{number}"), 100, Peer("a"), None)
    tag, record = events.broken()
    emitted.bad.add(record["event_id"])
    gateway.offer(message(tag, [record], "bad"), 100, Peer("a"), None)
    for _ in range(400):
        clock.ms += 10
        gateway.tick()
    assert gateway.drained()
    return log, emitted


def account(log: MemoryLog, emitted: Emitted) -> Account:
    found = Account(seed=1, stages=[], kills=[], rate=1, seconds=1.0, rate_held=1.0)
    count(MemoryReader(log), TOPICS, PROJECT, emitted, found)
    return found


def batches(log: MemoryLog) -> list[tuple[int, Any]]:
    return [(p, r) for p in range(2) for r in log.topics[TOPICS.events][p] if r.headers["kind"] != "punctuation"]


def test_the_same_seed_kills_the_same_at_the_same_times() -> None:
    first, again, other = (draw_kills(Random(seed), ["ingest", "kafka"], 50) for seed in (1, 1, 2))
    assert first == again != other
    assert {kill.process for kill in first} == {"ingest", "kafka"}
    assert {kill.when_ready for kill in first} == {True, False}
    assert all(0 <= kill.after_s <= LATE_S for kill in first)


def test_an_unknown_stage_is_refused_by_name() -> None:
    assert victims_of(["ingest", "kafka"], 2) == ["ingest", "kafka", SECOND]
    with pytest.raises(ConfigRejected, match="millrace"):
        victims_of(["ingest", "millrace"], 1)


def test_stream_names_both_workers_the_aggregator_and_the_sink() -> None:
    victims = victims_of(["stream"], 2)
    assert victims == ["stream", SECOND_WORKER, "aggregate", "sink"]
    assert victims_of(["stream", "aggregate", "sink"], 2) == victims
    assert victims_of(["sink"], 1) == ["sink"]
    assert needed(["stream"]) == {"ingest", "stream", "aggregate", "sink"}


def test_the_account_of_what_a_gateway_did_closes() -> None:
    log, emitted = emitted_log()
    found = account(log, emitted)
    assert found.closes, found
    assert (found.emitted, found.appended, found.dead_lettered) == (200, 200, 1)
    assert {kind for kind, _ in emitted.good} == {"impression", "click", "order"}


def test_an_account_closes_with_its_ledger_and_not_before_all_samples_are_stored() -> None:
    log, emitted = emitted_log()
    found = account(log, emitted)
    found.stages, found.ledger = ["sink"], Ledger(positives=1, samples=1, stored=0, closes=True)
    assert not all_there(found.ledger, ["sink"]) and not closes(found)
    found.ledger.stored = 1
    assert all_there(found.ledger, ["sink"]) and closes(found)
    assert all_there(Ledger(samples=1, closes=True), ["ingest"]), (
        "where no sink runs, nothing is on its way to the lake"
    )


def test_an_event_that_the_log_lacks_is_lost() -> None:
    log, emitted = emitted_log()
    emitted.good.add(("click", "r-nobody"))
    emitted.bad.add("bad-nobody")
    found = account(log, emitted)
    assert (found.lost, found.bad_lost, found.closes) == (1, 1, False)


def test_a_record_again_is_a_repeat_and_under_other_ids_it_is_twice() -> None:
    log, emitted = emitted_log()
    partition, record = batches(log)[0]
    log.append(TOPICS.events, partition, record.value, None, record.headers)
    rows = decode_batch(record.value).num_rows
    found = account(log, emitted)
    assert (found.repeated_in_log, found.twice, found.closes) == (rows, 0, True)
    batch = decode_batch(record.value)
    other = batch.set_column(0, batch.schema.field(0), [f"other-{n}" for n in range(rows)])
    log.append(TOPICS.events, partition, encode_batch(other), None, record.headers)
    found = account(log, emitted)
    assert (found.twice, found.closes) == (rows, False)


def test_an_event_that_nobody_emitted_is_made_up() -> None:
    log, emitted = emitted_log()
    emitted.good.remove(next(iter(emitted.good)))
    found = account(log, emitted)
    assert (found.made_up, found.closes) == (1, False)
