"""Replay *as trained*: the recorded steps, the stored samples, the same learner, and the digest it must reach.

1. The newest snapshot manifest with a digest says which run and step to reach (or the caller does).
2. `steps` says what each step of that run took.
3. The rows come from the lake, and from the samples topic those that the lake does not hold yet.
4. The same learner learns them in the same order; equal digests mean equal bits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.config import TrainConfig
from headrace.contract.errors import ConfigRejected, InvariantBroken
from headrace.contract.formats.events import decode_batch
from headrace.contract.formats.positions import Position, order_of, orders
from headrace.contract.formats.sample import parse_position, sample_schema
from headrace.contract.formats.steps import Step, StepRange, decode_step
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Reader, read_range
from headrace.contract.interfaces.progress import Progress, Silent
from headrace.contract.project import Project
from headrace.trainer.commit.publish import read_manifests
from headrace.trainer.model.learner import learner_for
from headrace.trainer.run import digest_of
from headrace.trainer.source.source import Lake, conform, stored_order, to_batch


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


@dataclass(frozen=True)
class _Store:
    """Rows of one partition, in position order."""

    rows: pa.Table
    order_N: npt.NDArray[np.int64]


def as_trained(
    project: Project,
    topics: Topics,
    reader: Reader,
    lake: Lake | None,
    *,
    train: TrainConfig | None = None,
    step: int | None = None,
    holder: str = "replay",
    progress: Progress | None = None,
) -> Result:
    """Replay the newest run of `project` up to its newest snapshot (or up to `step`) and compare digests.

    It learns where the settings `train` say, as the run did: other devices give other bits. The versions of the lake
    that are read are leased to `holder`, a name of its own for each replay at one time.

    Raises `ConfigRejected` where nothing was published yet, or the run was trained by another recipe or spec;
    `InvariantBroken` where recorded samples are found nowhere.
    """
    began = time.monotonic()
    manifests = read_manifests(reader, topics, project.name)
    if not manifests:
        raise ConfigRejected(
            f"no snapshot of model {project.name!r} is published; `headrace status` shows the trainer."
        )
    run = manifests[-1].run
    target = manifests[-1].step if step is None else step
    live = next((m.digest for m in reversed(manifests) if m.run == run and m.step == target), "")
    steps = read_steps(reader, topics, project.name, run, target)
    if any(s.recipe != digest_of(project) for s in steps):
        raise ConfigRejected(f"run {run} was trained by another recipe or feature spec than this project's.")
    shown = progress or Silent()
    shown.begin(f"replaying {target} steps of run {run}", sum(r.rows for s in steps for r in s.ranges))
    rows = Rows(project, topics, reader, lake, steps, holder)
    learner, learnt = learner_for(project, train or TrainConfig()), 0
    for one in steps:
        batch = to_batch(rows.of(one), project)
        learner.learn(batch)
        learnt += len(batch)
        shown.done(learnt)
    shown.end()
    digest = learner.digest()
    return Result(
        model=project.name,
        run=run,
        step=target,
        rows=learnt,
        digest=digest,
        live_digest=live,
        equal=digest == live if live else None,
        from_lake=rows.from_lake,
        from_topic=learnt - rows.from_lake,
        seconds=round(time.monotonic() - began, 3),
    )


def read_steps(reader: Reader, topics: Topics, model: str, run: str, upto: int) -> list[Step]:
    """Return steps 1..`upto` of a run. Raises `InvariantBroken` where one is missing."""
    steps = [decode_step(r.value) for r in read_range(reader, topics.steps) if r.value is not None]
    steps = [s for s in steps if s.model == model and s.run == run and s.step <= upto]
    if [s.step for s in steps] != list(range(1, upto + 1)):
        raise InvariantBroken(
            f"the steps topic holds {len(steps)} of the {upto} steps of run {run}, or in another order."
        )
    return steps


class Rows:
    """Finds the samples of recorded ranges: in the lake, else in the topic."""

    def __init__(
        self,
        project: Project,
        topics: Topics,
        reader: Reader,
        lake: Lake | None,
        steps: Sequence[Step],
        holder: str = "replay",
    ) -> None:
        self._holder = holder
        self._project, self._schema, self._lake = project, sample_schema(project), lake
        self._stored: dict[int, pa.Table] = {}
        self.from_lake = 0
        need: dict[int, Position] = {}
        for r in (r for s in steps for r in s.ranges if r.kind == "live"):
            need[r.partition] = max(need.get(r.partition, Position(-1, -1)), Position(*r.upto))
        state = lake.state() if lake is not None else None
        self._lake_upto = {p: state.positions.at(p) for p in need} if state is not None else {}
        stored = self._leased(lake, state.version) if lake is not None and state else self._schema.empty_table()
        offsets = dict(state.next_offsets) if state is not None else {}
        missing = {p: upto for p, upto in need.items() if upto > self._lake_upto.get(p, Position(-1, -1))}
        later = self._from_topic(reader, topics.samples, missing, offsets) if missing else []
        tasks = project.recipe.heads
        self._live: dict[int, _Store] = {}
        for partition in need:
            parts = [conform(stored.filter(pc.equal(stored["partition"], partition)), self._schema)]
            parts += [pa.Table.from_batches([b]) for p, b in later if p == partition]
            self._live[partition] = _indexed(parts, self._schema, tasks)

    def of(self, step: Step) -> pa.Table:
        """Return a step's rows, in the order in which they were learnt."""
        return pa.concat_tables([self._of(r) for r in step.ranges]) if step.ranges else self._schema.empty_table()

    def _of(self, wanted: StepRange) -> pa.Table:
        if wanted.kind == "stored":
            rows = self._version(wanted.version).slice(wanted.start, wanted.stop - wanted.start)
            self.from_lake += rows.num_rows
        else:
            store = self._live[wanted.partition]
            low, high = (int(np.searchsorted(store.order_N, order_of(x), side="right")) for x in _ends(wanted))
            rows = store.rows.slice(low, high - low)
            if Position(*wanted.upto) <= self._lake_upto.get(wanted.partition, Position(-1, -1)):
                self.from_lake += rows.num_rows
        if rows.num_rows != wanted.rows:
            raise InvariantBroken(
                f"{wanted} took {wanted.rows} samples and {rows.num_rows} are stored. `headrace ledger` shows which."
            )
        return rows

    def _version(self, version: int) -> pa.Table:
        if version not in self._stored:
            if self._lake is None:
                raise InvariantBroken(f"the run began with version {version} of a lake, and no lake is given.")
            rows = conform(self._leased(self._lake, version), self._schema)
            self._stored[version] = stored_order(rows, self._project.recipe.heads)
        return self._stored[version]

    def _leased(self, lake: Lake, version: int) -> pa.Table:
        lake.hold(version, self._holder)
        try:
            return lake.read(version)
        finally:
            lake.let_go(self._holder)

    def _from_topic(
        self, reader: Reader, topic: str, missing: dict[int, Position], offsets: dict[int, int]
    ) -> list[tuple[int, pa.RecordBatch]]:
        begins = {p: max(begin, offsets.get(p, 0)) for p, begin in reader.begin_offsets(topic).items()}
        ends = {p: end for p, end in reader.end_offsets(topic).items() if p in missing}
        have = {p: self._lake_upto.get(p, Position(-1, -1)) for p in missing}
        found: list[tuple[int, pa.RecordBatch]] = []
        for record in read_range(reader, topic, begins=begins, ends=ends):
            if record.value is None:
                continue
            found.append((record.partition, decode_batch(record.value, self._schema)))
            have[record.partition] = max(have[record.partition], parse_position(record.headers["last"]))
            if all(have[p] >= upto for p, upto in missing.items()):
                return found
        raise InvariantBroken(f"samples up to {missing} are wanted and the topic ends at {have}.")


def _ends(wanted: StepRange) -> tuple[tuple[int, int], tuple[int, int]]:
    return wanted.after, wanted.upto


def _indexed(parts: list[pa.Table], schema: pa.Schema, tasks: tuple[str, ...]) -> _Store:
    """Return rows of these tasks in position order, each position once: the lake and the topic may both hold it."""
    table = pa.concat_tables(parts).combine_chunks()
    table = table.filter(pc.is_in(table["task"], value_set=pa.array(tasks)))
    order_N = orders(table["offset"].to_numpy(), table["rank"].to_numpy())
    kept_K, first_K = np.unique(order_N, return_index=True)
    return _Store(table.take(pa.array(first_K)), kept_K)
