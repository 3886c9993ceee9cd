"""Writes checkpoints of one run beside its training.

1. *freeze*, in the thread that learns: what is small is copied, rows are read later as they were (`model.frozen`).
2. In a thread of its own, the parts are stored: of each table what `checkpoint_plan` says, then everything else.
3. The manifest is stored: now the checkpoint exists. It names what is stored new, and what it shares with the one
   before.
4. What is needed no more is deleted (`retention`).

A failure in 2 or 3 leaves the checkpoints that there are; the rows that changed are stored by the next one. What else
the writing thread meets is raised in the training thread, by `check`, and ends the process.
"""

from __future__ import annotations

import importlib.metadata
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec
import numpy as np
from llvmlite import binding

from headrace.contract.errors import Overloaded, Unavailable
from headrace.contract.formats.positions import Positions
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.metrics import Metrics
from headrace.contract.project import Project
from headrace.process.background import Background
from headrace.process.moved import followed, moved
from headrace.trainer.commit.checkpoint import (
    ChangedRows,
    CheckpointManifest,
    MadeBy,
    Meta,
    Page,
    TableParts,
    encode_manifest,
    folder_of,
    parts_of,
)
from headrace.trainer.commit.checkpoint_plan import planned
from headrace.trainer.commit.parts import Arrays, Encoded, Part, encode_part, grouped
from headrace.trainer.commit.retention import Retention
from headrace.trainer.model.frozen import Frozen, FrozenTable, Watch
from headrace.trainer.model.learner import TableLearner
from headrace.trainer.model.tables.row_index import Int64s

logger = logging.getLogger("headrace.train")


class Moment(msgspec.Struct, frozen=True):
    """What a checkpoint says besides the learner."""

    meta: Meta
    positions: Positions
    evaluation: Arrays
    metrics: dict[str, float]


@dataclass
class Checkpointer:
    """Writes one run's checkpoints. Called by the training thread alone. Begins before anything is learnt."""

    project: Project
    learner: TableLearner
    blobs: Blobs
    metrics: Metrics
    made_by: MadeBy
    before: CheckpointManifest | None = None
    """The checkpoint that the learner holds; None where it holds none."""
    background: bool = True
    """False writes before `begin` returns: for tests."""
    moved: Callable[[], None] = lambda: None
    """Is called, in the writing thread, whenever the writing goes on."""
    checkpointed: Callable[[int], None] = lambda _: None
    """Is called, in the writing thread, with the `steps_offset` of a checkpoint that was stored."""

    def __post_init__(self) -> None:
        self._watch = Watch(self.learner, between=True)
        self._retention = Retention(self.blobs, self.project.model)
        self._unwritten: dict[str, Int64s] = {}
        """Rows that changed and that no checkpoint holds yet, by table."""
        self._leftovers: set[str] = set()
        """Parts that were stored since the last checkpoint."""
        self._swept = False
        self.unstored = False
        """True after a checkpoint that the store did not take: try again soon."""
        self._writer: threading.Thread | None = None
        self._threads = Background()

    def check(self) -> None:
        """Raise what the writing thread met and could not deal with; nothing where all is well."""
        self._threads.check()

    @property
    def is_busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._writer is not None and self._writer.is_alive()

    def holds(self, meta: Meta) -> bool:
        """Say whether the newest checkpoint is of this very place: then another would say nothing new."""
        if self.before is None:
            return False
        last = self.before.meta
        return msgspec.structs.replace(meta, created_ms=last.created_ms, event_ms=last.event_ms) == last

    def begin(self, moment: Moment) -> bool:
        """Begin a checkpoint of the learner as it is; False while one is still being written."""
        if self.is_busy:
            return False
        self.check()
        frozen = self._watch.freeze()
        if not self.background:
            self._write(frozen, moment)
            return True

        def write() -> None:
            with followed(self.moved):
                self._write(frozen, moment)

        self._writer = self._threads.thread("checkpoint", write)
        return True

    def close(self, timeout_s: float) -> None:
        """Wait for the checkpoint that is being written, at most `timeout_s`."""
        if self._writer is not None:
            self._writer.join(timeout_s)
        self.check()

    def _write(self, frozen: Frozen, moment: Moment) -> None:
        step = moment.meta.step
        for name, table in frozen.tables.items():
            changed_K = np.union1d(self._unwritten.get(name, np.empty(0, np.int64)), table.rows.changed())
            self._unwritten[name] = changed_K
        try:
            if not self._swept:
                self._retention.sweep()
                self._swept = True
            name = self._store(frozen, moment)
        except (Overloaded, Unavailable, OSError) as error:
            logger.warning("checkpoint at step %d was not written; learning goes on: %s", step, error)
            self.metrics.add("errors_total", kind="checkpoint")
            self.unstored = True
            return
        finally:
            frozen.close()
        self.unstored = False
        logger.info("checkpoint %s", name)
        try:
            leftovers, self._leftovers = self._leftovers, set()
            self._retention.retire(moment.meta.run, leftovers)
        except (Overloaded, Unavailable, OSError) as error:
            logger.warning("old checkpoints are still there; learning goes on: %s", error)
            self.metrics.add("errors_total", kind="checkpoints_kept")
        self.checkpointed(moment.meta.steps_offset)

    def _store(self, frozen: Frozen, moment: Moment) -> str:
        """Store all parts, then the manifest, and return the manifest's name."""
        meta = msgspec.structs.replace(moment.meta, event_ms=event_ms_of(frozen))
        seq = self.before.seq + 1 if self.before is not None else 1
        stored = {part.name for part in self.before.parts()} if self.before is not None else set[str]()

        def put(arrays: Arrays) -> Part:
            encoded = encode_part(meta.run, arrays)
            if encoded.part.name not in stored:
                self._put_part(encoded)
            moved()
            return encoded.part

        tables = {name: self._table(name, table, seq, put) for name, table in frozen.tables.items()}
        frozen.close()
        manifest = CheckpointManifest(
            seq=seq,
            meta=meta,
            learner=tuple(put(group) for group in grouped(frozen.rest)),
            evaluation=tuple(put(group) for group in grouped(moment.evaluation)),
            tables=tables,
            positions=moment.positions.to_json(),
            spec_json=msgspec.json.encode(self.project.features).decode(),
            recipe_json=msgspec.json.encode(self.project.recipe).decode(),
            made_by=self.made_by,
            metrics=moment.metrics,
        )
        name, data = encode_manifest(manifest)
        self.blobs.put(f"{folder_of(self.project.model)}/{name}", data)
        self.metrics.add("checkpoint_bytes_total", len(data))
        self.metrics.add("checkpoints_written_total")
        self.before = manifest
        self._unwritten.clear()
        return name

    def _table(self, name: str, table: FrozenTable, seq: int, put: Callable[[Arrays], Part]) -> TableParts:
        """Store what is new of a table. Pages are let go of as soon as they were copied."""
        rows, changed_K = table.rows, self._unwritten[name]
        before = self.before.tables.get(name) if self.before is not None else None
        plan = planned(before, changed_K, high=rows.high, page_rows=rows.page_rows)
        alone = [
            ChangedRows(put({"rows": rows_K.astype(np.int32)} | table.take(rows_K)), seq)
            for rows_K in _cut(plan.rows_K, rows.page_rows)
        ]
        rows.keep(plan.pages)
        pages = list(before.pages if before is not None and before.page_rows == rows.page_rows else ())
        pages += [Page(Part("", "", 0), 0, 0)] * (len(plan.sizes_P) - len(pages))
        for number in plan.pages:
            columns = table.page(number)
            rows.let_go(number)
            pages[number] = Page(put(columns), seq, int(plan.sizes_P[number]))
        pages = [msgspec.structs.replace(page, changed=number in plan.stale) for number, page in enumerate(pages)]
        oldest = min((page.seq for page in pages if page.changed), default=seq)
        earlier = [each for each in before.changed if each.seq > oldest] if before is not None else []
        return TableParts(rows.high, rows.page_rows, tuple(pages), (*earlier, *alone), plan.credit)

    def _put_part(self, encoded: Encoded) -> None:
        self._leftovers.add(encoded.part.name)
        self.blobs.put(f"{parts_of(self.project.model)}/{encoded.part.name}", encoded.pieces)
        self.metrics.add("checkpoint_bytes_total", encoded.part.bytes)


def event_ms_of(frozen: Frozen) -> int:
    """Return the newest event time that the tables know, to the end of its second; 0 where nothing was learnt."""
    newest_s = max(int(array[0]) for name, array in frozen.rest.items() if name.endswith(".clock.now_and_part"))
    return newest_s * 1_000 + 999 if newest_s else 0


def _cut(rows_K: Int64s, most: int) -> Iterable[Int64s]:
    return (rows_K[at : at + most] for at in range(0, len(rows_K), most))


def made_here(threads: int) -> MadeBy:
    """Return what makes bits in this process."""
    version = importlib.metadata.version
    features = sorted(name for name, has in binding.get_host_cpu_features().items() if has)
    return MadeBy(
        code=version("headrace"),
        torch=version("torch"),
        numba=version("numba"),
        numpy=version("numpy"),
        cpu=binding.get_host_cpu_name(),
        features=" ".join(features),
        threads=threads,
    )
