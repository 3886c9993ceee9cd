"""Begins a run that somebody asks for: from a checkpoint of another run, or afresh.

1. A checkpoint is chosen that can be read, and whose next samples the topic still has.
2. The new run's first record is written into `steps`, by the fenced writer, and read back. From here on it is so: a
   trainer that works is fenced off, ends, and its supervisor starts it anew as the new run.
3. The decision is written into `model`: serving takes nothing more of the run that was left.
4. The trainer loads the checkpoint, says 3 where it is missing, writes a checkpoint and a snapshot of its own, and
   learns on.

A crash before 2 changes nothing. After it, nothing is missing that the trainer would not do by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from headrace.contract.errors import ConfigRejected, InvariantBroken, Unavailable
from headrace.contract.formats.steps import Branch, PassedOver, Step, decode_step, encode_step
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.fenced import FencedWriter
from headrace.contract.interfaces.log import Producer, Reader
from headrace.trainer.commit.checkpoint import (
    CheckpointManifest,
    Damaged,
    Stored,
    on_path,
    parts_of,
    place_of,
    read_manifest,
    stored_checkpoints,
)
from headrace.trainer.commit.decisions import decision_of, ensure_decision, who_decides
from headrace.trainer.commit.lineage import NO_END, Leg, path_of

TRIES = 20
"""Trainers that start meanwhile become the writer, too: each costs one."""
_PAUSE_S = 0.25


@dataclass(frozen=True)
class Place:
    """A checkpoint that a run can go back to."""

    stored: Stored
    manifest: CheckpointManifest

    @property
    def version(self) -> str:
        """`<run>-<step>`, as serving names it."""
        return f"{self.stored.run}-{self.stored.step}"


@dataclass(frozen=True)
class Standing:
    """Where a model's training stands."""

    run: str
    """The run that goes on."""
    path: tuple[Leg, ...]
    """The runs that it consists of."""
    places: tuple[Place, ...]
    """All checkpoints of the recipe that are whole, the furthest last."""

    def on_path(self, run: str = "") -> list[Place]:
        """Return the places that the run has been at, the newest first; with `run`, those of that run."""
        legs = [Leg(run, NO_END)] if run else self.path
        of = {place.stored: place for place in self.places}
        return [of[each] for each in on_path(list(of), legs)]


def standing(blobs: Blobs, model: str, recipe: str, steps: Iterable[Step]) -> Standing:
    """Return where training stands.

    Args:
        steps: those of the model and recipe, at least from the furthest checkpoint's offset on.

    Raises `Unavailable`.
    """
    names = {name.rpartition("/")[2] for name in blobs.list(parts_of(model))}
    places: list[Place] = []
    for each in sorted(stored_checkpoints(blobs, model), key=place_of):
        if each.recipe != recipe or not each.digest or each.step == 0:
            continue
        try:
            manifest = read_manifest(blobs, model, each)
        except Damaged:
            continue
        if {part.name for part in manifest.parts()} <= names:
            places.append(Place(each, manifest))
    branches: dict[str, Branch | None] = {place.stored.run: place.manifest.meta.branch for place in places}
    run = places[-1].stored.run if places else ""
    for step in steps:
        run = step.run
        if step.branch is not None:
            branches[run] = step.branch
    return Standing(run, path_of(branches, run), tuple(places))


def chosen(found: Standing, *, at_ms: int | None, version: str = "", run: str = "") -> Place:
    """Return the newest place whose model knew nothing later than a time, or that of a version.

    Raises `ConfigRejected` where there is none.
    """
    if version:
        place = next((place for place in found.places if place.version == version), None)
        if place is None:
            raise ConfigRejected(
                f"there is no checkpoint {version} of this recipe; `headrace rollback --list` shows those that are."
            )
        return place
    places = found.on_path(run)
    if not places:
        of = f"of run {run} " if run else ""
        raise ConfigRejected(
            f"there is no checkpoint {of}to go back to. `headrace rollback --list` shows all; a trainer writes one "
            "every train.checkpoint_ms. `headrace train repair --begin lake` begins a new run at the lake."
        )
    if at_ms is None:
        return places[0]
    for place in places:
        if 0 < place.manifest.meta.event_ms <= at_ms:
            return place
    raise ConfigRejected(
        "every checkpoint that is kept knows events later than that. `headrace rollback --list` shows them with their "
        "times: the newest three of a run, and the first one of each hour for a day."
    )


def first_record(
    place: Place | None,
    *,
    model: str,
    run: str,
    recipe: str,
    seed: int,
    samples_id: str,
    instead_of: str,
    left_out: Sequence[PassedOver] = (),
    reason: str = "",
    created_ms: int,
) -> Step:
    """Return the first record of a new run `run` that goes on from a place; afresh where there is none."""
    positions = dict(place.manifest.positions) if place is not None else {}
    for each in sorted(left_out, key=lambda each: each.after):
        if positions.get(str(each.partition), [-1, -1]) == list(each.after):
            positions[str(each.partition)] = list(each.upto)
    step = place.stored.step if place is not None else 0
    return Step(
        model=model,
        run=run,
        step=step,
        ranges=(),
        positions=positions,
        recipe=recipe,
        seed=seed,
        samples_id=samples_id,
        branch=Branch(
            run=place.stored.run if place is not None else "",
            step=step,
            instead_of=instead_of,
            passed_over=tuple(left_out),
            reason=reason,
            by=who_decides(),
            created_ms=created_ms,
        ),
    )


def begin_run(
    first: Step,
    *,
    writer: FencedWriter,
    reader: Reader,
    producer: Producer,
    topics: Topics,
    pause: Callable[[float], None],
) -> None:
    """Begin the run of this first record, and tell serving. Raises `Unavailable`: where the record lies in `steps`, the
    run has begun all the same, and the trainer tells serving."""
    record(writer, first, reader.end_offsets(topics.steps)[0], pause)
    decision = decision_of(first)
    if decision is not None:
        ensure_decision(reader, producer, topics.model, decision)


def record(writer: FencedWriter, first: Step, begin: int, pause: Callable[[float], None]) -> None:
    """Write a run's first record and read it back; once, whatever fails on the way.

    Args:
        begin: an offset of `steps` at or after which the record will lie, and none of it is there now.

    Raises `Unavailable` where it could not be written: nothing has changed, or the next call finds it.
    """
    value, told = encode_step(first), ""
    for _ in range(TRIES):
        try:
            writer.open()
            if _lies_there(writer, first, begin):
                return
            writer.append(value)
            if _lies_there(writer, first, begin):
                return
        except (Unavailable, InvariantBroken) as error:
            # A trainer that starts becomes the writer too: this one comes after it.
            told = str(error)
        pause(_PAUSE_S)
    raise Unavailable(f"the steps did not take the first record of run {first.run}: {told} Try again.")


def _lies_there(writer: FencedWriter, first: Step, begin: int) -> bool:
    for _, value in writer.read(begin, kept_only=True):
        try:
            if decode_step(value) == first:
                return True
        except msgspec.DecodeError:
            continue
    return False
