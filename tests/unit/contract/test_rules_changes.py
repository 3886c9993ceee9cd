"""Goal: a change of rules is written once into every partition, or refused by name; a crash between partitions is
corrected by applying again. Method: the memory log with a producer that dies, the real join behind it."""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pytest
from join_world import PROJECT
from msgspec import structs
from rules_world import LATE, WIDE, change

from headrace.backends.log.fenced_memory import FencedMemory, WriterEpochs
from headrace.backends.log.memory import MemoryLog
from headrace.contract.config import JoinConfig
from headrace.contract.errors import ConfigRejected, InvariantBroken, Unavailable
from headrace.contract.formats.topics import Topics
from headrace.contract.functions import feature_function
from headrace.contract.interfaces.log import Record
from headrace.contract.project import Task
from headrace.contract.rules import (
    change_of,
    check_code,
    decode_change,
    differences,
    encode_change,
    rules_of,
)
from headrace.contract.spec import Bucket, Categorical, Custom, FeatureSpec
from headrace.stream.join.join import JoinState
from headrace.stream.rule_changes import apply, begin_rules, ensure_first, first_rules, read_history, unapplied
from headrace.stream.stored_rules import StoredRules

TOPICS, PARTITIONS = Topics(), 3


class World:
    """A log of three partitions, its rules, and whoever writes them."""

    def __init__(self) -> None:
        self.log, self.epochs = MemoryLog(lambda: 0), WriterEpochs()
        self.log.admin().ensure_topics(TOPICS.specs(PARTITIONS))

    def writer(self) -> FencedMemory:
        return FencedMemory(self.log, TOPICS.rules, "rules", self.epochs)

    def apply(self, project, producer=None, *, dry=False):
        producer = self.log.producer() if producer is None else producer
        return apply(self.writer(), producer, TOPICS.events, PARTITIONS, project, now_ms=7, dry=dry)

    def events(self) -> list[list[Record]]:
        return self.log.partitions(TOPICS.events)


class Dying:
    """A producer that dies after some records: the next one raises."""

    def __init__(self, log: MemoryLog, records: int) -> None:
        self.producer, self.left = log.producer(), records

    def send(self, *args, **kwargs) -> None:
        if not self.left:
            raise Unavailable("the process is gone")
        self.left -= 1
        self.producer.send(*args, **kwargs)

    def flush(self, timeout_s: float) -> int:
        return self.producer.flush(timeout_s)


def begun() -> World:
    world = World()
    ensure_first(world.writer(), PROJECT, now_ms=1, pause=lambda _: None)
    return world


def test_rules_that_were_lost_are_never_begun_anew_beside_what_they_made():
    world = begun()
    world.apply(WIDE)
    world.log.delete(TOPICS.rules)
    world.log.admin().ensure_topics(TOPICS.specs(PARTITIONS))
    made = [StoredRules(0)]
    for ask in (
        lambda: begin_rules(world.writer(), PROJECT, now_ms=2, pause=lambda _: None, stored=lambda: made),
        lambda: apply(
            world.writer(),
            world.log.producer(),
            TOPICS.events,
            PARTITIONS,
            LATE,
            now_ms=7,
            stored=lambda: made,
        ),
    ):
        with pytest.raises(ConfigRejected, match="deleted or emptied"):
            ask()
    with pytest.raises(ConfigRejected, match="Bring the topic back from a copy"):
        unapplied(world.writer(), PROJECT, lambda: made)
    assert not world.log.partitions(TOPICS.rules)[0], "nothing was written"
    begin_rules(world.writer(), PROJECT, now_ms=2, pause=lambda _: None, stored=list)


def test_rules_whose_first_records_are_gone_are_refused_with_the_remedy():
    world = begun()
    world.apply(WIDE)
    world.log.trim(TOPICS.rules, 0, 3)
    for ask in (
        lambda: begin_rules(world.writer(), PROJECT, now_ms=2, pause=lambda _: None),
        lambda: world.apply(LATE),
        lambda: unapplied(world.writer(), PROJECT),
        lambda: first_rules(PROJECT, [], begin=3),
    ):
        with pytest.raises(ConfigRejected, match=r"first records .*Bring the topic back from a copy"):
            ask()


@pytest.mark.parametrize("stored", [StoredRules(1, {2: rules_of(WIDE)}), StoredRules(1, {}, first=rules_of(WIDE))])
def test_rules_that_were_filled_again_otherwise_are_refused_with_the_remedy(stored: StoredRules):
    """By an older release too: what the states were made by is held against what the topic says, whoever filled it."""
    world = begun()
    for ask in (
        lambda: begin_rules(world.writer(), PROJECT, now_ms=2, pause=lambda _: None, stored=lambda: [stored]),
        lambda: unapplied(world.writer(), PROJECT, lambda: [stored]),
    ):
        with pytest.raises(ConfigRejected, match=r"state of partition 1 was made by change .*raise log\.generation"):
            ask()
    world.apply(WIDE)
    fits = StoredRules(1, {2: rules_of(WIDE)}, first=rules_of(PROJECT))
    begin_rules(world.writer(), PROJECT, now_ms=2, pause=lambda _: None, stored=lambda: [fits])


@pytest.mark.parametrize("project", [PROJECT, WIDE, LATE])
def test_a_project_under_its_rules_declares_those_rules(project):
    """What a state says of its first rules is told from the project that was put under them."""
    assert rules_of(rules_of(project).over(PROJECT)) == rules_of(project)


def test_the_first_rules_are_the_projects_and_lie_in_no_partition():
    world = begun()
    # Another stage that starts with an edited file reads what is there.
    history = ensure_first(world.writer(), WIDE, now_ms=2, pause=lambda _: None)
    assert [c.number for c in history.changes] == [1]
    assert history.changes[0].rules == rules_of(PROJECT)
    assert not any(world.events())
    assert first_rules(WIDE, world.log.partitions(TOPICS.rules)[0]).tasks == PROJECT.tasks
    assert first_rules(WIDE, []) == WIDE


def test_what_an_earlier_build_wrote_is_read_and_passed_on_as_it_was():
    """Without fields that have come since, with defaults in their place; and the order of declarations is kept."""
    made = change(0, 2)
    raw = made.raw.replace(b',"correct_ms":0', b"")
    assert raw != made.raw
    older = structs.replace(made, raw=raw, digest=hashlib.sha256(raw).hexdigest()[:16])
    found = decode_change(encode_change(older), where="here")
    assert found == older and found.rules == rules_of(PROJECT)
    assert encode_change(found) == encode_change(older)
    assert list(found.rules.fields) == list(PROJECT.impression.fields)


def test_a_spec_written_with_whole_numbers_has_one_digest_in_file_and_log():
    spec = FeatureSpec(features=(Bucket(field="price", edges=(1, 10)),))
    project = structs.replace(PROJECT, features=spec).checked()
    found = decode_change(encode_change(change_of(project, 2, now_ms=0)), where="here")
    assert found.rules.features.digest() == project.features.digest() != spec.digest()


def test_a_column_that_differs_by_case_from_any_before_is_refused():
    fields = dict(PROJECT.impression.fields)
    without = {name: kind for name, kind in fields.items() if name != "price"}

    def declared(fields: dict[str, str]):
        kind = structs.replace(PROJECT.impression, fields=fields)
        return structs.replace(PROJECT, impression=kind, features=FeatureSpec())

    world = begun()
    world.apply(declared(without).checked())
    with pytest.raises(ConfigRejected, match=r"'Price'.*'price'"):
        world.apply(declared({**without, "Price": "float64"}).checked())
    assert world.apply(declared(fields).checked()).is_new


def test_a_log_that_is_read_with_a_name_of_ours_is_led_on_by_the_renamed_field():
    """Goal: a project of before may have `score`. Method: begin a log with it, and apply what `checked` asks for."""

    def named(name: str):
        kind = structs.replace(PROJECT.impression, fields={**PROJECT.impression.fields, name: "float64"})
        return structs.replace(PROJECT, impression=kind)

    world = World()
    ensure_first(world.writer(), named("score"), now_ms=1, pause=lambda _: None)
    with pytest.raises(ConfigRejected, match=r"'score'.*my_score.*headrace spec apply"):
        named("score").checked()
    renamed = named("my_score").checked()
    assert world.apply(renamed).is_new
    begin_rules(world.writer(), renamed, now_ms=2, pause=lambda _: None)
    join = JoinState(named("score"), JoinConfig(), silent_ms=300, partition=0)
    join.take_all(world.events()[0])
    assert (join.rules.number, join.rules.declared) == (2, rules_of(renamed))


def test_applying_twice_writes_once():
    world = begun()
    assert world.apply(WIDE, dry=True).is_new
    assert not any(world.events())
    first, second = world.apply(WIDE), world.apply(WIDE)
    assert (first.is_new, second.is_new, second.is_repaired) == (True, False, False)
    assert [len(records) for records in world.events()] == [1] * PARTITIONS
    found = decode_change(world.events()[1][0].value or b"", where="here")
    assert found.number == 2 and found.rules == rules_of(WIDE)
    assert world.apply(PROJECT).history.changes[-1].number == 3


@pytest.mark.parametrize("survived", range(PARTITIONS))
def test_a_crash_between_partitions_is_corrected_by_applying_again(survived):
    world = begun()
    with pytest.raises(Unavailable):
        world.apply(WIDE, Dying(world.log, survived))
    assert not read_history(world.writer()).is_whole
    assert sum(map(len, world.events())) == survived
    applied = world.apply(WIDE)
    assert applied.is_repaired and not applied.is_new and applied.history.is_whole
    joins = [JoinState(PROJECT, JoinConfig(), silent_ms=300, partition=p) for p in range(PARTITIONS)]
    for join, records in zip(joins, world.events(), strict=True):
        join.take_all(records)
        assert (join.rules.number, join.rules.declared) == (2, rules_of(WIDE))
        assert len(join.rules_in_force) == 1


def test_another_change_first_finishes_the_one_before():
    world = begun()
    with pytest.raises(Unavailable):
        world.apply(WIDE, Dying(world.log, 1))
    assert world.apply(LATE).is_repaired
    for records in world.events():
        numbers = [decode_change(record.value or b"", where="here").number for record in records]
        assert list(dict.fromkeys(numbers)) == [2, 3]


@pytest.mark.parametrize(
    ("project", "said"),
    [
        (structs.replace(PROJECT, impression=structs.replace(PROJECT.impression, key="item")), "partition key"),
        (
            structs.replace(PROJECT, impression=structs.replace(PROJECT.impression, fields={"user": "string"})),
            "'user' of the impression would change from int64 to string",
        ),
        (structs.replace(PROJECT, tasks=(Task(name="click", feedback="order", window_ms=5),)), "task 'click'"),
        (
            structs.replace(
                PROJECT,
                features=FeatureSpec(counters=(structs.replace(PROJECT.features.counters[0], window_ms=9),)),
            ),
            "counter 'u' would mean something else",
        ),
        (
            structs.replace(PROJECT, tasks=tuple(Task(name=f"t{n}", feedback="click", window_ms=5) for n in range(6))),
            "3 lanes were used so far and 6 would be added",
        ),
    ],
    ids=["key", "type", "task", "counter", "lanes"],
)
def test_what_may_not_change_is_refused_and_nothing_is_written(project, said):
    world = begun()
    with pytest.raises(ConfigRejected, match=said):
        world.apply(project)
    assert not any(world.events())
    # One that is in the log all the same changes nothing, in every partition alike.
    join = JoinState(PROJECT, JoinConfig(), silent_ms=300, partition=0)
    value = encode_change(change_of(project, 2, now_ms=0))
    join.take(Record("events", 0, 0, None, value, {"kind": "spec"}, 0))
    assert (join.rules.number, join.totals.bad_records, join.offset) == (1, 1, 0)


def test_a_counter_that_was_dropped_comes_back_as_it_was_or_not_at_all():
    world = begun()
    world.apply(structs.replace(PROJECT, features=FeatureSpec()))
    other = FeatureSpec(counters=(structs.replace(PROJECT.features.counters[0], window_ms=9),))
    with pytest.raises(ConfigRejected, match="counter 'u'"):
        world.apply(structs.replace(PROJECT, features=other))
    assert world.apply(PROJECT).is_new


def test_a_change_that_this_build_cannot_read_stops_the_join():
    join = JoinState(PROJECT, JoinConfig(), silent_ms=300, partition=0)
    torn = structs.replace(change(2, 2), digest="0" * 16)
    later = encode_change(change(2, 2)).replace(b'"window_ms"', b'"window_of_a_later_build"')
    for value, said in ((later, "Run the build that wrote it"), (encode_change(torn), "it is damaged")):
        with pytest.raises(InvariantBroken, match=said):
            join.take(Record("events", 0, 0, None, value, {"kind": "spec"}, 0))


def test_a_function_must_be_declared_and_be_the_code_that_was_applied():
    @feature_function("rules.length", version=1)
    def length(text: pa.Array) -> pa.Array:
        """Say how long."""
        return pa.compute.utf8_length(text)

    spec = FeatureSpec(
        features=(
            Custom(function="rules.length", version=1, fields=("version",), gives="numbers"),
            Categorical(field="item"),
        )
    )
    made = change_of(structs.replace(PROJECT, features=spec), 2, now_ms=0)
    assert len(made.functions["rules.length@1"]) == 16
    check_code(made)
    with pytest.raises(ConfigRejected, match="has other code here"):
        check_code(structs.replace(made, functions={"rules.length@1": "0" * 16}))
    unknown = FeatureSpec(features=(Custom(function="rules.gone", version=1, fields=("version",), gives="numbers"),))
    with pytest.raises(ConfigRejected, match=r"no feature function 'rules\.gone'"):
        change_of(structs.replace(PROJECT, features=unknown), 2, now_ms=0)


def test_a_stage_begins_with_the_rules_of_the_log_whatever_lies_on_disk():
    world = begun()
    began = begin_rules(world.writer(), WIDE, now_ms=2, pause=lambda _: None)
    assert rules_of(began) == rules_of(PROJECT)
    assert unapplied(world.writer(), WIDE) == differences(rules_of(PROJECT), rules_of(WIDE))
    assert unapplied(world.writer(), PROJECT) == []
    assert unapplied(World().writer(), WIDE) == [], "no stage has begun"
    impression = structs.replace(PROJECT.impression, key="item")
    with pytest.raises(ConfigRejected, match=r"partition key is 'item' .* log\.generation"):
        begin_rules(world.writer(), structs.replace(PROJECT, impression=impression), now_ms=2, pause=lambda _: None)


def test_differences_name_what_changes():
    lines = differences(rules_of(PROJECT), rules_of(WIDE))
    assert any(line.startswith("+ field device: string") for line in lines)
    assert "- task order" in lines and "- counter u" in lines
    assert "~ task click: window_ms 500 -> 900, correct_ms 0 -> 500" in lines
    assert "+ feature Bucket(field='price', edges=(2.0, 5.0))" in lines
    assert not differences(rules_of(WIDE), rules_of(WIDE))
