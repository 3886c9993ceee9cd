"""Replay *as trained*: the recorded steps, the stored samples, the same learner, and the digest it must reach.

1. The newest snapshot manifest with a digest says which run and step to reach (or the caller does).
2. `steps` says what each step of that run took; where it goes on from another run, that one's steps up to there come
   before.
3. The rows come from the lake, and from the samples topic those that the lake does not hold yet.
4. The same learner learns them in the same order; equal digests mean equal bits. The digest is of the kind that the
   manifest names: runs that were published with another kind are compared by that one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.config import TrainConfig
from headrace.contract.errors import ConfigRejected, InvariantBroken
from headrace.contract.formats.positions import START, Position, Positions, orders
from headrace.contract.formats.sample import conform, sample_schema
from headrace.contract.formats.samples_topic.kept_samples import read_on_at
from headrace.contract.formats.snapshot import Manifest
from headrace.contract.formats.steps import Step, StepRange
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.lake import LakeReader
from headrace.contract.interfaces.log import Reader, read_range
from headrace.contract.interfaces.progress import Progress, Silent
from headrace.contract.project import Project
from headrace.replay.recorded import recorded_steps
from headrace.trainer.commit.lineage import lineage, passed_over
from headrace.trainer.commit.publish import read_manifests
from headrace.trainer.commit.steps_archive import StepsArchive
from headrace.trainer.identity import recipe_digest
from headrace.trainer.model.digest import SHA256, SUM, State, digest, parts
from headrace.trainer.model.learner import learner_for
from headrace.trainer.source.batch import to_batch
from headrace.trainer.source.columns import stored_columns
from headrace.trainer.source.live import LivePartition, LiveRows
from headrace.trainer.source.range_reader import RangeReader
from headrace.trainer.source.stored import LAKE_BYTES, StoredRows


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay found; `equal` is None where the live digest of that step is not known."""

    model: str
    run: str
    step: int
    rows: int
    digest: str
    live_digest: str
    equal: bool | None
    from_lake: int
    from_topic: int
    seconds: float
    digest_kind: str = ""
    """Of both digests, that of the live one; see `headrace.trainer.model.digest`."""
    differs: tuple[str, ...] = ()
    """Parts of the digest that are not the live model's: tables, by the name of their keys, or `rest`."""


def as_trained(
    project: Project,
    topics: Topics,
    reader: Reader,
    lake: LakeReader | None,
    *,
    train: TrainConfig | None = None,
    step: int | None = None,
    holder: str = "replay",
    samples_id: str = "",
    archive: StepsArchive | None = None,
    progress: Progress | None = None,
) -> Result:
    """Replay the newest run of `project` up to its newest snapshot (or up to `step`) and compare digests.

    It learns where the settings `train` say, as the run did: other devices give other bits. The versions of the lake
    that are read are leased to `holder`, a name of its own for each replay at one time. `samples_id` is the id of the
    `samples` topic, as `Admin.topic_id`; "" asks nothing of the steps. `archive` has the steps that were moved.

    Raises `ConfigRejected` where nothing was published yet, or the run was trained by another recipe or spec;
    `InvariantBroken` where recorded samples are found nowhere, or were in a topic that was made anew since.
    """
    began = time.monotonic()
    manifests = read_manifests(reader, topics, project.model)
    if not manifests:
        raise ConfigRejected(
            f"no snapshot of model {project.model!r} is published; `headrace status` shows the trainer."
        )
    run = manifests[-1].run
    target = manifests[-1].step if step is None else step
    live = next((m for m in reversed(manifests) if m.run == run and m.step == target), None)
    steps = read_steps(reader, topics, project.model, run, target, archive)
    if any(s.recipe != recipe_digest(project) for s in steps):
        raise ConfigRejected(f"run {run} was trained by another recipe or feature spec than this project's.")
    shown = progress or Silent()
    shown.begin(f"replaying {target} steps of run {run}", sum(r.rows for s in steps for r in s.ranges))
    config = train or TrainConfig()
    ranges, in_lake = recorded_rows(
        project, topics, reader, lake, steps, holder, samples_id=samples_id, lake_bytes=config.lake_bytes
    )
    learner, learnt, from_lake = learner_for(project, config), 0, 0
    try:
        for each in steps:
            if each.branch is not None:
                for left_out in each.branch.passed_over:
                    ranges.live.pass_over(left_out)
                continue
            _read_stored(ranges.stored, each)
            batch = to_batch(ranges.take(each.ranges), project)
            learner.learn(batch)
            learnt += len(batch)
            from_lake += sum(r.rows for r in each.ranges if _is_in_lake(r, in_lake))
            shown.done(learnt)
    finally:
        ranges.stored.release()
    shown.end()
    return Result(
        model=project.model,
        run=run,
        step=target,
        rows=learnt,
        from_lake=from_lake,
        from_topic=learnt - from_lake,
        seconds=round(time.monotonic() - began, 3),
        **_compared(learner.state(), live),
    )


def _compared(state: State, live: Manifest | None) -> dict[str, Any]:
    """Return what a result says of the digest of a learner's state and of the live one."""
    kind = SUM if live is None else live.digest_kind or SHA256
    told = live.digest_parts if live is not None else {}
    summed = parts(state) if kind == SUM else None
    found = digest(state, kind) if summed is None else summed.text
    here = summed.to_text() if summed is not None and told else {}
    return {
        "digest": found,
        "live_digest": live.digest if live is not None else "",
        "equal": found == live.digest if live is not None else None,
        "digest_kind": kind,
        "differs": tuple(sorted(name for name in told.keys() | here.keys() if told.get(name) != here.get(name))),
    }


def _read_stored(stored: StoredRows, step: Step) -> None:
    """Read on in the version of the lake whose rows the step takes, if it takes any."""
    for each in (r for r in step.ranges if r.kind == "stored"):
        if each.version != stored.version:
            stored.open(each.version)
        stored.read_ahead(each.stop - stored.taken)


def _is_in_lake(taken: StepRange, in_lake: Positions) -> bool:
    return taken.kind == "stored" or in_lake.covers(taken.partition, Position(*taken.upto))


def read_steps(
    reader: Reader, topics: Topics, model: str, run: str, upto: int, archive: StepsArchive | None = None
) -> list[Step]:
    """Return steps 1..`upto` of what a run consists of, the first records of runs that were asked for among them.

    Raises `InvariantBroken` where one is missing.
    """
    every = [s for s in recorded_steps(reader, topics, archive) if s.model == model]
    steps = [s for s in lineage(every, run) if s.step <= upto]
    numbers = [s.step for s in steps if s.branch is None]
    if numbers != list(range(1, upto + 1)):
        raise InvariantBroken(
            f"topic and store hold {len(numbers)} of the {upto} steps of run {run}, or in another order."
        )
    return steps


def recorded_rows(
    project: Project,
    topics: Topics,
    reader: Reader,
    lake: LakeReader | None,
    steps: Sequence[Step],
    holder: str,
    *,
    samples_id: str = "",
    lake_bytes: int = LAKE_BYTES,
) -> tuple[RangeReader, Positions]:
    """Return a reader that has the rows of all live ranges of `steps`, from the lake's newest version and what the
    topic has beyond it, and the positions up to which they came from the lake.

    Raises `InvariantBroken` when the topic ends before the last of them, or is not the one that they were taken from.
    """
    schema, tasks = sample_schema(project), project.recipe.heads
    first: dict[int, Position] = {}
    upto: dict[int, Position] = {}
    for each in (r for step in steps for r in step.ranges if r.kind == "live"):
        first.setdefault(each.partition, Position(*each.after))
        upto[each.partition] = Position(*each.upto)
    state = lake.state() if lake is not None and upto else None
    in_lake = Positions(topics.generation) if state is None else state.positions
    gaps: dict[int, list[tuple[Position, Position]]] = {}
    for left_out in passed_over(steps):
        gaps.setdefault(left_out.partition, []).append((Position(*left_out.after), Position(*left_out.upto)))
    for step in steps:
        if not all(_is_in_lake(r, in_lake) for r in step.ranges):
            _check_samples(step, samples_id, topics.samples)
    live = LiveRows(schema, tasks)
    begins = reader.begin_offsets(topics.samples)
    for p, position in first.items():
        following = 0 if state is None else state.next_offsets.get(p, 0)
        if in_lake.at(p) > START and following > begins[p]:
            following = read_on_at(reader, topics.samples, p, in_lake.at(p), following)
        live.partitions[p] = LivePartition.at(position, max(begins[p], following))
        live.partitions[p].gaps = sorted(gaps.get(p, ()))
    if lake is not None and state is not None:
        lake.hold(state.version, holder)
        try:
            rows = lake.read(state.version)
        finally:
            lake.let_go(holder)
        for p in upto:
            # Imported history precedes all that is live: no live range has it.
            live_N = pc.and_(pc.equal(rows["partition"], p), pc.greater_equal(rows["offset"], 0))
            ours = conform(rows.filter(live_N), schema)
            # A run may have begun behind what neither lake nor topic held.
            live.seed(p, _in_position_order(ours), max(in_lake.at(p), first[p]))
    missing = {p for p, position in upto.items() if in_lake.at(p) < position}
    if missing:
        _read_on(reader, topics.samples, live, {p: upto[p] for p in missing})
    stored = StoredRows(
        *(lake, stored_columns(project), tasks, holder),
        order=project.recipe.stored_order,
        bytes_max=lake_bytes,
        background=True,
    )
    return RangeReader(stored, live, schema), in_lake


def _check_samples(step: Step, samples_id: str, topic: str) -> None:
    """Raise `InvariantBroken` where a step took rows of a topic that is no more: others may lie at their offsets."""
    if step.samples_id and samples_id and step.samples_id != samples_id:
        raise InvariantBroken(
            f"step {step.step} of run {step.run} learnt rows of topic {topic!r} with id {step.samples_id} which the "
            f"lake does not hold, and the topic has id {samples_id}: it was deleted and made anew, and its rows are "
            "others. Replay up to a step before it with --step, or bring the lake back that has its rows."
        )


def _in_position_order(rows: pa.Table) -> pa.Table:
    """Return one partition's rows in position order, each position once."""
    order_N = orders(rows["offset"].to_numpy(), rows["rank"].to_numpy())
    return rows.take(pa.array(np.unique(order_N, return_index=True)[1]))


def _read_on(reader: Reader, topic: str, live: LiveRows, upto: Mapping[int, Position]) -> None:
    begins = {p: live.partitions[p].next_offset for p in upto}
    ends = {p: end for p, end in reader.end_offsets(topic).items() if p in upto}
    waiting = set(upto)
    for record in read_range(reader, topic, begins=begins, ends=ends):
        live.intake(record)
        waiting -= {p for p in waiting if live.partitions[p].order.position >= upto[p]}
        if not waiting:
            return
    have = {p: tuple(live.partitions[p].order.position) for p in waiting}
    raise InvariantBroken(f"samples up to {upto} are wanted and the topic ends at {have}.")
