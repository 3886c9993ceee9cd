"""Goal: the ledger refuses topics that are not those which the pipeline read, and never draws them as if they were.

Method: a pipeline in memory that closes; then a topic is emptied, made anew, or filled again by somebody else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from ledger_world import CONFIG, PROJECT, TOPICS, World, begin_rules
from msgspec import structs

from headrace.backends.log.fenced_memory import FencedMemory, WriterEpochs
from headrace.contract.errors import ConfigRejected, InvariantBroken
from headrace.contract.formats.steps import encode_step
from headrace.contract.rules import rules_of
from headrace.contract.spec import FeatureSpec
from headrace.replay.ledger.take_stock import Mode
from headrace.stream.rule_changes import ensure_first
from headrace.stream.stored_rules import check_fits, stored_rules

PARTITIONS = CONFIG.log.partitions
OTHER = structs.replace(PROJECT, features=FeatureSpec())
BOTH: list[Mode] = ["seals", "full"]


def made(folder: Path) -> World:
    world = World(folder)
    for partition in range(PARTITIONS):
        world.append(partition, 60)
    world.snapshot(topic_id="of-events")
    world.store()
    world.learn()
    assert world.draw().closes and world.draw("full").closes
    return world


def emptied(world: World) -> None:
    world.log.delete(TOPICS.rules)
    world.log.admin().ensure_topics(TOPICS.specs(PARTITIONS))


def trimmed(world: World) -> None:
    world.log.trim(TOPICS.rules, 0, 1)


def filled_otherwise(world: World) -> None:
    emptied(world)
    begin_rules(world.log, OTHER)


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("harm", [emptied, trimmed, filled_otherwise])
def test_rules_that_are_not_those_of_the_stored_states_are_refused_with_the_remedy(tmp_path: Path, harm, mode):
    world = made(tmp_path)
    harm(world)
    with pytest.raises(ConfigRejected, match=r"Bring the topic back from a copy, or raise log\.generation"):
        world.draw(mode)


@pytest.mark.parametrize("mode", BOTH)
def test_rules_that_were_brought_back_from_a_copy_are_taken(tmp_path: Path, mode: Mode):
    """The topic has another id, and says the same."""
    world = made(tmp_path)
    kept = list(world.log.partitions(TOPICS.rules)[0])
    emptied(world)
    for record in kept:
        world.log.append(TOPICS.rules, 0, record.value, record.key, record.headers)
    assert world.draw(mode).closes


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("topic", [TOPICS.samples, TOPICS.events])
def test_a_topic_that_was_made_anew_is_refused(tmp_path: Path, topic: str, mode: Mode):
    world = made(tmp_path)
    ids = {TOPICS.samples: "of-samples", TOPICS.events: "of-events"}
    last = structs.replace(world.write_step("r1", ()), step=3, samples_id="of-samples")
    world.log.append(TOPICS.steps, 0, encode_step(last), None, {})
    world.draw(mode, topic_ids=ids)
    with pytest.raises(InvariantBroken, match=rf"topic '{topic}' .*deleted and made anew(?s:.*)log\.generation"):
        world.draw(mode, topic_ids={**ids, topic: "another"})


def test_a_state_says_by_which_rules_its_log_begins(tmp_path: Path):
    """One of an older release says only what something waits under; a change that is not in the topic is named."""
    world = made(tmp_path)
    found = stored_rules(world.blobs, 1, PARTITIONS)
    assert [one.partition for one in found] == [0, 1]
    assert all(one.by_number == {1: rules_of(PROJECT)} for one in found)
    writer = FencedMemory(world.log, TOPICS.rules, "rules", WriterEpochs())
    history = ensure_first(writer, OTHER, now_ms=0, pause=lambda _: None, stored=lambda: found)
    check_fits(history.changes, found)
    later = structs.replace(history.changes[0], number=2)
    behind = [replace(one, by_number={2: rules_of(PROJECT)}) for one in found]
    with pytest.raises(ConfigRejected, match=r"made by change 2 of rules .* has no such change"):
        check_fits(history.changes, behind)
    check_fits([*history.changes, later], behind)
