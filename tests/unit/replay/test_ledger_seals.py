"""The ledger drawn from seals.

Goal: it says what a full drawing says, finds every fault that is planted, and trusts nothing that it can't check.
Method: a whole pipeline in memory, pieces of any size, one fault in one place, both drawings beside each other.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable
from ledger_world import PROJECT, TOPICS, Change, World, exchanged, figures, ranged, repeated, without
from stream_world import Blobs

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.log.memory import MemoryReader
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.dead_letters import (
    TOO_LATE,
    DeadLetter,
    RetryMark,
    encode_dead_letter,
    encode_retry_mark,
)
from headrace.contract.formats.events import decode_batch
from headrace.contract.formats.steps import StepRange, encode_step
from headrace.replay.ledger.kept_account import name_of
from headrace.replay.ledger.ledger import Ledger, is_sound, table
from headrace.trainer.commit.steps_archive import StepsArchive
from headrace.trainer.source.stored import stored_order

NAME = name_of(PROJECT.name, 1)


def made(folder: Path, pieces: int = 2, **kwargs: int) -> World:
    """Return a pipeline whose commits, steps and records end at different samples."""
    world = World(folder, **kwargs)
    for _ in range(pieces):
        advance(world)
    return world


def advance(world: World, events: int = 60) -> None:
    for partition in (0, 1):
        world.append(partition, events)
    world.snapshot()
    world.store(33)
    world.learn(47)


def both(world: World) -> Ledger:
    """Draw from seals and in full, see that they agree, and return the first."""
    sealed, full = world.draw("seals"), world.draw("full")
    assert sealed.drawn_from == "seals" and full.drawn_from == "log", sealed.not_sealed
    assert figures(sealed) == figures(full)
    return sealed


def test_it_says_what_a_full_drawing_says(tmp_path: Path):
    """Three tasks of which one is eager, repeats, late clicks; nothing ends where anything else does."""
    world = World(tmp_path)
    for _ in range(3):
        advance(world)
        ledger = both(world)
        assert ledger.closes and is_sound(ledger) and not ledger.reread and ledger.learnt > 0
    assert ledger.repeated_in_log > 0 and ledger.tasks["soon"].positives > 0 and ledger.in_flight > 0
    assert "its own word, partition 0 up to offset" in table(ledger)


def test_a_drawing_reads_no_sample_and_no_event_that_an_earlier_one_knew(tmp_path: Path, monkeypatch):
    """The lake is not read, `events` is not read, and steps are read once."""
    world = made(tmp_path)
    assert world.draw().closes
    advance(world)
    monkeypatch.setattr(world.lake, "read", lambda *_: pytest.fail("the lake was read"))
    read: list[tuple[str, int]] = []
    reader = world.log.reader()

    class Watched:
        def poll(self, records_max, timeout_s):
            records = reader.poll(records_max, timeout_s)
            read.extend((record.topic, record.offset) for record in records)
            return records

        def __getattr__(self, name):
            return getattr(reader, name)

    monkeypatch.setattr(world.log, "reader", Watched)
    assert world.draw().closes
    assert [offset for topic, offset in read if topic == TOPICS.steps] == [2]
    assert not any(topic == TOPICS.events for topic, _ in read)


@pytest.mark.parametrize(("change", "wrong"), [(without(5), (1, 0)), (repeated(5), (0, 1)), (exchanged(5), (1, 1))])
@pytest.mark.parametrize("is_drawn", [True, False])
def test_a_fault_in_the_lake_is_counted_by_id(tmp_path: Path, change, wrong: tuple[int, int], is_drawn: bool):
    """After a sound drawing only what is new is read by id."""
    world = made(tmp_path)
    if is_drawn:
        assert world.draw().closes
    position = tuple(world.stored[0])
    world.append(0, 60)
    world.snapshot()
    world.store(33, change, partitions=(0,))
    ledger = world.draw()
    assert (ledger.lost_where["lake"], ledger.twice_where["lake"], ledger.lost, ledger.twice) == (*wrong, *wrong)
    assert not ledger.closes and not is_sound(ledger) and ledger.drawn_from == "seals"
    (told,) = ledger.reread
    assert told.startswith(f"lake, partition 0, after {position if is_drawn else (-1, -1)} up to")
    assert world.draw().lost == wrong[0], "what is not sound is not kept"
    full = world.draw("full")
    assert (full.lost, full.twice) == wrong


@pytest.mark.parametrize(("change", "wrong"), [(without(5), (1, 0)), (repeated(5), (0, 1)), (exchanged(5), (1, 1))])
@pytest.mark.parametrize("is_drawn", [True, False])
def test_a_fault_in_a_step_is_found_in_its_range(tmp_path: Path, change, wrong: tuple[int, int], is_drawn: bool):
    world = made(tmp_path, steps=500)
    if is_drawn:
        assert world.draw().closes
    for number in range(5):
        world.append(0, 40)
        world.append(1, 40)
        world.learn(50, change if number == 2 else lambda rows: rows)
    world.snapshot()
    ledger = world.draw()
    assert (ledger.lost_where["model"], ledger.twice_where["model"], ledger.drawn_from) == (
        *(n * 2 for n in wrong),
        "seals",
    )
    assert [told.split(", after")[0] for told in ledger.reread] == [f"run r1, step 5, partition {p}" for p in (0, 1)]
    full = world.draw("full")
    assert (full.lost, full.twice) == (ledger.lost, ledger.twice)


def test_steps_that_were_moved_to_the_store_are_read_there(tmp_path: Path):
    """Moved behind the kept account, before it, and beyond it."""
    world = made(tmp_path)
    assert both(world).closes
    for moved in (1, 3):
        advance(world)
        _move_steps(world, moved)
        ledger = both(world)
        assert ledger.closes and is_sound(ledger) and not ledger.reread
    world.blobs.delete(NAME)
    assert figures(both(world)) == figures(ledger)
    (name,) = [name for name in world.blobs.list(f"steps/{TOPICS.steps}-unknown") if "/00000000000000000001-" in name]
    world.blobs.delete(name)
    world.blobs.delete(NAME)
    with pytest.raises(InvariantBroken, match="steps from offset 1 to below 3 are neither in topic"):
        world.draw()


def _move_steps(world: World, upto: int) -> None:
    """Move the first steps to the store, as a trainer does."""
    records = [(r.offset, r.value or b"") for r in world.log.partitions(TOPICS.steps)[0] if r.offset < upto]
    StepsArchive(world.blobs, TOPICS.steps).put(records[0][0], upto, records)
    world.log.admin().delete_before(TOPICS.steps, {0: upto})


@pytest.mark.parametrize("shift", [-9, 3])
def test_an_overlap_or_a_gap_between_steps_is_counted_by_id(tmp_path: Path, shift: int):
    world = made(tmp_path)
    world.append(0, 40)
    world.snapshot()
    world.learn(50, shift=shift)
    ledger = world.draw()
    assert ledger.drawn_from == "log" and "goes on in partition 0 after" in ledger.not_sealed
    assert bool(ledger.twice) == (shift < 0) and bool(ledger.lost) == (shift > 0) and not is_sound(ledger)


def test_a_step_that_was_written_again_counts_once_and_another_in_its_place_is_looked_at(tmp_path: Path):
    world = made(tmp_path)
    step = world.write_step("r1", ())
    world.log.append(TOPICS.steps, 0, encode_step(step), None, {})
    assert both(world).models["r1"].steps == 3
    world.log.append(TOPICS.steps, 0, encode_step(msgspec.structs.replace(step, seed=9)), None, {})
    ledger = world.draw()
    assert ledger.drawn_from == "log" and "step 3 follows step 3" in ledger.not_sealed and ledger.closes


def test_rows_that_no_commit_tells_are_counted_by_id(tmp_path: Path):
    """Somebody adds a file to the table, or takes one: the seals agree, and the files hold other rows."""
    world = made(tmp_path)
    rows = world.lake.read()
    DeltaTable(world.lake.uri).delete(f"event_id = '{rows['event_id'][3].as_py()}'")
    ledger = world.draw()
    assert ledger.drawn_from == "log" and "rows were committed to the lake and its files hold" in ledger.not_sealed
    assert ledger.lost_where["lake"] >= 1 and not ledger.closes


def test_rows_that_retention_dropped_are_no_loss(tmp_path: Path, monkeypatch):
    world = made(tmp_path)
    stored, state = world.lake.read(), world.lake.state
    DeltaTable(world.lake.uri).delete(f"event_id = '{stored['event_id'][3].as_py()}'")
    dropped = stored.num_rows - world.lake.read().num_rows
    monkeypatch.setattr(world.lake, "state", lambda: dataclasses.replace(state(), retained_before_ms=1))
    ledger = world.draw()
    assert dropped and (ledger.retained, ledger.lost, ledger.closes) == (dropped, 0, True)
    assert ledger.drawn_from == "seals" and ledger.stored == stored.num_rows - dropped


def test_several_runs_are_each_held_against_their_own_tasks(tmp_path: Path):
    """One stands still, one begins with the lake and learns two tasks, and the first one goes on: it is the newest."""
    world = made(tmp_path)
    world.learn_lake(run="r2", heads=("click", "soon"))
    assert world.draw().closes
    world.append(0, 50)
    world.snapshot()
    world.learn(40, run="r2", heads=("click", "soon"))
    ledger = both(world)
    assert ledger.closes and list(ledger.models) == ["r1", "r2"]
    assert ledger.models["r2"].learnt > ledger.models["r1"].learnt > 0
    world.learn(20)
    ledger = both(world)
    assert ledger.closes and list(ledger.models) == ["r2", "r1"]


def test_an_eager_task_with_corrections_learnt_from_the_lake(tmp_path: Path):
    """A negative and its correction are two samples of one impression and task."""
    world = made(tmp_path)
    world.learn_lake(run="r2", heads=("soon",))
    world.learn(1_000, run="r2", heads=("soon",))
    ledger = both(world)
    assert ledger.closes and ledger.models["r2"].learnt > 50
    samples = [row for batches in world.samples.values() for batch in batches for row in batch.to_pylist()]
    assert sum(bool(row["correction"]) for row in samples) > 5


def test_a_run_that_learns_the_lake_is_on_its_way(tmp_path: Path):
    world = made(tmp_path)
    world.learn_lake(run="r2", rows=10)
    world.log.partitions(TOPICS.steps)[0].pop()
    assert both(world).closes


# What is past its retention


def test_events_past_their_retention_are_accounted_for_by_the_joins_word(tmp_path: Path):
    world = made(tmp_path)
    before = both(world)
    for partition in (0, 1):
        world.log.trim(TOPICS.events, partition, 100)
    ledger = world.draw("auto")
    assert ledger.drawn_from == "seals" and figures(ledger) == figures(before) and ledger.closes
    advance(world)
    ledger = world.draw("auto")
    assert ledger.closes and ledger.impressions > before.impressions


def test_samples_past_their_retention_are_known_from_before(tmp_path: Path):
    """A run that stands still is not looked up again; the lake and the live run are where the topic still is."""
    world = made(tmp_path)
    world.learn_lake(run="old")
    world.learn(20)
    assert world.draw().closes
    advance(world)
    world.store()
    world.learn()
    assert world.draw().closes
    for partition in (0, 1):
        end = len(world.log.partitions(TOPICS.samples)[partition])
        world.log.trim(TOPICS.samples, partition, end - 1)
    ledger = world.draw()
    assert ledger.drawn_from == "seals" and ledger.closes, ledger.not_sealed
    assert set(ledger.models) == {"r1", "old"} and ledger.models["old"].in_flight > 0


# What is not to be trusted


def keep(world: World, **changes: object) -> None:
    """Put another account of the ledger in place of its own, with a digest that fits."""
    body = msgspec.json.decode(world.blobs.items[NAME].partition(b"\n")[2])
    data = msgspec.json.encode(body | changes)
    world.blobs.items[NAME] = hashlib.sha256(data).hexdigest().encode() + b"\n" + data


@pytest.mark.parametrize(
    "damage",
    [
        lambda world: world.blobs.items.update({NAME: world.blobs.items[NAME][:-9]}),
        lambda world: world.blobs.items.update({NAME: b""}),
        lambda world: world.blobs.items.update({NAME: world.blobs.items[NAME].replace(b'"rows":', b'"rows":1')}),
        lambda world: keep(world, version=9),
        lambda world: keep(world, project="other"),
        lambda world: keep(world, generation=2),
        lambda world: keep(world, topic_ids={TOPICS.steps: "before"}),
        lambda world: keep(world, steps_offset=999),
        lambda world: keep(world, runs={"r1": 3}),
    ],
)
def test_an_account_that_is_torn_or_foreign_is_not_trusted(tmp_path: Path, damage):
    world = made(tmp_path)
    assert world.draw().closes
    damage(world)
    advance(world)
    ledger = world.draw(topic_ids={TOPICS.steps: "now"})
    assert ledger.closes and ledger.reread and ledger.reread[0].startswith("all steps, since "), ledger.reread
    assert ledger.models["r1"].steps == 3
    ledger = world.draw(topic_ids={TOPICS.steps: "now"})
    assert ledger.closes and not ledger.reread


def test_an_account_whose_lake_is_another_begins_at_the_beginning(tmp_path: Path):
    world = made(tmp_path)
    assert world.draw().closes
    stored = msgspec.json.decode(world.blobs.items[NAME].partition(b"\n")[2])["lake"]
    keep(world, lake={p: {**till, "seal": [1, 2]} for p, till in stored.items()})
    world.append(0, 60)
    world.snapshot()
    world.store(33, without(5), partitions=(0,))
    ledger = world.draw()
    assert ledger.reread[0].startswith("lake, partition 0, after (-1, -1)") and ledger.lost == 1


def test_a_topic_of_which_no_id_is_told_is_read_by_id(tmp_path: Path):
    """With an id it is refused: test_ledger_topics.py."""
    world = made(tmp_path)
    world.log.delete(TOPICS.events)
    world.log.admin().ensure_topics(TOPICS.specs(2))
    ledger = world.draw()
    assert ledger.drawn_from == "log" and "the log ends at 0" in ledger.not_sealed and not is_sound(ledger)


def test_samples_that_were_made_anew_are_read_by_id(tmp_path: Path):
    world = made(tmp_path)
    assert world.draw().closes
    world.log.delete(TOPICS.samples)
    world.log.admin().ensure_topics(TOPICS.specs(2))
    ledger = world.draw()
    assert ledger.drawn_from == "log" and "is in no record that the topic holds" in ledger.not_sealed
    assert ledger.lost_where["topic"] > 0


def test_what_a_release_without_seals_wrote_is_read_by_id(tmp_path: Path):
    """Records, commits, steps and states of before, one after the other."""
    world = made(tmp_path)
    for partition in (0, 1):
        for at, record in enumerate(records := world.log.partitions(TOPICS.samples)[partition]):
            headers = {name: text for name, text in record.headers.items() if name != "sealed"}
            records[at] = msgspec.structs.replace(record, headers=headers)
    ledger = world.draw()
    assert ledger.drawn_from == "log" and "was written without a seal" in ledger.not_sealed and ledger.closes
    world = made(tmp_path / "2")
    world.lake._hash_ids = None
    advance(world)
    ledger = world.draw()
    assert "an older release stored without a seal" in ledger.not_sealed and ledger.closes
    world = made(tmp_path / "3")
    world.write_step("r1", (StepRange("live", 0, 0, (-1, -1), (-1, -1), rows=0),))
    ledger = world.draw()
    assert "step 3 has no seal" in ledger.not_sealed and ledger.closes
    world = made(tmp_path / "4")
    world.accounts[0].whole = False
    world.append(0, 1)
    world.snapshot()
    ledger = world.draw()
    assert "does not begin with the log" in ledger.not_sealed and ledger.closes


def test_a_join_that_has_stored_nothing_yet_is_read_by_id(tmp_path: Path):
    world = World(tmp_path)
    world.append(0, 30)
    ledger = world.draw()
    assert ledger.drawn_from == "log" and "the join has stored no state yet" in ledger.not_sealed and ledger.closes


# The independent check


def test_a_full_drawing_names_a_seal_that_is_wrong(tmp_path: Path):
    world = made(tmp_path)
    account = world.accounts[1]
    account.tasks = {task: msgspec.structs.replace(seal, sum=seal.sum ^ 1) for task, seal in account.tasks.items()}
    world.append(1, 1)
    world.snapshot()
    ledger = world.draw("full")
    assert [wrong.split(" up to")[0] for wrong in ledger.seals_wrong] == ["join, partition 1"]
    assert not ledger.closes and not is_sound(ledger) and "WRONG SEAL: join, partition 1" in table(ledger)
    world.store()
    ledger = world.draw()
    assert ledger.drawn_from == "log" and ledger.seals_wrong and "lacks samples after" in ledger.not_sealed


def test_a_full_drawing_holds_the_joins_totals_against_the_log(tmp_path: Path):
    world = made(tmp_path)
    state = world.states[0]
    state._rows.impressions += 1
    world.append(0, 1)
    world.snapshot()
    (wrong,) = world.draw("full").seals_wrong
    assert wrong.startswith("join, partition 0 up to offset") and wrong.endswith("its totals are not those of the log")


def test_a_full_drawing_holds_the_lakes_seal_against_its_rows(tmp_path: Path):
    world = made(tmp_path)
    hash_ids = world.lake._hash_ids
    world.lake._hash_ids = lambda rows: hash_ids(rows) + 1
    advance(world)
    wrong = world.draw("full").seals_wrong
    assert [each.split(" up to")[0] for each in wrong] == ["lake, partition 0", "lake, partition 1"]
    ledger = world.draw()
    assert len(ledger.reread) == 2 and len(ledger.seals_wrong) == 2 and (ledger.lost, ledger.twice) == (0, 0)
    assert not ledger.closes


# More than one at once, and a death


def test_two_drawings_at_once_leave_a_sound_account(tmp_path: Path, monkeypatch):
    """The second one begins and ends while the first one has drawn and not stored yet."""
    world = made(tmp_path)
    put, inner = world.blobs.put, list[Ledger]()

    def meet(name: str, data: bytes) -> None:
        if name == NAME and not inner:
            inner.append(Ledger())
            advance(world)
            inner[0] = world.draw()
        put(name, data)

    monkeypatch.setattr(world.blobs, "put", meet)
    assert world.draw().closes and inner[0].closes
    assert both(world).models["r1"].steps == 3


def test_a_drawing_is_from_seals_wherever_the_pipeline_moves_on_meanwhile(tmp_path: Path, monkeypatch):
    """Before each question that a drawing asks, the stages go on by a state, a commit and a step."""
    asks = [(MemoryReader, "end_offsets"), (MemoryReader, "begin_offsets"), (DeltaLake, "state"), (Blobs, "get")]
    moves: list[Callable[[], None]] = []

    def moved_before(ask: Callable) -> Callable:
        def question(*args: object) -> object:
            if moves:
                moves.pop()()
            return ask(*args)

        return question

    for owner, name in asks:
        monkeypatch.setattr(owner, name, moved_before(getattr(owner, name)))
    for question in range(100):
        world = made(tmp_path / str(question))
        moves[:] = [partial(advance, world), *[lambda: None] * question]
        ledger = world.draw()
        assert ledger.drawn_from == "seals" and ledger.closes, (question, ledger.not_sealed)
        if moves:
            break
    assert question > 10


def test_a_drawing_that_died_before_its_answer_changes_no_later_one(tmp_path: Path, monkeypatch):
    class Killed(BaseException):
        pass

    world = made(tmp_path)
    put = world.blobs.put

    def die(name: str, data: bytes) -> None:
        put(name, data)
        if name == NAME:
            raise Killed

    monkeypatch.setattr(world.blobs, "put", die)
    with pytest.raises(Killed):
        world.draw()
    monkeypatch.setattr(world.blobs, "put", put)
    assert NAME in world.blobs.items and both(world).closes
    advance(world)
    assert both(world).closes


def test_what_a_gateway_lost_is_a_loss_and_what_is_beyond_the_joins_state_is_none(tmp_path: Path):
    world = made(tmp_path)
    world.append(0, 40)
    world.learn(20)
    ledger = world.draw()
    assert ledger.closes and ledger.lost_where["log"] == 0
    said = world.accounts[0].said["g0"][1]
    said["appended"] += 500
    said["read"] += 500
    world.append(0, 1)
    world.snapshot()
    ledger = world.draw()
    assert ledger.lost_where["log"] > 400 and not ledger.closes


# Letters that were offered again


def set_aside(world: World, records: int) -> int:
    """Write a `too_late` letter for each event of the next records of partition 0; return how many.

    No gateway has receipts for these events: what follows in the partition is their records alone.
    """
    kinds = ("impression", "feedback")
    world.waiting[0] = [record for record in world.waiting[0] if record.headers["kind"] in kinds][:records]
    assert len(world.waiting[0]) == records
    ids = [each for record in world.waiting[0] for each in decode_batch(record.value)["event_id"].to_pylist()]
    for event_id in ids:
        letter = DeadLetter(reason=TOO_LATE, detail="", origin="", tag=PROJECT.impression.tag, event_id=event_id)
        world.log.append(TOPICS.dead_letters, 0, encode_dead_letter(letter), None, {})
    return len(ids)


def settle(world: World, begin: int, end: int) -> None:
    """Write the mark that the events of the letters from `begin` to below `end` were appended."""
    mark = RetryMark(step="retried", run="settler-1", at_ms=1, outcomes=dict.fromkeys(range(begin, end), "appended"))
    world.log.append(TOPICS.retries, 0, encode_retry_mark(mark), None, {})


@pytest.mark.parametrize("records", [0, 17, 40])
@pytest.mark.parametrize("is_silent", [False, True])
def test_a_letter_whose_event_lies_beyond_the_joins_state_is_no_loss(tmp_path: Path, records: int, is_silent: bool):
    """Letters are settled after, across, or before the join's newest state: it has the events of so many records.

    Silent gateways said nothing: then the marks are the only receipts.
    """
    world = made(tmp_path)
    if is_silent:
        for account in world.accounts:
            account.said.clear()
        world.snapshot()
    waiting = set_aside(world, 40)
    assert both(world).dead_lettered == waiting > 20
    if records:
        world.append(0, records)
        world.snapshot()
    world.append(0, 40 - records)
    settle(world, 0, waiting)
    ledger, full = world.draw(), world.draw("full")
    assert (ledger.closes, ledger.lost, ledger.drawn_from) == (True, 0, "seals") and full.closes
    assert (ledger.retried, ledger.dead_lettered) == (full.retried, full.dead_lettered) == (waiting, 0)
    assert ledger.read == ledger.appended <= full.appended and (ledger.appended == full.appended) == (records == 40)
    world.snapshot()
    assert both(world).closes


def test_a_mark_for_what_the_log_lacks_is_a_loss_in_spite_of_what_lies_beyond(tmp_path: Path):
    """All that lies beyond the join's state excuses as many receipts, and no more."""
    world = made(tmp_path)
    for account in world.accounts:
        account.said.clear()
    world.snapshot()
    have = both(world).appended
    waiting = set_aside(world, 20)
    letter = DeadLetter(reason=TOO_LATE, detail="", origin="", tag=PROJECT.impression.tag)
    for _ in range(have + 7):
        world.log.append(TOPICS.dead_letters, 0, encode_dead_letter(letter), None, {})
    world.append(0, 20)
    settle(world, 0, waiting + have + 7)
    ledger = world.draw()
    assert (ledger.lost_where["log"], ledger.closes) == (7, False)
    world.snapshot()
    assert world.draw().lost_where["log"] == 7


def mixed(world: World, *, gap: int = 0, change: Change = lambda rows: rows, ends: bool = False) -> None:
    """Let a run learn the lake and beside it, from behind the lake's positions on, what is live; the second step leaves
    so many rows of each partition out, the first one changes what it learns of one."""
    state = world.lake.state()
    stored = stored_order(world.lake.read(state.version), ("click",))
    at = dict(state.positions.by_partition)
    for number, start in enumerate(range(0, stored.num_rows, 6)):
        part = stored.slice(start, 6)
        if not ends and start + part.num_rows == stored.num_rows:
            return
        ranges = [ranged(part, kind="stored", version=state.version, start=start, stop=start + part.num_rows)]
        for partition in (0, 1):
            after = at[partition]
            rows, upto = world.between(partition, after, 9)
            if gap and number == 1:
                _, after = world.between(partition, after, gap)
                rows = world.between(partition, after, 9 - gap)[0]
            ours = rows.filter(pc.equal(rows["task"], "click")) if rows.num_rows else rows
            if number == partition == 0:
                ours = change(ours)
            if upto > after:
                ranges.append(ranged(ours, kind="live", partition=partition, after=tuple(after), upto=tuple(upto)))
            at[partition] = upto
        world.write_step("r1", tuple(ranges))
    world.taken["r1"] = at


@pytest.mark.parametrize("ends", [False, True])
def test_a_run_that_learns_live_samples_beside_the_lake_is_told_by_both(tmp_path: Path, ends: bool):
    world = World(tmp_path)
    for partition in (0, 1):
        world.append(partition, 150)
    world.snapshot()
    world.store(40)
    mixed(world, ends=ends)
    if ends:
        world.learn(30)
    ledger = both(world)
    assert ledger.closes and is_sound(ledger) and not ledger.reread
    counts = ledger.models["r1"]
    assert counts.stored > 0 and counts.live > 0 and counts.stored + counts.live == counts.learnt
    assert "rows taken of the lake" in table(ledger)
    if not ends:
        assert counts.in_flight > 0 and not ledger.models["r1"].lost


@pytest.mark.parametrize("fault", [{"gap": 6}, {"change": without(1)}, {"change": exchanged(1)}])
@pytest.mark.parametrize("ends", [False, True])
def test_a_fault_in_what_is_learnt_beside_the_lake_is_found(tmp_path: Path, fault: dict[str, Any], ends: bool):
    """Also while the lake is not learnt, when the run's positions claim nothing yet."""
    world = World(tmp_path)
    for partition in (0, 1):
        world.append(partition, 150)
    world.snapshot()
    world.store(40)
    mixed(world, **fault, ends=ends)
    if ends:
        world.learn(30)
    for mode in ("seals", "full"):
        ledger = world.draw(mode)
        assert ledger.lost > 0 and not is_sound(ledger) and ledger.drawn_from == "log"
