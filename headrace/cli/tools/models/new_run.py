"""What the verbs that begin a new run share: where training stands, and how the new run begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.cli.runtime import Runtime
from headrace.contract.formats.steps import PassedOver, Step
from headrace.contract.interfaces.log import Reader, check_topic
from headrace.trainer.commit.checkpoint import furthest_meta, runs_of
from headrace.trainer.commit.lineage import behind, lineage
from headrace.trainer.commit.publish import read_manifests
from headrace.trainer.commit.rollback import Place, Standing, begin_run, first_record, standing
from headrace.trainer.commit.steps_archive import StepsArchive, read_all_steps
from headrace.trainer.identity import new_run_id, recipe_digest


@dataclass
class Training:
    """One model's training, as a verb looks at it."""

    runtime: Runtime
    reader: Reader
    recipe: str
    samples_id: str
    steps_id: str
    steps: list[Step]
    """Of this model and recipe, from the furthest checkpoint on."""
    standing: Standing

    def behind(self, place: Place) -> list[Step]:
        """Return the steps of the run that goes on which lie behind a place."""
        steps = self._read(place.manifest.meta.steps_offset)
        return [s for s in steps if s.run == self.standing.run and s.step > place.stored.step and s.branch is None]

    def redone(self, place: Place | None) -> list[Step]:
        """Return the recorded steps that a trainer would learn again behind a place, in order."""
        steps = self._read(place.manifest.meta.steps_offset if place is not None else 0)
        found = lineage(steps, self.standing.run)
        if place is None:
            return found
        return behind(found, self.standing.path, place.stored.run, place.stored.step)

    def begin(self, place: Place | None, *, left_out: Sequence[PassedOver] = (), reason: str = "") -> Step:
        """Begin a new run, and tell serving; return its first record. Raises `Unavailable`."""
        runtime, topics = self.runtime, self.runtime.topics
        model, created_ms = runtime.project.model, runtime.clock.now_ms()
        first = first_record(
            place,
            model=model,
            run=self._free(created_ms),
            recipe=self.recipe,
            seed=runtime.project.recipe.seed,
            samples_id=self.samples_id,
            instead_of=self.standing.run,
            left_out=left_out,
            reason=reason,
            created_ms=created_ms,
        )
        writer = runtime.fenced(topics.steps, writer_id(runtime))
        begin_run(
            first,
            writer=writer,
            reader=self.reader,
            producer=runtime.producer(),
            topics=topics,
            pause=runtime.clock.sleep,
        )
        writer.close()
        return first

    def _free(self, at_ms: int) -> str:
        model = self.runtime.project.model
        taken = {*runs_of(self.runtime.blobs(), model), *(step.run for step in self.steps)}
        taken |= {manifest.run for manifest in read_manifests(self.reader, self.runtime.topics, model)}
        return new_run_id(self.runtime.project, at_ms, taken)

    def _read(self, begin: int) -> list[Step]:
        return _steps(self.runtime, self.reader, self.steps_id, self.recipe, begin)


def writer_id(runtime: Runtime) -> str:
    """Return the name under which the steps of this model are written: of those with one name, the newest writes."""
    return f"headrace-{runtime.topics.steps}-{runtime.project.model}"


def open_training(of_project: Runtime, variant: str | None) -> Training:
    """Return where a model's training stands, that of a declared variant or that of the project's own recipe.

    Raises `Unavailable`, `InvariantBroken` as `check_topic`, `ConfigRejected` as `Runtime.of_variant`.
    """
    of_project.require_kafka()
    runtime = of_project.of_variant(variant)
    admin, reader, topics = runtime.admin(), runtime.reader(), runtime.topics
    samples_id, steps_id = admin.topic_id(topics.samples), admin.topic_id(topics.steps)
    recipe, blobs, model = recipe_digest(runtime.project), runtime.blobs(), runtime.project.model
    meta = furthest_meta(blobs, model, recipe=recipe)
    if meta is not None:
        check_topic(meta.steps_id, steps_id, topics.steps)
        check_topic(meta.samples_id, samples_id, topics.samples)
    steps = _steps(runtime, reader, steps_id, recipe, meta.steps_offset if meta is not None else 0)
    found = standing(blobs, model, recipe, steps)
    return Training(runtime, reader, recipe, samples_id, steps_id, steps, found)


def _steps(runtime: Runtime, reader: Reader, steps_id: str, recipe: str, begin: int) -> list[Step]:
    topics, model = runtime.topics, runtime.project.model
    archive = StepsArchive(runtime.blobs(), topics.steps, steps_id)
    every = read_all_steps(reader, topics.steps, archive, begin=begin or None)
    return [step for _, step in every if step.model == model and step.recipe == recipe]
