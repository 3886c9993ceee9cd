"""The training process: recover, then propose, commit, learn, publish, over and over.

Protocol of one step:

1. read ahead until a batch is full or its first row has waited `wait_ms`;
2. propose position ranges; write them as step n and read step n back (`trainer.commit.steps`);
3. propose the full batches behind them, if there are some; write them as steps n + 1 to n + k and read them back in a
   thread, beside what follows (`trainer.commit.ahead`): then 1 and 2 are done for them;
4. take the rows of the ranges of step n; score them, learn them;
5. publish and checkpoint, by time, each in a thread of its own.

A batch that is not full is proposed when all before it is learnt: more rows come meanwhile, and it waits for no group.

Whatever fails between 2 and the end of 4 ends the process, also what would be retried elsewhere: the step is recorded,
and the next process redoes it. No step follows one that was not learnt. What is recorded ahead when the process ends,
the next one redoes as well.

A call that never returns ends the process too (`trainer.bounds`).

Recovery: the newest checkpoint of this recipe; redo exactly the steps recorded after it; go on with 1. A run that has
steps but no checkpoint yet is redone from step 1. The steps of another recipe are another run's, and are left alone. A
run that somebody asked for goes on from a checkpoint of another one (`trainer.recovery`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.positions import Cursor, Positions
from headrace.contract.formats.snapshot import Manifest
from headrace.contract.formats.steps import Branch, Step, StepRange
from headrace.process.moved import moved
from headrace.trainer.bounds import WORK_MAX_S, Stopped, poll_until, wait, watched
from headrace.trainer.commit.ahead import StepsAhead
from headrace.trainer.commit.checkpoint import Checkpoint, CheckpointManifest, Meta, runs_of
from headrace.trainer.commit.checkpointer import Checkpointer, Moment, made_here
from headrace.trainer.commit.claim import other_holder, release_claim, take_claim
from headrace.trainer.commit.decisions import decision_of, ensure_decision
from headrace.trainer.commit.publish import Publisher, named_blobs, read_manifests
from headrace.trainer.commit.steps import StepsLog
from headrace.trainer.commit.steps_archive import StepsArchive, StepsMover
from headrace.trainer.dependencies import Dependencies
from headrace.trainer.identity import new_evaluation, new_run_id, recipe_digest, tasks_of
from headrace.trainer.lake_progress import LakeProgress
from headrace.trainer.model.learner import learner_for
from headrace.trainer.proposals import Proposals
from headrace.trainer.recovery import find_recovery
from headrace.trainer.source.source import Source
from headrace.trainer.upload_watch import UploadWatch
from headrace.trainer.validation.evaluate import known_times
from headrace.trainer.validation.report import Report, figures_of

logger = logging.getLogger("headrace.train")

T = TypeVar("T")

_RETRY_SNAPSHOT_S = 2.0
LOOK_S = 2.0
"""How often a trainer without a step to learn looks into the steps: it would not be told that it was fenced off."""
SHOWN_EVERY = 8
"""Of so many readings of the lake one brings the values that the projector shows: it counts a few rows of each step."""


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
            live_share=deps.config.live_share,
        )
        self._archive = StepsArchive(deps.blobs, deps.topics.steps, deps.steps_id)
        self.steps = StepsLog(
            deps.steps_writer, self.project.model, deps.metrics, pause=lambda s: wait(deps, s), archive=self._archive
        )
        self.ahead = StepsAhead(
            self.steps,
            steps_max=deps.config.group_steps,
            background=deps.background,
            look=self._check,
            words=self._broken,
        )
        self.recipe = recipe_digest(self.project)
        self.proposals = Proposals(deps, self.source, self.recipe)
        self.learner = learner_for(self.project, deps.config)
        self.evaluation = new_evaluation(self.project, deps.config)
        self.run_id = ""
        self.branch: Branch | None = None
        """How the run began, where somebody asked for it."""
        self.publisher: Publisher | None = None
        self.checkpointer: Checkpointer | None = None
        self.tasks = tasks_of(self.project)
        self.report = Report(self.project, deps.config, deps.metrics, deps.board, deps.clock)
        self.uploads = {what: UploadWatch(what, deps.metrics, deps.clock) for what in ("snapshot", "checkpoint")}
        self.lake_progress = LakeProgress(deps.progress, self.source)
        self._unlearnt = 0
        """The step that is being learnt; 0 between steps."""
        self._steps_offset = 0
        """The offset behind the record of the last step that was learnt."""
        self._published_at = self._snapshot_at = self._checkpoint_at = self._looked_at = float("-inf")

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
        found = find_recovery(deps, self.steps, self.recipe, self._retrying)
        self.branch, redone = found.branch, found.redone
        self.source.expect(redone)
        if found.checkpoint is not None:
            self._resume(found.checkpoint, found.run)
            if found.branch is not None and found.checkpoint.meta.run == found.run:
                self.source.pass_over(found.branch.passed_over)
        else:
            self.run_id = found.run or self._new_run(found.runs | {m.run for m in manifests})
            first = next((step for step in redone if step.ranges), None)
            self._retrying("find where to begin", lambda: self._begin(first))
        checkpoint = found.checkpoint
        # Before anything is learnt: it hears of what changes from here on.
        self.checkpointer = self._new_checkpointer(checkpoint.manifest if checkpoint is not None else None)
        del checkpoint, found.checkpoint
        self._redo(redone)
        self._tell_serving(found.first, manifests)
        self.proposals.begin(self.run_id, self.learner.step)
        self._steps_offset = self.steps.offset
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
        self._record()
        recorded = self.ahead.next()
        if recorded is not None:
            self._learn(*recorded)
        else:
            self._look()
        self._publish()
        return recorded is not None

    def run(self) -> None:
        """Recover and turn until `stop`; what is published last is a snapshot and a checkpoint."""
        self.deps.metrics.ready(False, "recovering")
        with self.deps.calls.named("the recovery", WORK_MAX_S):
            self.recover()
        while not self.deps.stop.is_set():
            try:
                with self.deps.calls.named(f"learning after step {self.learner.step}", WORK_MAX_S):
                    self.lake_progress.show()
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
            for writer in (self.ahead, self.checkpointer, self.publisher):
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
            if step.branch is not None:
                self._follow(step, step.branch)
                continue
            if step.step != self.learner.step + 1:
                raise InvariantBroken(
                    f"step {step.step} of run {self.run_id} follows step {self.learner.step}: what lies between is "
                    "recorded nowhere. `headrace train repair` begins a run without it."
                )
            self._await_rows(step.ranges)
            self._apply(step)
            redone += sum(r.rows for r in step.ranges)
            self.deps.progress.done(redone)
        self.deps.progress.end()

    def _follow(self, first: Step, branch: Branch) -> None:
        """Go on as the run that begins with this record."""
        if first.step != self.learner.step:
            raise InvariantBroken(
                f"run {first.run} goes on behind step {first.step} and the model is at step {self.learner.step}."
            )
        logger.info("run %s begins: %s", first.run, branch.words)
        self.source.pass_over(branch.passed_over)

    def _tell_serving(self, first: Step | None, manifests: list[Manifest]) -> None:
        """Say in `model` that this run goes on in place of another one, unless that is said or a snapshot shows it."""
        decision = decision_of(first) if first is not None else None
        if decision is None or (manifests and manifests[-1].run == self.run_id):
            return
        deps = self.deps
        self._retrying(
            "tell serving which run goes on",
            lambda: ensure_decision(deps.reader, deps.producer, deps.topics.model, decision),
        )

    def _new_run(self, taken: set[str]) -> str:
        taken |= self._retrying("list checkpoints", lambda: runs_of(self.deps.blobs, self.project.model))
        return new_run_id(self.project, self.deps.clock.now_ms(), taken)

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
            is_held=self._is_behind(manifests),
            moved=self.uploads["snapshot"].moved,
            kept=named_blobs(manifests, but=self.run_id),
            rows=self.deps.config.publish_values,
        )

    def _is_behind(self, manifests: list[Manifest]) -> bool:
        """Say whether the lake is learnt while another model is served, which nobody wants to be left."""
        is_wanted = self.branch is not None and bool(self.branch.run)
        is_other = manifests[-1].run != self.run_id if manifests else bool(self.project.variant)
        return self.source.is_stored and is_other and not is_wanted

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

    def _resume(self, checkpoint: Checkpoint, run: str) -> None:
        self.run_id = run
        self.learner.load(checkpoint.learner, checkpoint.rows)
        self.evaluation.load(checkpoint.evaluation)
        self._retrying("go on from the checkpoint", lambda: self.source.begin(checkpoint.meta.cursor))
        logger.info("checkpoint of run %s at step %d", checkpoint.meta.run, self.learner.step)

    def _look(self) -> None:
        """Now and then while nothing is learnt, look whether another run was asked for."""
        now = self.deps.clock.monotonic()
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self.steps.look()

    def _record(self) -> None:
        """Record a step where none waits to be learnt, and begin to record the full batches behind it. Raises what must
        end the process."""
        if self._unlearnt:
            raise InvariantBroken(f"step {self._unlearnt} is recorded and was not learnt; this process must end.")
        if self.ahead.is_empty:
            step = self.proposals.next()
            if step is None:
                return
            self.ahead.commit(step)
        self.ahead.begin(self.proposals.full(self.ahead.room()))

    def _learn(self, offset: int, step: Step) -> None:
        """Learn the step that the record at `offset` commits. Raises what must end the process: the next one redoes
        it."""
        self._unlearnt, began_s = step.step, self.deps.clock.monotonic()
        try:
            self._apply(step)
        except Unavailable as error:
            raise InvariantBroken(
                f"step {step.step} of run {self.run_id} is recorded and was not learnt: {error} This process ends, and "
                "the next one learns it."
            ) from error
        self._unlearnt, self._steps_offset = 0, offset + 1
        self.ahead.took(self.deps.clock.monotonic() - began_s)

    def _broken(self, error: InvariantBroken) -> str:
        """Say why a step could not be recorded, and who has the model now; in the thread that records it."""
        other = other_holder(self.deps.blobs, self.project.model, self.deps.name)
        return self.steps.why_fenced() or f"{error}{other}"

    def _apply(self, step: Step) -> None:
        is_stored, is_mixed = self.source.is_stored, self.source.is_mixed
        rows = self.source.take(step.ranges)
        batch = self.source.batch(rows)
        known_B = known_times(rows, self.tasks)
        # By event time the score just before learning knows nothing later; in the order of the log it does.
        is_honest = is_stored and not is_mixed and self.project.recipe.stored_order == "event_time"
        if is_honest:
            item_B = self.evaluation.before_stored(self.learner, batch)
        else:
            score_B, item_B = self.evaluation.before(self.learner, batch)
            if is_mixed:
                # Figures are of the live samples alone: a model that knows later ones would judge the lake's.
                score_B[: sum(r.rows for r in step.ranges if r.kind == "stored")] = np.nan
        report = self.learner.learn(batch)
        if is_honest:
            score_B = report.prediction_B
        if self.publisher is not None:
            self.publisher.note(report.touched_K)
        closed = self.evaluation.after(self.learner, batch, rows, score_B, item_B, known_B)
        self.report.learnt(report, batch, rows)
        self.report.closed(closed, step=self.learner.step)
        self.report.took(self.source.taken_ms, is_redone=self.publisher is None)
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
        if is_due and publisher.delta(self.learner, self.positions, self.source.mixed()):
            self._published_at = now
            self.report.published()

    def _snapshot(self) -> None:
        publisher = self.publisher
        if publisher is None or self._unlearnt or (publisher.holds(self.learner.step) and not publisher.unstored):
            return
        if publisher.snapshot(self.learner, self.positions, self.source.mixed()):
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
            steps_offset=self._steps_offset,
            recipe=self.recipe,
            cursor=self.source.cursor(),
            created_ms=clock.now_ms(),
            samples_id=self.deps.samples_id,
            steps_id=self.deps.steps_id,
            branch=self.branch,
        )
        self._checkpoint_at = began_s = clock.monotonic()
        if checkpointer.holds(meta):
            return
        figures = {"rows": float(self.learner.rows), "held": float(self.learner.held)}
        figures |= figures_of(self.evaluation, self.project.recipe.task)
        checkpointer.begin(Moment(meta, self.positions, self.evaluation.frozen(), figures))
        self.uploads["checkpoint"].began()
        self.deps.metrics.set("checkpoint_stall_seconds", clock.monotonic() - began_s)

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
        self._check_upload()
        wait(self.deps, seconds)
        self._check_upload()

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
