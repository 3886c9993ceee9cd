"""The updater: loads snapshots and applies deltas, so that the shared model is the newest version. One thread.

0. A model that was taken over from an earlier stage is served as it is: deltas are read on behind it, before any blob.
1. Read `model` to its end; load the blob of the newest manifest of this model.
2. Read `deltas` from the offset that the manifest names, and go on reading `model`. Apply each delta whose base is the
   version that is served, and leave out every other.
3. While deltas come, a newer snapshot is only noted: the deltas lead to its version and beyond. It is loaded when
   nothing is served, when it is of another run, when a delta with another base showed that the chain is broken, or when
   no delta comes.
4. What the gate refuses (`serving/gate/admit.py`) changes nothing: the version that is served stays until a good
   snapshot comes. Where it was refused because it does not fit, serving is not ready: a person must make room.
5. While Kafka or the store is away the served version stays, and reading goes on from where it was.
6. Any other exception ends the stage, and so does a call that stands still for `serve.stuck_ms` (`watch`); a big blob
   that is read piece by piece does not. The next stage takes over the region with the version that is served. A write
   that failed is never written on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from headrace.contract.errors import HeadraceError, InvariantBroken, Overloaded, Unavailable
from headrace.contract.formats.snapshot import Manifest, Weights, decode_manifest
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Reader, Record, read_range
from headrace.contract.metrics import Metrics
from headrace.contract.project import Project
from headrace.process.awake import Awake
from headrace.process.moved import followed
from headrace.serving.gate.admit import Refused, admit_delta, admit_snapshot
from headrace.serving.model.row_table import split_initial
from headrace.serving.model.scorer import recipe_of
from headrace.serving.model.shared_region import Meta, SharedModel

logger = logging.getLogger("headrace.serve")

_REFUSED_MAX = 64


@dataclass(kw_only=True)
class Updater:
    """Follows one model. `reader` belongs to this thread alone."""

    project: Project
    topics: Topics
    shared: SharedModel
    reader: Reader
    blobs: Blobs
    metrics: Metrics
    clock: Clock
    stop: threading.Event
    stuck_ms: int = 120_000
    """See `ServeConfig.stuck_ms`."""
    waits_for: str = field(default="the beginning", init=False)
    """What the call is for that is made now."""
    _awake: Awake = field(init=False)
    _turned_s: float = field(default=0.0, init=False)
    """When a call returned last, in time that the process was awake for."""
    _meta: Meta | None = field(default=None, init=False)
    _taken_s: float = field(default=0.0, init=False)
    """When it was taken, by the monotonic clock."""
    _newest: Manifest | None = field(default=None, init=False)
    _tried: str = field(default="", init=False)
    """The snapshot that was loaded or refused last."""
    _is_broken: bool = field(default=False, init=False)
    """A delta came whose base is not the served version, and which is newer."""
    _refused_chains: deque[str] = field(default_factory=lambda: deque(maxlen=_REFUSED_MAX), init=False)
    """The snapshots that were refused last: no delta of their chains is taken."""
    _begun: bool = field(default=False, init=False)
    _model_offset: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._awake = Awake(self.clock.monotonic)
        self._turned_s = self._awake.monotonic()

    def watch(self) -> None:
        """Check once that the updater's thread goes on; another thread calls it every second or so.

        Raises `Unavailable` when a call has not returned for longer than `stuck_ms`: end the stage.
        """
        waited_ms = round((self._awake.monotonic() - self._turned_s) * 1_000)
        if self._meta is not None:
            # Not by the wall clock alone: set back a day, it would hide for a day that no version comes.
            age_s = (self.clock.now_ms() - self._meta.manifest.created_ms) / 1000
            self.metrics.set("model_age_seconds", max(age_s, self.clock.monotonic() - self._taken_s))
        if waited_ms > self.stuck_ms:
            raise Unavailable(
                f"the updater has waited {waited_ms} ms for {self.waits_for}; serve.stuck_ms allows {self.stuck_ms}. "
                "The stage ends, and the next one takes its model over."
            )

    def _went_on(self) -> None:
        self._turned_s = self._awake.monotonic()

    def _begins(self, what: str) -> None:
        self.waits_for, self._turned_s = what, self._awake.monotonic()

    def run(self) -> None:
        """Follow until `stop`. Raises where serving must not go on, such as after a write that broke off."""
        is_away = False
        while not self.stop.is_set():
            try:
                self.step(0.2)
            except Unavailable as error:
                if not is_away:
                    logger.warning("the served version stays: %s", error)
                    self.metrics.add("errors_total", kind="updater")
                is_away = True
                self.stop.wait(0.5)
            else:
                if is_away:
                    logger.info("versions come again")
                is_away = False
        self.reader.close()

    def step(self, timeout_s: float) -> None:
        """Take what has come. Raises `Unavailable` while Kafka or the store is away: call again."""
        if not self._begun:
            self._begins(f"the beginning of {self.topics.model}")
            self._begin()
            self._begun = True
        self._begins(f"records of {self.topics.deltas}")
        try:
            records = self.reader.poll(200, timeout_s)
        except InvariantBroken as error:
            logger.warning("reading begins again: %s", error)
            self.metrics.add("gap_total", topic=self.topics.deltas)
            self._begun = False
            return
        self.take(records)

    def _begin(self) -> None:
        topic = self.topics.model
        ends = self.reader.end_offsets(topic)
        # 3 s: a stage that is asked to stop does so within 5 s. What is Unavailable is read again.
        for record in read_range(self.reader, topic, ends=ends, silent_s=3.0):
            self._note_manifest(record)
        self._model_offset = ends[0]
        if self._meta is None and self.shared.holds_model:
            self._meta, self._taken_s = self.shared.meta(), self.clock.monotonic()
            if self._reads_on(self._meta):
                return
        self._follow()

    def _reads_on(self, meta: Meta) -> bool:
        """Read deltas on behind a model that was taken over; False where they are gone."""
        deltas = self.topics.deltas
        if meta.manifest.generation != self.topics.generation or meta.next_delta < 0:
            return False
        if not self.reader.begin_offsets(deltas)[0] <= meta.next_delta <= self.reader.end_offsets(deltas)[0]:
            return False
        self.reader.assign({(self.topics.model, 0): self._model_offset, (deltas, 0): meta.next_delta})
        return True

    def _follow(self) -> None:
        """Load the newest snapshot where it leads further, and read deltas from where its chain begins."""
        deltas = self.topics.deltas
        self._load_snapshot()
        self._begun = False  # Until deltas are read from the new place: what fails on the way there is begun again.
        start = self.reader.end_offsets(deltas)[0] if self._newest is None else self._newest.deltas_offset
        start = max(start, self.reader.begin_offsets(deltas)[0])
        self.reader.assign({(self.topics.model, 0): self._model_offset, (deltas, 0): start})
        self._begun = True

    def take(self, records: Sequence[Record]) -> None:
        """Take records of `model` and `deltas`, in order."""
        for record in records:
            self._begins(f"record {record.offset} of {record.topic} to be taken")
            if record.topic == self.topics.model:
                self._model_offset = record.offset + 1
                self._note_manifest(record)
            else:
                self._apply_delta(record)
        served, newest = self._meta.manifest if self._meta else None, self._newest
        if newest is not None and newest.version != self._tried and self._leads_further(newest):
            why = "nothing is served" if served is None else "no delta comes" if not records else ""
            why = why or ("another run" if served and served.run != newest.run else "")
            why = why or ("the chain is broken" if self._is_broken else "")
            if why:
                logger.info("loading snapshot %s: %s", newest.version, why)
                self._follow()

    def _leads_further(self, newest: Manifest) -> bool:
        served = self._meta.manifest if self._meta is not None else None
        return served is None or served.run != newest.run or served.step < newest.step

    def _note_manifest(self, record: Record) -> None:
        if record.value is None or record.headers.get("kind", "snapshot") != "snapshot":
            return
        try:
            manifest = decode_manifest(record.value)
        except msgspec.MsgspecError as error:
            self._refuse(Refused("damaged", f"record {record.offset} of {record.topic} is no manifest: {error}"))
            return
        if manifest.model == self.project.name and manifest.kind == "snapshot":
            self._newest = manifest

    def _load_snapshot(self) -> None:
        manifest = self._newest
        if manifest is None or manifest.version == self._tried or not self._leads_further(manifest):
            return
        self._begins(f"blob {manifest.blob}")
        with followed(self._went_on):
            data = self.blobs.get(manifest.blob)  # While the store is away this raises, and is tried again.
        self._tried = manifest.version
        try:
            if data is None:
                raise Refused("no_blob", f"{manifest.blob} is not in the store.")
            weights, _ = split_initial(
                admit_snapshot(manifest, data, project=self.project), recipe_of(manifest.recipe_json)
            )
            begun = manifest.version, manifest.spec_json, manifest.recipe_json
            meta = self._meta_from(manifest, weights, *begun, next_delta=manifest.deltas_offset)
            self.shared.check_fits(weights, meta, fresh=True)
        except (Refused, Overloaded) as error:
            self._refuse(error)
            self._refused_chains.append(manifest.version)
            return
        self._swap(meta, lambda: self.shared.load_snapshot(weights, meta))
        self._is_broken = False
        logger.info("serving snapshot %s, %d rows", manifest.version, len(weights.keys_K))

    def _apply_delta(self, record: Record) -> None:
        served = self._meta
        if served is None or record.value is None or record.key != self.project.name.encode():
            return
        base = served.manifest.version
        wanted = record.headers.get("base", base)
        if wanted != base:
            self._is_broken |= _is_newer(record.headers.get("version", ""), served.manifest)
            return
        try:
            recipe = recipe_of(served.recipe_json)
            weights, manifest = admit_delta(
                record.value,
                model=self.project.name,
                served=served.manifest,
                dim=recipe.row_dim,
                shapes=served.shapes,
                refused=self._refused_chains,
            )
            # A delta has no digest: that of the snapshot which the chain began with stays.
            manifest = msgspec.structs.replace(manifest, digest=served.manifest.digest)
            begun = served.snapshot, served.spec_json, served.recipe_json
            meta = self._meta_from(manifest, weights, *begun, next_delta=record.offset + 1)
            kept, gone_K = split_initial(weights, recipe)
            self.shared.check_fits(kept, meta, gone_K, fresh=False)
        except (Refused, Overloaded) as error:
            self._refuse(error)
            self._is_broken = True
            return
        self._swap(meta, lambda: self.shared.apply_delta(kept, meta, gone_K))

    def _meta_from(
        self, manifest: Manifest, weights: Weights, snapshot: str, spec: str, recipe: str, *, next_delta: int
    ) -> Meta:
        slim = msgspec.structs.replace(manifest, spec_json="", recipe_json="")
        shapes = {name: list(a.shape) for name, a in weights.dense.items()}
        return Meta(slim, snapshot, spec, recipe, shapes, self.clock.now_ms(), next_delta)

    def _swap(self, meta: Meta, act: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            act()
        except Unavailable as error:  # Of a write: nobody knows how far it went, so nobody tries it again.
            raise InvariantBroken(f"writing {meta.manifest.version} failed; restart `serve`: {error}") from error
        self.metrics.observe("swap_seconds", time.perf_counter() - started)
        self.metrics.add("swaps_total")
        self.metrics.set("model_step", meta.manifest.step)
        self.metrics.set("table_rows", self.shared.rows)
        self._meta, self._taken_s = meta, self.clock.monotonic()
        self.shared.note_refusal("")

    def _refuse(self, error: HeadraceError) -> None:
        reason = error.reason if isinstance(error, Refused) else "does_not_fit"
        self.shared.note_refusal(f"{reason}: {error}", is_full=isinstance(error, Overloaded))
        self.metrics.add("errors_total", kind=reason)
        self.metrics.add("versions_refused_total", reason=reason)
        logger.error("refused, the served version stays: %s", error)


def _is_newer(version: str, served: Manifest) -> bool:
    run, _, step = version.rpartition("-")
    return run != served.run or (step.isascii() and step.isdigit() and int(step) > served.step)
