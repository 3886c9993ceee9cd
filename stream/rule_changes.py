"""Changes of rules, written: first into the `rules` topic, then into every partition of `events`.

1. Open the fenced writer of `rules`: the appends of any other fail from then on. Read the topic to its end.
2. If the newest change is not known to lie in every partition, write it there again and say so: this is what a crash
   in step 4 left behind, and a partition that has it already ignores it.
3. If it is what is wanted, there is nothing to do.
4. Append the change; write it into every partition; when all have given their receipts, append that it is there.

Change 1 is in force from the beginning of every partition and lies in `rules` alone; whichever stage comes first
writes it. A partition never sees change n + 1 before change n.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace.contract.checks.names import clashing
from headrace.contract.errors import ConfigRejected, EventRejected, InvariantBroken, Unavailable
from headrace.contract.formats.events import SPEC
from headrace.contract.interfaces.fenced import FencedWriter
from headrace.contract.interfaces.log import Producer, Record
from headrace.contract.project import Project
from headrace.contract.rules import (
    Change,
    Rules,
    Written,
    change_of,
    check_code,
    check_growth,
    decode_entry,
    differences,
    encode_change,
    lanes_of,
    rules_of,
)
from headrace.stream.stored_rules import REMEDY, StoredRules, check_fits

log = logging.getLogger("headrace.rules")

WRITER_ID = "headrace-rules"
"""Transactional id of the fenced writer, but for the generation."""
FLUSH_S = 30.0
TURNS_MAX = 20
"""Starts of several stages at once: each fences the one before, which then finds change 1."""


@dataclass
class History:
    """All changes so far, by number, and where each was written."""

    changes: list[Change] = field(default_factory=list)
    written: dict[int, dict[str, int]] = field(default_factory=dict)

    @property
    def newest(self) -> Change | None:
        """The change that is in force once every partition has been read up to it."""
        return self.changes[-1] if self.changes else None

    @property
    def is_whole(self) -> bool:
        """False when the newest change may be missing in some partition."""
        return len(self.changes) < 2 or self.changes[-1].number in self.written


def history_of(values: list[bytes]) -> History:
    """Return the history that the records of `rules` tell. What is none of ours is named in the log and left out.

    Raises `InvariantBroken` where one of ours can't be read, or a change is missing before another.
    """
    history = History()
    for number, value in enumerate(values):
        try:
            entry = decode_entry(value, where=f"record {number} of rules")
        except EventRejected as error:
            log.error("%s, and is left out. Find out who writes into the topic besides `headrace`.", error)
            continue
        if isinstance(entry, Written):
            history.written[entry.number] = entry.offsets
            continue
        if entry.number != len(history.changes) + 1:
            raise InvariantBroken(
                f"record {number} of rules is change {entry.number}, and change {len(history.changes) + 1} is not "
                "before it: it was damaged or lost. Keep the topic; `headrace spec history` shows what is left."
            )
        history.changes.append(entry)
    return history


def read_history(writer: FencedWriter) -> History:
    """Read the `rules` topic. Raises `Unavailable`, and `ConfigRejected` where its first records are gone."""
    try:
        records = writer.read(0)
    except InvariantBroken as error:
        raise ConfigRejected(f"the rules topic has lost its first records ({error}): {REMEDY}") from error
    return history_of([value for _, value in records])


def first_rules(
    project: Project, records: list[Record], stored: Sequence[StoredRules] = (), *, begin: int = 0
) -> Project:
    """Return `project` with the rules in force from the log's beginning, as the records of `rules` say.

    A log without any is read by the project's own: no stage has begun to read it. `begin` is the first offset that the
    topic still has. Raises `ConfigRejected` where its first records are gone, and as `check_fits` where `stored` says
    otherwise.
    """
    if begin > 0:
        raise ConfigRejected(f"the rules topic begins at offset {begin}, and its first records are gone: {REMEDY}")
    history = history_of([record.value for record in records if record.value is not None])
    check_fits(history.changes, stored)
    return history.changes[0].rules.over(project) if history.changes else project


def ensure_first(
    writer: FencedWriter,
    project: Project,
    *,
    now_ms: int,
    pause: Callable[[float], None],
    stored: Callable[[], Sequence[StoredRules]] = tuple,
) -> History:
    """Return the history, whose change 1 is the project's own rules when there was none. Waits while Kafka is away.

    `stored` says what the stored states were made by. Raises `ConfigRejected` as `check_fits`.
    """
    made = stored()
    for turn in range(TURNS_MAX):
        try:
            history = read_history(writer)
            check_fits(history.changes, made)
            if history.changes:
                return history
            writer.open()
            if not read_history(writer).changes:
                writer.append(encode_change(change_of(project, 1, now_ms=now_ms)))
        except (Unavailable, InvariantBroken) as error:
            # Another stage that starts at this moment has opened the writer: its change 1 is the one to read.
            log.info("the first rules are not written yet: %s", error)
            if turn == TURNS_MAX - 1:
                raise
            pause(0.2 * (turn + 1))
    raise Unavailable(f"the rules topic does not give back change 1 after {TURNS_MAX} turns.")


def begin_rules(
    writer: FencedWriter,
    project: Project,
    *,
    now_ms: int,
    pause: Callable[[float], None],
    stored: Callable[[], Sequence[StoredRules]] = tuple,
) -> Project:
    """Return `project` with the rules that the log begins with; they are written where there are none.

    Raises `ConfigRejected` when `project` has another partition key, or a function of the user's in other code than
    when the newest change was applied, and as `check_fits`. Waits while Kafka is away.
    """
    history = ensure_first(writer, project, now_ms=now_ms, pause=pause, stored=stored)
    first = history.changes[0].rules
    if first.key != project.impression.key:
        raise ConfigRejected(
            f"the project's partition key is {project.impression.key!r} and the log's is {first.key!r}: raise "
            "log.generation to begin anew."
        )
    check_code(history.changes[-1])
    return first.over(project)


def unapplied(writer: FencedWriter, project: Project, stored: Callable[[], Sequence[StoredRules]] = tuple) -> list[str]:
    """Return what the project on disk would change of the rules in force, a line each.

    Raises `ConfigRejected` as `check_fits`: rules that were lost are not rules that nobody has written yet.
    """
    made = stored()
    history = read_history(writer)
    check_fits(history.changes, made)
    newest = history.newest
    return [] if newest is None else differences(newest.rules, rules_of(project))


@dataclass
class Applied:
    """What `apply` did."""

    history: History
    is_repaired: bool = False
    """An earlier change was missing in some partition, and was written there."""
    is_new: bool = False
    """False: the wanted rules were in force already."""


def apply(
    writer: FencedWriter,
    producer: Producer,
    topic: str,
    partitions: int,
    project: Project,
    *,
    now_ms: int,
    dry: bool = False,
    stored: Callable[[], Sequence[StoredRules]] = tuple,
) -> Applied:
    """Put the project's rules in force in every partition of `topic`; see the module for the protocol.

    Args:
        dry: say what would be done, and do none of it.
        stored: says by which rules the join's stored states were made.

    Raises:
        ConfigRejected: when these rules may not follow those in force, or those were lost; nothing was written.
        Unavailable: when Kafka does not answer: apply again, which repairs what was begun.
    """
    made = stored()
    if not dry:
        writer.open()
    history = read_history(writer)
    check_fits(history.changes, made)
    is_repaired = not history.is_whole
    if is_repaired and not dry:
        _write(writer, producer, topic, partitions, history, history.changes[-1])
    newest = history.newest
    change = change_of(project, newest.number + 1 if newest else 1, now_ms=now_ms)
    if newest is not None and newest.rules == change.rules:
        return Applied(history, is_repaired)
    check_follows(history, project)
    if not dry:
        writer.append(encode_change(change))
        history.changes.append(change)
        if newest is not None:
            _write(writer, producer, topic, partitions, history, change)
    return Applied(history, is_repaired, is_new=True)


def check_follows(history: History, project: Project) -> None:
    """Raise `ConfigRejected` when the project's rules may not follow all that were in force."""
    wanted = rules_of(project)
    lanes: list[tuple[str, str]] = []
    for change in history.changes:
        lanes += [lane for lane in lanes_of(change.rules.tasks) if lane not in lanes]
    for change in history.changes:
        check_growth(change.rules, wanted, lanes)
        _check_case(change.rules, wanted)


def _check_case(before: Rules, after: Rules) -> None:
    """Refuse a column of samples whose name differs only by case from one that the lake has already."""
    clash = clashing(
        [*before.fields, *before.features.counter_columns()], [*after.fields, *after.features.counter_columns()]
    )
    if clash is not None:
        raise ConfigRejected(
            f"{clash[1]!r} differs only by case from {clash[0]!r}, which the rules had before: the lake takes both for "
            f"one column and would refuse every commit. Keep {clash[0]!r}, or choose another name."
        )


def _write(
    writer: FencedWriter, producer: Producer, topic: str, partitions: int, history: History, change: Change
) -> None:
    offsets: dict[str, int] = {}
    failures: list[Exception] = []

    def delivered(partition: int) -> Callable[[Exception | None, int], None]:
        def note(error: Exception | None, offset: int) -> None:
            if error is not None:
                failures.append(error)
            offsets[str(partition)] = offset

        return note

    for partition in range(partitions):
        producer.send(topic, partition, encode_change(change), headers={"kind": SPEC}, delivered=delivered(partition))
    left = producer.flush(FLUSH_S)
    if left or failures or len(offsets) < partitions:
        raise Unavailable(
            f"change {change.number} has receipts of {len(offsets) - len(failures)} of {partitions} partitions after "
            f"{FLUSH_S:g} s {failures[:1] or ''}; apply it again: partitions that have it ignore a second one."
        )
    writer.append(encode_change(Written(number=change.number, offsets=offsets)))
    history.written[change.number] = offsets
