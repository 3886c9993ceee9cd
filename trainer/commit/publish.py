"""Publication: full snapshots now and then, deltas several times a second, in one chain a snapshot.

Rules of the chain: a delta moves the model from `base` to `version`, and each delta's base is the version before it,
across snapshots too. A snapshot names the offset in `deltas` where the first delta with its version as base will lie.
Only committed steps are published. A snapshot is made and written by a thread of its own, from the model as it was
(`model.frozen`); while it is busy no other is begun, and when the store is away training and deltas go on. What else it
meets is raised in the training thread, by `check`, and ends the process.

What is sent is what changed of what serving holds (`served_rows`). Each delta and each snapshot names the digest of
what is then served: a delta's from the one before it, a snapshot's from all rows. Where a snapshot's is not what the
deltas led to, what they said was wrong: that is told, and the next snapshot begins a new chain.

What the snapshot holds that begins a chain is gathered by its thread, while learning goes on; deltas wait for that, and
not for its upload.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.contract.errors import Overloaded, Unavailable
from headrace.contract.formats.dense_change import change_of
from headrace.contract.formats.positions import Mixed, Positions
from headrace.contract.formats.snapshot import (
    FORMAT,
    Manifest,
    RowsAs,
    decode_manifest,
    encode_manifest,
    encode_weights,
)
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Producer, Reader, read_range
from headrace.contract.metrics import Metrics
from headrace.contract.project import Project
from headrace.process.background import Background
from headrace.process.moved import followed
from headrace.trainer.commit.served_rows import ServedRows, as_snapshot, digest_of
from headrace.trainer.model.digest import SUM, parts
from headrace.trainer.model.frozen import Frozen, Watch
from headrace.trainer.model.learner import TableLearner

logger = logging.getLogger("headrace.train")

WHOLE = Mixed()
"""What is told of a model that has no lake before it."""
# 262,144 rows of 9 floats and a key are 11 MB: a third of the largest record. More is a snapshot's business.
DELTA_ROWS_MAX = 262_144
SNAPSHOTS_KEPT = 3
"""How many snapshots of the run stay: a server that reads one is not overtaken."""
OTHER_RUNS_KEPT = 3
"""Of how many other runs the last snapshot that a manifest names stays."""


def version_of(run: str, step: int) -> str:
    """Return the text that every answer names: "<run>-<step>"."""
    return f"{run}-{step}"


@dataclass
class Publisher:
    """Publishes one run's model. Called by the training thread alone."""

    project: Project
    run: str
    topics: Topics
    producer: Producer
    blobs: Blobs
    metrics: Metrics
    clock: Clock
    deltas_end: Callable[[], int]
    """Returns the offset that the next record of `deltas` will get; called once."""
    background: bool = True
    """False writes snapshots before `snapshot` returns: for tests."""
    is_held: bool = False
    """True publishes nothing: a better model is served than this one is yet."""
    moved: Callable[[], None] = lambda: None
    """Is called, in the writing thread, whenever the upload goes on."""
    kept: frozenset[str] = frozenset()
    """Snapshots of other runs that stay: `named_blobs`."""
    rows: RowsAs = "float32"
    """How the values of rows travel."""

    def __post_init__(self) -> None:
        self._chain, self._base, self._seq = "", "", 0
        self._touched: list[npt.NDArray[np.int64]] = []
        self._served = ServedRows(self.project.recipe, self.rows)
        self._next_offset = -1
        self._failed = False
        self._is_wrong = False
        """What deltas led to was not what the snapshot held."""
        self._gathered: ServedRows | None = None
        """What the snapshot holds that began the chain, once its thread has it."""
        self._is_gathering = False
        self.unstored = False
        """True after a snapshot that the store or Kafka did not take: try again soon."""
        self._others: set[str] | None = None
        """Other runs' snapshots that were there when this trainer stored its first one."""
        self._watch: Watch | None = None
        self._writer: threading.Thread | None = None
        self._threads = Background()

    def check(self) -> None:
        """Raise what the writing thread met and could not deal with; nothing where all is well."""
        self._threads.check()

    def note(self, touched_K: npt.NDArray[np.int64]) -> None:
        """Remember the keys that a committed step changed."""
        if not self.is_held:
            self._touched.append(touched_K)

    @property
    def wants_snapshot(self) -> bool:
        """True before the first snapshot, and after a delta was lost; never while held."""
        return not self.is_held and (not self._chain or self._failed or self._is_wrong)

    def holds(self, step: int) -> bool:
        """Say whether the newest snapshot is of this very step: then another would say nothing new."""
        return not self.wants_snapshot and self._chain == version_of(self.run, step)

    @property
    def is_busy(self) -> bool:
        """True while a snapshot is being written."""
        return self._writer is not None and self._writer.is_alive()

    def delta(self, learner: TableLearner, positions: Positions, mixed: Mixed = WHOLE) -> bool:
        """Publish what changed since the last delta; False when that must wait for a snapshot or for Kafka."""
        version = version_of(self.run, learner.step)
        if version == self._base:
            return True
        if not self._has_gathered():
            return False
        keys_K = self._changed_keys()
        if self.wants_snapshot or len(keys_K) > DELTA_ROWS_MAX:
            self._failed = True
            return False
        change = self._served.change(learner.weights(keys_K))
        manifest = Manifest(
            kind="delta",
            format=FORMAT,
            rows=self.rows,
            served=change.served,
            model=self.project.model,
            run=self.run,
            step=learner.step,
            version=version,
            base=self._base,
            chain=self._chain,
            seq=self._seq + 1,
            positions=positions.to_json(),
            stored_left=mixed.stored_left,
            live=mixed.live,
            generation=positions.generation,
            spec=self.project.features.digest(),
            dim=self.project.recipe.row_dim,
            created_ms=self.clock.now_ms(),
        )
        data = encode_weights(change.weights, manifest, change.dense)
        try:
            self.producer.send(
                self.topics.deltas,
                0,
                data,
                key=self.project.model.encode(),
                headers={"version": version, "base": self._base, "chain": self._chain, "rows": self.rows},
                delivered=self._delivered,
            )
        except Overloaded as error:
            logger.warning("delta %s waits: %s", version, error)
            return False
        except Unavailable as error:
            # It may lie in the topic all the same: a second delta with its base would break the chain.
            self._delivered(error, -1)
            return False
        self._served.take(change)
        self._base, self._seq, self._touched = version, self._seq + 1, []
        self.metrics.add("deltas_published_total")
        self.metrics.add("published_bytes_total", len(data), kind="delta")
        return True

    def snapshot(self, learner: TableLearner, positions: Positions, mixed: Mixed = WHOLE) -> bool:
        """Begin a snapshot of the model as it is; False while held, while one is still being written, and when Kafka
        does not tell where the chain begins."""
        if self.is_busy or self.is_held or not self._has_gathered():
            return False
        if not self.wants_snapshot and not self.delta(learner, positions, mixed) and not self.wants_snapshot:
            return False
        try:
            if self.producer.flush(5.0):
                return False
            if self._next_offset < 0:
                self._next_offset = self.deltas_end()
        except Unavailable as error:
            logger.warning("snapshot waits: %s", error)
            return False
        version = version_of(self.run, learner.step)
        if self._watch is None:
            self._watch = Watch(learner, between=False)
        manifest = Manifest(
            kind="snapshot",
            format=FORMAT,
            rows=self.rows,
            model=self.project.model,
            run=self.run,
            step=learner.step,
            version=version,
            positions=positions.to_json(),
            stored_left=mixed.stored_left,
            live=mixed.live,
            generation=positions.generation,
            spec=self.project.features.digest(),
            spec_json=msgspec.json.encode(self.project.features).decode(),
            recipe_json=msgspec.json.encode(self.project.recipe).decode(),
            dim=self.project.recipe.row_dim,
            blob=f"snapshots/{self.project.model}/{self.run}-{learner.step:012d}",
            deltas_offset=self._next_offset,
            created_ms=self.clock.now_ms(),
        )
        if self._chain and not self._is_wrong:
            manifest = msgspec.structs.replace(manifest, served=self._absorb(learner))
        self._is_gathering, self._gathered, self._is_wrong = not manifest.served, None, False
        self._chain, self._base, self._seq, self._touched, self._failed = version, version, 0, [], False
        self.unstored = False
        self._start(self._write, manifest, self._watch.freeze())
        return True

    def _absorb(self, learner: TableLearner) -> str:
        """Let what is served be what a snapshot of the learner holds; return its digest, as deltas lead to it."""
        change = self._served.change(learner.weights(self._changed_keys()))
        self._served.take(change)
        return change.served

    def _has_gathered(self) -> bool:
        """Say whether it is known what the chain's first snapshot holds."""
        if self._is_gathering and self._gathered is not None:
            self._served, self._gathered, self._is_gathering = self._gathered, None, False
        return not self._is_gathering

    def _changed_keys(self) -> npt.NDArray[np.int64]:
        """Return the keys that were noted since the last delta, each once, ascending."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *self._touched]))

    def close(self, timeout_s: float) -> None:
        """Wait for the snapshot that is being written, at most `timeout_s`."""
        if self._writer is not None:
            self._writer.join(timeout_s)
        self.check()
        self.producer.flush(1.0)

    def _delivered(self, error: Exception | None, offset: int) -> None:
        if error is None:
            self._next_offset = offset + 1
            return
        logger.warning("a delta was not delivered, a snapshot begins a new chain: %s", error)
        self.metrics.add("errors_total", kind="delta")
        self._failed = True

    def _write(self, manifest: Manifest, frozen: Frozen) -> None:
        """1. The blob. 2. The manifest that announces it. 3. Old ones go. A failure leaves what came before."""
        try:
            weights, found = frozen.weights(), parts(frozen.state())
            frozen.close()
            dense, dense_N = change_of(weights.dense)
            snapshot = as_snapshot(weights, self.project.recipe, self.rows)
            if not manifest.served:
                gathered = ServedRows(self.project.recipe, self.rows)
                gathered.begin(snapshot, dense_N)
                self._gathered = gathered
            served = digest_of(snapshot, dense.sha256)
            if manifest.served and served != manifest.served:
                self._is_wrong = True
                text = "deltas led to digest %s and snapshot %s has %s: servers load the snapshot; please report it"
                logger.error(text, manifest.served, manifest.version, served)
                self.metrics.add("errors_total", kind="served_digest")
            told = {"digest": found.text, "digest_kind": SUM, "digest_parts": found.to_text(), "served": served}
            manifest = msgspec.structs.replace(manifest, **told)
            snapshot = msgspec.structs.replace(snapshot, gone_K=np.empty(0, np.int64))
            data = encode_weights(snapshot, manifest, dense)
            manifest = msgspec.structs.replace(manifest, sha256=hashlib.sha256(data).hexdigest())
            self.blobs.put(manifest.blob, data)
            self._announce(manifest)
            self.metrics.add("snapshots_published_total")
            self.metrics.add("published_bytes_total", len(data), kind="snapshot")
            logger.info("snapshot %s, %d rows", manifest.version, len(snapshot.keys_K))
        except (Overloaded, Unavailable, OSError) as error:
            logger.warning("snapshot %s was not published: %s", manifest.version, error)
            self.metrics.add("errors_total", kind="snapshot")
            self.unstored = True
            return
        try:
            self._delete_old(manifest)
        except (Overloaded, Unavailable, OSError) as error:
            logger.warning("old snapshots are still there; learning goes on: %s", error)
            self.metrics.add("errors_total", kind="snapshots_kept")

    def _delete_old(self, newest: Manifest) -> None:
        """Delete the run's snapshots of lower steps than the newest ones', and other runs' that no manifest names.

        What another trainer stored since this one began is that one's: it may go on where this one is to end.
        """
        stored = self.blobs.list(f"snapshots/{newest.model}")
        ours = {name: int(step) for name in stored if (step := _step_of(name, self.run)).isascii() and step.isdigit()}
        kept = {newest.blob, *self.kept, *sorted(ours, key=lambda name: ours[name])[-SNAPSHOTS_KEPT:]}
        if self._others is None:
            self._others = set(stored) - set(ours)
        for name in stored:
            if name not in kept and (name in ours or name in self._others):
                self.blobs.delete(name)

    def _start(self, write: Callable[..., None], *what: object) -> None:
        if not self.background:
            write(*what)
            return

        def followed_write() -> None:
            with followed(self.moved):
                write(*what)

        self._writer = self._threads.thread("snapshot", followed_write)

    def _announce(self, manifest: Manifest) -> None:
        receipts: list[Exception | None] = []
        self.producer.send(
            self.topics.model,
            0,
            encode_manifest(manifest),
            key=f"{manifest.model}/snapshot".encode(),
            headers={"kind": "snapshot", "version": manifest.version},
            delivered=lambda error, _: receipts.append(error),
        )
        self.producer.flush(10.0)
        if not receipts or receipts[0] is not None:
            raise Unavailable(f"the manifest of {manifest.version} got no receipt: {receipts}")


def _step_of(blob: str, run: str) -> str:
    """Return the step in a snapshot's name, "" where it is another run's."""
    found, _, step = blob.rpartition("/")[2].rpartition("-")
    return step if found == run else ""


def named_blobs(manifests: Sequence[Manifest], *, but: str) -> frozenset[str]:
    """Return the last snapshot of each run that was announced last, `OTHER_RUNS_KEPT` runs besides `but`.

    Args:
        manifests: in the order of the log.
    """
    last: dict[str, str] = {}
    for manifest in reversed(manifests):
        if manifest.run != but and len(last) < OTHER_RUNS_KEPT:
            last.setdefault(manifest.run, manifest.blob)
    return frozenset(last.values())


def read_manifests(reader: Reader, topics: Topics, model: str, metrics: Metrics | None = None) -> list[Manifest]:
    """Return the snapshot manifests of `model` that the topic still holds, oldest first. Raises as `read_range`.

    What is no manifest is counted in `metrics`, named in the log, and left out.
    """
    key, found = f"{model}/snapshot".encode(), list[Manifest]()
    for record in read_range(reader, topics.model):
        if record.key != key or record.value is None:
            continue
        try:
            found.append(decode_manifest(record.value))
        except msgspec.DecodeError as error:
            logger.error("record %d of %s is no manifest and is left out: %s", record.offset, record.topic, error)
            if metrics is not None:
                metrics.add("records_unreadable_total", topic="model", kind="foreign")
    return [m for m in found if m.kind == "snapshot" and m.digest]
