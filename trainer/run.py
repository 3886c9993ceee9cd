"""The training process: recover, then propose, commit, learn, publish, over and over.

Protocol of one step:

1. read ahead until a batch is full or its first row has waited `wait_ms`;
2. propose position ranges; write them as step n and read step n back (`trainer.commit.steps`);
3. take the rows of the ranges; score them, learn them;
4. publish and checkpoint, by time, each in a thread of its own.

Whatever fails between 2 and the end of 3 ends the process, also what would be retried elsewhere: the step is recorded,
and the next process redoes it. No step follows one that was not learnt.

A call that never returns ends the process too (`trainer.bounds`).

Recovery: the newest checkpoint of this recipe; redo exactly the steps recorded after it; go on with 1. A run that has
steps but no checkpoint yet is redone from step 1. The steps of another recipe are another run's, and are left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.positions import Cursor, Positions
from headrace.contract.formats.snapshot import Manifest
from headrace.contract.formats.steps import Step, StepRange
from headrace.contract.interfaces.log import check_topic
from headrace.process.moved import moved
from headrace.trainer.bounds import WORK_MAX_S, poll_until, watched
from headrace.trainer.commit.checkpoint import Checkpoint, CheckpointManifest, Meta, newest_checkpoint, runs_of
from headrace.trainer.commit.checkpointer import Checkpointer, Moment, made_here
from headrace.trainer.commit.claim import read_claim, release_claim, take_claim
from headrace.trainer.commit.publish import Publisher, named_blobs, read_manifests
from headrace.trainer.commit.steps import StepsLog
from headrace.trainer.commit.steps_archive import StepsArchive, StepsMover
from headrace.trainer.dependencies import Dependencies
from headrace.trainer.identity import new_evaluation, recipe_digest, tasks_of
from headrace.trainer.model.learner import learner_for
from headrace.trainer.source.source import Source
from headrace.trainer.upload_watch import UploadWatch
from headrace.trainer.validation.evaluate import known_times
from headrace.trainer.validation.report import Report, figures_of

logger = logging.getLogger("headrace.train")

T = TypeVar("T")

_RETRY_SNAPSHOT_S = 2.0
SHOWN_EVERY = 8
"""Of so many readings of the lake one brings the values that the projector shows: it counts a few rows of each step."""


class Stopped(Exception):
    """The process was asked to stop while it waited."""


class Trainer:
    """One worker's loop. `recover` once, then `turn` again and again."""

    def __init__(self, deps: Dependencies) -> None:
        self.deps = deps = watched(deps)
        self.project = deps.project
        self.source = Source(
            self.project,
            deps.reader,
            deps.topics.samples,
            generation=deps.topics.generation,
            metrics=deps.metrics,
            lake=deps.lake,
            lake_bytes=deps.config.lake_bytes,
            background=deps.background,
            fields=deps.config.slices,
            shown_every=SHOWN_EVERY if deps.board is not None and deps.config.projector_ms else 0,
        )
        self._archive = StepsArchive(deps.blobs, deps.topics.steps, deps.steps_id)
        self.steps = StepsLog(
            deps.steps_writer, self.project.model, deps.metrics, pause=self._pause, archive=self._archive
        )
        self.recipe = recipe_digest(self.project)
        self.learner = learner_for(self.project, deps.config)
        self.evaluation = new_evaluation(self.project, deps.config)
        self.run_id = ""
        self.publisher: Publisher | None = None
        self.checkpointer: Checkpointer | None = None
        self.tasks = tasks_of(self.project)
        self.report = Report(self.project, deps.config, deps.metrics, deps.board, deps.clock)
        self.uploads = {what: UploadWatch(what, deps.metrics, deps.clock) for what in ("snapshot", "checkpoint")}
        self._waiting_since = -1.0
        self._unlearnt = 0
        """The step that is being committed or learnt; 0 between steps."""
        self._stored_rows = 0
        """How many stored samples there were when this process began to learn them; 0 while it learns none."""
        self._published_at = self._snapshot_at = self._checkpoint_at = float("-inf")

    def recover(self) -> None:
        """Bring the learner to the last recorded step, and publish it unless it still learns the lake while another
        run's model is served. Waits while Kafka or the store is away. Raises as `take_claim`, and `InvariantBroken`
        where the run is of a topic that was made anew."""
        deps, model = self.deps, self.project.model
        self._retrying("claim the model", lambda: take_claim(deps.blobs, model, deps.name, by_force=deps.take_over))
        manifests = self._retrying(
            "read which run is served",
            lambda: read_manifests(self.deps.reader, self.deps.topics, self.project.model, self.deps.metrics),
        )
        checkpoint = self._retrying(
            "read checkpoints",
            lambda: newest_checkpoint(self.deps.blobs, self.project.model, recipe=self.recipe),
        )
        if checkpoint is not None:
            check_topic(checkpoint.meta.steps_id, deps.steps_id, deps.topics.steps)
            check_topic(checkpoint.meta.samples_id, deps.samples_id, deps.topics.samples)
        every = self.steps.recover(checkpoint.meta.steps_offset if checkpoint else 0)
        steps = [(at, s) for at, s in every if s.recipe == self.recipe]
        if steps:
            check_topic(steps[-1][1].samples_id, deps.samples_id, deps.topics.samples)
        newest = steps[-1][1].run if steps else (checkpoint.meta.run if checkpoint else "")
        learnt = checkpoint.meta.step if checkpoint is not None and newest == checkpoint.meta.run else 0
        redone = [s for _, s in steps if s.run == newest and s.step > learnt]
        self.source.expect(redone)
        # A checkpoint of step 0 says nothing that a fresh beginning would not find better now.
        if checkpoint is not None and learnt:
            self._resume(checkpoint)
        else:
            self.run_id = newest or self._new_run({s.run for _, s in every} | {m.run for m in manifests})
            self._retrying("find where to begin", lambda: self._begin(redone[0] if redone else None))
            checkpoint = None
        # Before anything is learnt: it hears of what changes from here on.
        self.checkpointer = self._new_checkpointer(checkpoint.manifest if checkpoint is not None else None)
        del checkpoint
        self._redo(redone)
        self.publisher = self._new_publisher(manifests)
        if self.publisher.is_held:
            logger.info("run %s is published when the lake is learnt", self.run_id)
        self._snapshot()
        self._checkpoint()
        logger.info("run %s stands at step %d, positions %s", self.run_id, self.learner.step, self.positions.to_json())

    @property
    def learnt(self) -> int:
        """How many samples this process learnt."""
        return self.report.samples_learnt

    @property
    def positions(self) -> Positions:
        """What the model contains."""
        return self.source.positions()

    def turn(self) -> bool:
        """Do one step if rows wait, then publish what is due; return whether a step was done."""
        self.deps.producer.poll(0)
        self._check_upload()
        step = self._propose()
        if step is not None:
            self._commit(step)
        self._publish()
        return step is not None

    def run(self) -> None:
        """Recover and turn until `stop`; what is published last is a snapshot and a checkpoint."""
        self.deps.metrics.ready(False, "recovering")
        with self.deps.calls.named("the recovery", WORK_MAX_S):
            self.recover()
        while not self.deps.stop.is_set():
            try:
                with self.deps.calls.named(f"learning after step {self.learner.step}", WORK_MAX_S):
                    self._show_progress()
                    self.turn()
                    self._tell()
                if self.publisher and not self.publisher.wants_snapshot and not self.publisher.is_busy:
                    self.deps.metrics.ready(True)
            except Unavailable as error:
                logger.warning("Kafka or the store is away: %s", error)
                self._pause(0.5)
        with self.deps.calls.named("the end", WORK_MAX_S):
            self.close()

    def close(self) -> None:
        """Leave a checkpoint of the last step, within 3 s, and let go of the model."""
        if self.publisher is not None and self.checkpointer is not None:
            for writer in (self.checkpointer, self.publisher):
                writer.close(1.0)
            self._checkpoint()
            self._snapshot()
            for writer in (self.checkpointer, self.publisher):
                writer.close(3.0)
            try:
                release_claim(self.deps.blobs, self.project.model, self.deps.name)
            except Unavailable as error:
                logger.warning("the model stays claimed by this trainer: %s", error)
        if self.deps.board is not None:
            self.deps.board.close()

    def _redo(self, steps: list[Step]) -> None:
        """Learn recorded steps again, from the same rows."""
        if steps:
            logger.info("redoing %d recorded steps of run %s after step %d", len(steps), self.run_id, self.learner.step)
            self.deps.progress.begin("redoing recorded steps", sum(r.rows for step in steps for r in step.ranges))
        redone = 0
        for step in steps:
            if step.step != self.learner.step + 1:
                raise InvariantBroken(f"step {step.step} of run {self.run_id} follows step {self.learner.step}.")
            self._await_rows(step.ranges)
            self._apply(step)
            redone += sum(r.rows for r in step.ranges)
            self.deps.progress.done(redone)
        self.deps.progress.end()

    def _new_run(self, taken: set[str]) -> str:
        """Return a run's id that is not taken. It has the time for people to read; nothing is ordered by it.

        A variant's has its name too: no two models have one run.
        """
        taken |= self._retrying("list checkpoints", lambda: runs_of(self.deps.blobs, self.project.model))
        at_ms, end = self.deps.clock.now_ms(), f"-{self.project.variant}" if self.project.variant else ""
        while f"r{at_ms:013x}{end}" in taken:
            at_ms += 1
        return f"r{at_ms:013x}{end}"

    def _new_publisher(self, manifests: list[Manifest]) -> Publisher:
        """Return the run's publisher; it holds back while the lake is learnt and another model is served: that of
        another run, or that beside which a variant learns."""
        return Publisher(
            self.project,
            self.run_id,
            self.deps.topics,
            self.deps.producer,
            self.deps.blobs,
            self.deps.metrics,
            self.deps.clock,
            lambda: self.deps.reader.end_offsets(self.deps.topics.deltas)[0],
            self.deps.background,
            is_held=self.source.is_stored and self._is_behind_another(manifests),
            moved=self.uploads["snapshot"].moved,
            kept=named_blobs(manifests, but=self.run_id),
            rows=self.deps.config.publish_values,
        )

    def _is_behind_another(self, manifests: list[Manifest]) -> bool:
        return manifests[-1].run != self.run_id if manifests else bool(self.project.variant)

    def _new_checkpointer(self, before: CheckpointManifest | None) -> Checkpointer:
        """Return what writes the run's checkpoints, on from the one that the learner holds, if it holds any."""
        deps, made_by, told = self.deps, made_here(self.deps.config.threads), self.uploads["checkpoint"].moved
        how = (made_by, before, deps.background, told, self._steps_mover())
        return Checkpointer(self.project, self.learner, deps.blobs, deps.metrics, *how)

    def _steps_mover(self) -> Callable[[int], None]:
        deps = self.deps
        if deps.admin is None or deps.open_reader is None:
            return lambda _: None
        return StepsMover(
            self._archive,
            deps.topics.steps,
            deps.open_reader,
            deps.admin,
            deps.metrics,
            records_min=deps.config.steps_moved,
        ).checkpointed

    def _begin(self, first: Step | None) -> None:
        """Begin afresh; a run that was begun before begins at the lake version that its first step names."""
        stored = next((r for r in first.ranges if r.kind == "stored"), None) if first else None
        if stored is not None:
            self.source.begin_stored(stored.version)
        elif first is not None:
            self.source.begin(Cursor())
        else:
            self.source.begin(None)

    def _resume(self, checkpoint: Checkpoint) -> None:
        self.run_id = checkpoint.meta.run
        self.learner.load(checkpoint.learner)
        self.evaluation.load(checkpoint.evaluation)
        self._retrying("go on from the checkpoint", lambda: self.source.begin(checkpoint.meta.cursor))
        logger.info("checkpoint of run %s at step %d", self.run_id, self.learner.step)

    def _propose(self) -> Step | None:
        rows_max, now = self.project.recipe.batch_rows, self.deps.clock.monotonic()
        ready = self.source.ready_rows()
        if ready < rows_max:
            waited = now - self._waiting_since if self._waiting_since >= 0 else 0.0
            left = self.deps.config.wait_ms / 1000 - waited
            # 5 ms: rows that come while others wait are joined without spinning.
            self.source.poll(max(min(left, 0.005), 0.0) if ready else 0.05)
            ready = self.source.ready_rows()
            if ready and self._waiting_since < 0:
                self._waiting_since = now
            if not ready or (ready < rows_max and now - self._waiting_since < self.deps.config.wait_ms / 1000):
                return None
        self._waiting_since = -1.0
        ranges = self.source.propose(rows_max)
        if not ranges:
            return None
        return Step(
            model=self.project.model,
            run=self.run_id,
            step=self.learner.step + 1,
            ranges=ranges,
            positions=self.source.positions_after(ranges).to_json(),
            recipe=self.recipe,
            seed=self.project.recipe.seed,
            samples_id=self.deps.samples_id,
        )

    def _commit(self, step: Step) -> None:
        """Record the step, then learn it. Raises what must end the process: then the next one redoes the step."""
        if self._unlearnt:
            raise InvariantBroken(f"step {self._unlearnt} may be recorded and was not learnt; this process must end.")
        self._unlearnt = step.step
        try:
            self.steps.commit(step)
        except InvariantBroken as error:
            raise InvariantBroken(f"{error}{self._other_trainer()}") from error
        try:
            self._apply(step)
        except Unavailable as error:
            raise InvariantBroken(
                f"step {step.step} of run {self.run_id} is recorded and was not learnt: {error} This process ends, and "
                "the next one learns it."
            ) from error
        self._unlearnt = 0

    def _other_trainer(self) -> str:
        """Name the trainer that has the model now, where it is another one."""
        try:
            claim = read_claim(self.deps.blobs, self.project.model)
        except Unavailable:
            return ""
        return f" Trainer {claim.holder} has the model." if claim and claim.holder != self.deps.name else ""

    def _apply(self, step: Step) -> None:
        is_stored = self.source.is_stored
        rows = self.source.take(step.ranges)
        batch = self.source.batch(rows)
        known_B = known_times(rows, self.tasks)
        # By event time the score just before learning knows nothing later; in the order of the log it does.
        is_honest = is_stored and self.project.recipe.stored_order == "event_time"
        if is_honest:
            item_B = self.evaluation.before_stored(self.learner, batch)
        else:
            score_B, item_B = self.evaluation.before(self.learner, batch)
        report = self.learner.learn(batch)
        if is_honest:
            score_B = report.prediction_B
        if self.publisher is not None:
            self.publisher.note(report.touched_K)
        closed = self.evaluation.after(self.learner, batch, rows, score_B, item_B, known_B)
        self.report.learnt(report, batch, rows)
        self.report.closed(closed, step=self.learner.step)
        moved()

    def _publish(self) -> None:
        publisher, now, config = self.publisher, self.deps.clock.monotonic(), self.deps.config
        if publisher is None:
            return
        publisher.check()
        if publisher.is_held and not self.source.is_stored:
            logger.info("the lake is learnt: run %s is published", self.run_id)
            publisher.is_held = False
        self._checkpoint(when_due=True)
        wait_s = _RETRY_SNAPSHOT_S if publisher.unstored else config.snapshot_ms / 1000
        is_wanted = publisher.wants_snapshot or now - self._snapshot_at >= wait_s
        if is_wanted and not publisher.is_busy and not publisher.is_held:
            self._snapshot()
            return
        is_due = not publisher.is_held and now - self._published_at >= config.publish_ms / 1000
        if is_due and publisher.delta(self.learner, self.positions):
            self._published_at = now

    def _snapshot(self) -> None:
        publisher = self.publisher
        if publisher is None or self._unlearnt or (publisher.holds(self.learner.step) and not publisher.unstored):
            return
        if publisher.snapshot(self.learner, self.positions):
            self._snapshot_at = self.deps.clock.monotonic()
            self.uploads["snapshot"].began()

    def _checkpoint(self, *, when_due: bool = False) -> None:
        """Begin a checkpoint, unless one is being written or the newest one is of this very place."""
        checkpointer, clock = self.checkpointer, self.deps.clock
        if checkpointer is None:
            return
        checkpointer.check()
        if self._unlearnt or checkpointer.is_busy:
            return
        wait_s = _RETRY_SNAPSHOT_S if checkpointer.unstored else self.deps.config.checkpoint_ms / 1000
        if when_due and clock.monotonic() - self._checkpoint_at < wait_s:
            return
        meta = Meta(
            run=self.run_id,
            step=self.learner.step,
            steps_offset=self.steps.offset,
            recipe=self.recipe,
            cursor=self.source.cursor(),
            created_ms=clock.now_ms(),
            samples_id=self.deps.samples_id,
            steps_id=self.deps.steps_id,
        )
        self._checkpoint_at = began_s = clock.monotonic()
        if checkpointer.holds(meta):
            return
        figures = {"rows": float(self.learner.rows), "held": float(self.learner.held)}
        figures |= figures_of(self.evaluation, self.project.recipe.task)
        checkpointer.begin(Moment(meta, self.positions, self.evaluation.state(), figures))
        self.uploads["checkpoint"].began()
        self.deps.metrics.set("checkpoint_stall_seconds", clock.monotonic() - began_s)

    def _show_progress(self) -> None:
        if self.source.is_stored:
            left = self.source.stored_left
            if not self._stored_rows:
                self._stored_rows = left
                self.deps.progress.begin("learning the lake", left)
            self.deps.progress.done(self._stored_rows - left)
        elif self._stored_rows:
            self.deps.progress.done(self._stored_rows)
            self.deps.progress.end()
            self._stored_rows = 0

    def _tell(self) -> None:
        if self.report.is_due():
            ends = self.deps.reader.end_offsets(self.deps.topics.samples)
            self.report.tell(self.learner, self.evaluation, self.source, self.source.lag(ends))

    def _await_rows(self, ranges: tuple[StepRange, ...]) -> None:
        def poll(wait_s: float) -> Mapping[int, int]:
            self._retrying("read recorded samples", lambda: self.source.poll_for(ranges, wait_s))
            self._check()
            return self.source.next_offsets

        poll_until(lambda: self.source.has(ranges), poll, "the samples of a recorded step")

    def _retrying(self, what: str, attempt: Callable[[], T]) -> T:
        delay = 0.1
        while True:
            try:
                return attempt()
            except Unavailable as error:
                logger.warning("cannot %s yet: %s", what, error)
                self.deps.metrics.ready(False, f"cannot {what}: {error}")
                self._pause(delay)
                delay = min(2 * delay, 5.0)

    def _pause(self, seconds: float) -> None:
        self._check()
        self.deps.clock.sleep(seconds)
        self._check()

    def _check(self) -> None:
        if self.deps.stop.is_set():
            raise Stopped
        self._check_upload()

    def _check_upload(self) -> None:
        for what, writer in (("snapshot", self.publisher), ("checkpoint", self.checkpointer)):
            self.uploads[what].look(is_busy=writer is not None and writer.is_busy)


def train(deps: Dependencies) -> None:
    """Run one worker until `stop` is set."""
    import torch

    torch.set_num_threads(deps.config.threads)
    try:
        Trainer(deps).run()
    except Stopped:
        logger.info("stopped while waiting")
