"""Decisions about a project's models, in the topic `model`: which one is served, which one the project's own recipe
makes, and that a run goes on in place of another one.

A project has one model under its own name, and one for each variant that was ever trained, `<project>.<variant>`.
`headrace model promote` writes which of them is served from then on; without a decision it is the project's own.

Whoever promoted a variant then moves it to `recipe=`, and the recipe goes on with the run that it has:

1. Models that the project's own recipe may make are those that were decided for, the last decision first, but for
   variants that are declared now; an earlier decision than one for the project's own model tells nothing.
2. It is the first of them that knows the recipe: that has a checkpoint or a snapshot of it.
3. Where none knows it, it is a new recipe. It begins a run in the first of them, which is the served one unless a
   declared variant is.

A variant must not have the name of one that was promoted and moved: that model is the project's own.

That a run goes on in place of another one follows from a branch, whose record in `steps` is the truth. The decision
says the same in `model`, so that a server, whenever it starts, serves nothing of the run that was left. Whoever finds
it missing writes it: the verb at once, else the new run's trainer before it announces anything. Its key is made of the
branch, so that twice is once.
"""

from __future__ import annotations

import getpass
import logging
import socket
from collections.abc import Callable, Sequence

import msgspec

from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.contract.formats.decision import KIND, Decision, decode_decision, encode_decision, key_of
from headrace.contract.formats.snapshot import Manifest
from headrace.contract.formats.steps import Step
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.log import Producer, Reader, read_range
from headrace.contract.project import Project
from headrace.trainer.commit.checkpoint import known, stored_checkpoints
from headrace.trainer.commit.publish import read_manifests
from headrace.trainer.identity import recipe_digest

logger = logging.getLogger("headrace.train")

Knows = Callable[[Project], bool]
"""Says whether the model of a project, or of a variant as `Project.of_variant` gives it, has learnt by its recipe."""


def read_decisions(reader: Reader, topics: Topics, project: str) -> list[Decision]:
    """Return the decisions about a project's models, in the order of the log. Raises as `read_range`.

    What is no decision is named in the log and left out.
    """
    found: list[Decision] = []
    for record in read_range(reader, topics.model):
        if record.value is None or record.headers.get("kind") != KIND:
            continue
        try:
            decision = decode_decision(record.value)
        except msgspec.DecodeError as error:
            logger.error("record %d of %s is no decision and is left out: %s", record.offset, record.topic, error)
            continue
        if decision.model == project:
            found.append(decision)
    return found


def promoted(decisions: Sequence[Decision]) -> str:
    """Return the variant that is served by the last promotion; "" is the model under the project's own name."""
    return next((each.variant for each in reversed(decisions) if each.what == "promote"), "")


def is_left(decisions: Sequence[Decision], run: str, step: int) -> bool:
    """Say whether somebody has gone back from a run to before this step of it: it is not served any more."""
    return any(each.what == "rollback" and each.refused_run == run and step > each.refused_after for each in decisions)


def home_of(project: Project, decisions: Sequence[Decision], knows: Knows) -> Project:
    """Return the project as its own recipe is learnt: with the model's name that the recipe has now; see the module.

    Raises `ConfigRejected` where a declared variant has the name of that very model.
    """
    variants = [each.variant for each in decisions if each.what == "promote"]
    for name in dict.fromkeys(variants):
        if name in project.variants and knows(_named(project, name)):
            raise ConfigRejected(
                f"variant {name!r} was promoted, and its model {_named(project, name).model!r} has the project's own "
                f"recipe now: give the new variant another name than {name!r}."
            )
    candidates: list[str] = []
    for name in reversed(variants):
        candidates += [] if name in project.variants else [name]
        if not name:
            break
    views = [_named(project, name) for name in dict.fromkeys([*candidates, ""])]
    home = next((view for view in views if knows(view)), views[0]) if len(views) > 1 else views[0]
    if variants and variants[-1] not in project.variants and home.variant != variants[-1]:
        logger.warning(
            "model %s is served, and nobody trains it: its recipe is not this project's, and it is not among its "
            "variants. `headrace model promote --main` lets %s be served",
            *(_named(project, variants[-1]).model, home.model),
        )
    return home


def knows_by(blobs: Blobs, reader: Reader, topics: Topics) -> Knows:
    """Return what looks in the store and in the topic `model`. It raises `Unavailable`, and as `read_range`."""

    def knows(view: Project) -> bool:
        digest = recipe_digest(view)
        if any(each.recipe == digest for each in known(blobs, view.model, stored_checkpoints(blobs, view.model))):
            return True
        return any(is_of(manifest, view) for manifest in read_manifests(reader, topics, view.model))

    return knows


def is_of(manifest: Manifest, view: Project) -> bool:
    """Say whether a snapshot was trained by this recipe and this spec."""
    recipe = msgspec.json.encode(view.recipe).decode()
    return manifest.recipe_json == recipe and manifest.spec == view.features.digest()


def _named(project: Project, variant: str) -> Project:
    return msgspec.structs.replace(project, variant=variant)


def decision_of(first: Step) -> Decision | None:
    """Return what serving is told of a run that begins with this record; None where it begins afresh: then the run of
    before is served until the lake is learnt."""
    branch = first.branch
    if branch is None or not branch.run or not branch.instead_of:
        return None
    project, _, variant = first.model.partition(".")
    return Decision(
        model=project,
        what="rollback",
        variant=variant,
        run=first.run,
        refused_run=branch.instead_of,
        refused_after=branch.step if branch.instead_of == branch.run else 0,
        reason=branch.reason,
        by=branch.by,
        created_ms=branch.created_ms,
    )


def ensure_decision(reader: Reader, producer: Producer, topic: str, decision: Decision) -> bool:
    """Write the decision unless it is there; return whether it was missing. Raises `Unavailable`: call again."""
    key = key_of(decision).encode()
    if any(record.key == key and record.value is not None for record in read_range(reader, topic)):
        return False
    write_decision(producer, topic, decision)
    return True


def write_decision(producer: Producer, topic: str, decision: Decision) -> None:
    """Write a decision, and return when the log has it. Raises `Unavailable` where that is not known."""
    receipts: list[Exception | None] = []
    producer.send(
        topic,
        0,
        encode_decision(decision),
        key=key_of(decision).encode(),
        headers={"kind": KIND},
        delivered=lambda error, _: receipts.append(error),
    )
    producer.flush(10.0)
    if not receipts or receipts[0] is not None:
        raise Unavailable(f"the decision got no receipt ({receipts}): `headrace model list` tells whether it counts.")


def who_decides() -> str:
    """Return who gives this command: user and host."""
    return f"{getpass.getuser()}@{socket.gethostname()}"
