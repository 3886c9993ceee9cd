"""Says why a trainer would not start or go on for samples that are missing, and how a new run gets past that.

Looked at is what recovery looks at: the checkpoint, the recorded steps behind it, the version of the lake they are in,
and what the topic has of samples. Nothing is changed here. Two ways lead on, and both are a new run:

- **lake**: it begins afresh with what the lake holds now. Nothing is lost that the lake has.
- **checkpoint**: it goes on from the newest checkpoint, behind what is missing. That is left out by name, and the
  ledger counts it as `skipped`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from headrace.contract.formats.positions import Cursor, Position, Positions
from headrace.contract.formats.steps import PassedOver, Step
from headrace.contract.interfaces.lake import LakeReader, LakeState
from headrace.contract.interfaces.log import Reader
from headrace.trainer.commit.rollback import Place
from headrace.trainer.source.gaps import gaps, until

Way = Literal["lake", "checkpoint"]


class Diagnosis(msgspec.Struct, kw_only=True):
    """What was found."""

    wrong: list[str]
    """Why a trainer would refuse, in words; empty where none would."""
    missing: list[PassedOver]
    """What the topic does not have."""
    way: Way
    """What is lost least by."""


def diagnose(
    place: Place | None,
    redone: Sequence[Step],
    reader: Reader,
    topic: str,
    lake: LakeReader | None,
    *,
    moved: Callable[[int], None] = lambda _: None,
) -> Diagnosis:
    """Look at where a trainer would go on.

    Args:
        place: the newest checkpoint that can be read; None where there is none.
        redone: the recorded steps behind it, in order.

    Raises as `read_range` and the lake.
    """
    newest = lake.state() if lake is not None else None
    cursor = place.manifest.meta.cursor if place is not None else _first_cursor(redone)
    wrong, state = _wrong_steps(place, redone), newest
    version = max([cursor.lake_version, *(r.version for s in redone for r in s.ranges if r.kind == "stored")])
    if version >= 0:
        state = lake.state(version) if lake is not None else None
        if state is None:
            wrong.append(f"version {version} of the lake, which the run is learning, is gone")
            return Diagnosis(wrong=wrong, missing=[], way="lake")
        cursor = _live_cursor(state)
    missing = gaps(reader, topic, cursor, moved=moved)
    wrong += [
        f"{topic}/{each.partition} lacks the samples after {tuple(each.after)} up to {tuple(each.upto)}"
        for each in missing
    ]
    wrong += _short(redone, reader, topic, cursor)
    in_lake = newest.positions if newest is not None else Positions(0)
    is_there = newest is not None and all(in_lake.covers(e.partition, Position(*e.upto)) for e in missing)
    is_usable = place is not None and version < 0
    way: Way = "checkpoint" if is_usable and not (missing and is_there) else "lake"
    return Diagnosis(wrong=wrong, missing=missing, way=way)


def _first_cursor(steps: Sequence[Step]) -> Cursor:
    """Return where a run without a checkpoint began: where its first steps say, and at the topic's first record."""
    positions: dict[str, list[int]] = {}
    for each in (r for step in steps for r in step.ranges if r.kind == "live"):
        positions.setdefault(str(each.partition), list(each.after))
    return Cursor(positions=positions)


def _live_cursor(state: LakeState) -> Cursor:
    """Return where the topic goes on behind a version of the lake."""
    offsets = {str(p): offset for p, offset in state.next_offsets.items()}
    return Cursor(positions=state.positions.to_json(), next_offsets=offsets)


def _wrong_steps(place: Place | None, redone: Sequence[Step]) -> list[str]:
    """Say where recorded steps do not follow one another."""
    at, wrong = place.stored.step if place is not None else 0, list[str]()
    for step in redone:
        if step.branch is None and step.step != at + 1:
            wrong.append(f"step {step.step} of run {step.run} is recorded behind step {at}, and none between")
        at = step.step
    return wrong


def _short(redone: Sequence[Step], reader: Reader, topic: str, cursor: Cursor) -> list[str]:
    """Say which partitions end before samples that recorded steps took."""
    wanted: dict[int, Position] = {}
    for each in (r for step in redone for r in step.ranges if r.kind == "live"):
        wanted[each.partition] = max(Position(*each.upto), wanted.get(each.partition, Position(*each.upto)))
    there = {each.partition: Position(*each.upto) for each in until(reader, topic, cursor, None)}
    return [
        f"{topic}/{p} ends at {tuple(there.get(p, cursor.positions.get(str(p), (-1, -1))))}, and a recorded step took "
        f"samples up to {tuple(upto)}: restart `stream` first, which sends again what it has"
        for p, upto in sorted(wanted.items())
        if there.get(p, Position(*cursor.positions.get(str(p), (-1, -1)))) < upto
    ]
