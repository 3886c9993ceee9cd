"""The updater: keeps the shared model at the newest version. One thread of one process.

1. Read the newest manifest of this model in `model`; load its blob when nothing is served, or the chain broke.
2. Read `deltas` from the offset that the manifest names; apply each delta whose base is the version that is served.
3. A delta whose base is another one: skip it when it is older than what is served, else wait for the next snapshot.
4. What the gate refuses changes nothing: the version that is served stays until a good snapshot comes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from headrace.contract.blobs import Blobs
from headrace.contract.clock import Clock
from headrace.contract.errors import HeadraceError, Overloaded
from headrace.contract.log import Reader, Record
from headrace.contract.metrics import Metrics
from headrace.contract.snapshot import Manifest, Weights, decode_manifest
from headrace.contract.topics import Topics
from headrace.serving.gate import Refused, admit_delta, admit_snapshot
from headrace.serving.shared_model import Meta, SharedModel

logger = logging.getLogger("headrace.serve")


@dataclass
class Updater:
    """Follows one model. `reader` is this thread's own."""

    model_name: str
    dim: int
    topics: Topics
    shared: SharedModel
    reader: Reader
    blobs: Blobs
    metrics: Metrics
    clock: Clock
    stop: threading.Event
    refused: str = ""
    """Why the newest snapshot or delta was refused; empty when none was since the last one that was taken."""
    _meta: Meta | None = field(default=None, init=False)
    _newest: Manifest | None = field(default=None, init=False)
    _tried: str = field(default="", init=False)
    _model_offset: int = field(default=0, init=False)

    def run(self) -> None:
        """Follow until `stop`; what is served stays while Kafka or the store is away."""
        begun = False
        while not self.stop.is_set():
            try:
                if not begun:
                    self._begin()
                    begun = True
                self.step(0.2)
            except HeadraceError as error:
                logger.warning("the model stays as it is: %s", error)
                self.metrics.add("errors_total", reason="updater")
                begun = False
                self.stop.wait(1.0)
        self.reader.close()

    def _begin(self) -> None:
        """Read `model` to its end, then load and follow."""
        topic = self.topics.model
        begin, end = self.reader.begin_offsets(topic)[0], self.reader.end_offsets(topic)[0]
        self.reader.assign({(topic, 0): begin})
        at, until = begin, self.clock.monotonic() + 5.0
        while at < end and self.clock.monotonic() < until:
            for record in self.reader.poll(100, 0.1):
                self._note(record)
                at = record.offset + 1
        self._follow(end)

    def _follow(self, model_offset: int) -> None:
        deltas = self.topics.deltas
        start = self.reader.end_offsets(deltas)[0] if self._newest is None else self._newest.deltas_offset
        start = max(start, self.reader.begin_offsets(deltas)[0])
        self._load_newest()
        self.reader.assign({(self.topics.model, 0): model_offset, (deltas, 0): start})
        self._model_offset = model_offset

    def step(self, timeout_s: float) -> None:
        """Take what has come: manifests and deltas."""
        records = self.reader.poll(200, timeout_s)
        self.take(records)

    def take(self, records: Sequence[Record]) -> None:
        """Take records of `model` and `deltas`, in order."""
        for record in records:
            if record.topic == self.topics.model:
                self._model_offset = record.offset + 1
                self._note(record)
                if self._meta is None and self._newest is not None:
                    self._follow(self._model_offset)
                    return
            else:
                self._delta(record)
        if self._meta is not None:
            self.metrics.set("model_age_seconds", (self.clock.now_ms() - self._meta.manifest.created_ms) / 1000)
            # Behind the newest snapshot's run or step, and no delta leads there: the chain broke.
            newest = self._newest
            if newest is not None and self._is_behind(newest) and newest.version != self._tried and not records:
                logger.warning("no delta leads from %s to %s: loading it", self._meta.manifest.version, newest.version)
                self._follow(self._model_offset)

    def _is_behind(self, newest: Manifest) -> bool:
        served = self._meta.manifest if self._meta is not None else None
        return served is None or served.run != newest.run or served.step < newest.step

    def _note(self, record: Record) -> None:
        if record.value is None or record.headers.get("kind", "snapshot") != "snapshot":
            return
        manifest = decode_manifest(record.value)
        if manifest.model == self.model_name and manifest.kind == "snapshot":
            self._newest = manifest

    def _load_newest(self) -> None:
        manifest = self._newest
        if manifest is None or manifest.version == self._tried or not self._is_behind(manifest):
            return
        data = self.blobs.get(manifest.blob)
        self._tried = manifest.version
        try:
            if data is None:
                raise Refused("no_blob", f"{manifest.blob} is not in the store.")
            weights = admit_snapshot(manifest, data, dim=self.dim)
            meta = self._meta_from(manifest, weights, manifest.version, manifest.spec_json, manifest.recipe_json)
            self.shared.check(weights, meta, fresh=True)
        except (Refused, Overloaded) as error:
            self._refuse(error)
            return
        self._swap(meta, lambda: self.shared.replace(weights, meta))
        logger.info("serving snapshot %s, %d rows", manifest.version, len(weights.keys_K))

    def _delta(self, record: Record) -> None:
        if self._meta is None or record.value is None or (record.key or b"").decode() != self.model_name:
            return
        base = self._meta.manifest.version
        told = record.headers.get("base")
        if told is not None and told != base:
            return  # Older than what is served, or of a chain that the next snapshot begins.
        try:
            weights, manifest = admit_delta(record.value, base=base, dim=self.dim)
            before = self._meta
            meta = self._meta_from(manifest, weights, before.snapshot, before.spec_json, before.recipe_json)
            self.shared.check(weights, meta, fresh=False)
        except (Refused, Overloaded) as error:
            self._refuse(error)
            return
        self._swap(meta, lambda: self.shared.apply(weights, meta))

    def _meta_from(self, manifest: Manifest, weights: Weights, snapshot: str, spec: str, recipe: str) -> Meta:
        slim = msgspec.structs.replace(manifest, spec_json="", recipe_json="")
        shapes = {name: list(a.shape) for name, a in weights.dense.items()}
        return Meta(slim, snapshot, spec, recipe, shapes, self.clock.now_ms())

    def _swap(self, meta: Meta, act: Callable[[], None]) -> None:
        started = time.perf_counter()
        act()
        self.metrics.observe("swap_seconds", time.perf_counter() - started)
        self.metrics.add("swaps_total")
        self.metrics.set("model_step", meta.manifest.step)
        self._meta, self.refused = meta, ""

    def _refuse(self, error: HeadraceError) -> None:
        reason = error.reason if isinstance(error, Refused) else "does_not_fit"
        self.refused = f"{reason}: {error}"
        self.metrics.add("errors_total", reason=reason)
        logger.error("refused, the served version stays: %s", error)
