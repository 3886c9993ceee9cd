"""The updater: loads snapshots and applies deltas, so that the shared model is the newest version. One thread.

0. A model that was taken over from an earlier stage is served as it is: deltas are read on behind it, before any blob.
1. Read `model` to its end: the last decision says which of the project's models is to be served, without one it is that
   under the project's own name. Load the blob of that model's newest manifest.
2. Read the model's deltas from the offset that the manifest names, and go on reading `model`. Apply each delta whose
   base is the version that is served, and leave out every other.
3. While deltas come, a newer snapshot is only noted: the deltas lead to its version and beyond. It is loaded when
   nothing is served, when it is of another run, such as that of a variant which was promoted, when a delta with another
   base showed that the chain is broken, or when no delta comes.
4. What the gate refuses (`serving/gate/admit.py`) changes nothing: the version that is served stays until a good
   snapshot comes. Where it was refused because it does not fit, serving is not ready: a person must make room.
5. Each version's digest is computed from what lies in shared memory and compared with the trainer's: before a delta is
   applied, once a snapshot is loaded, when a later snapshot of a version that deltas led to is announced, and when a
   region is taken over. Where they differ, `replica_digest_wrong_total` counts it, the chain is refused, and the next
   snapshot is loaded, even where it leads back.
6. A decision in `model` says that somebody has gone back from a run. What that run had beyond the step where it was
   left is taken no more: no delta, no snapshot that is announced later, and none that a late server finds. What is
   served of it stays until the run that goes on in its place announces its first snapshot.
7. While Kafka or the store is away the served version stays, and reading goes on from where it was.
8. Any other exception ends the stage, and so does a call that stands still for `serve.stuck_ms` (`watch`); a big blob
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
from functools import partial

import msgspec

from headrace.contract.errors import HeadraceError, InvariantBroken, Overloaded, Unavailable
from headrace.contract.formats.decision import KIND as DECISION
from headrace.contract.formats.decision import Decision, decode_decision
from headrace.contract.formats.dense_change import bits_of, sha256_of
from headrace.contract.formats.snapshot import Manifest, Weights, decode_manifest
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Reader, Record, read_range
from headrace.contract.metrics import Metrics
from headrace.contract.project import Project
from headrace.kernels.row_sums import RowSum, row_sum
from headrace.process.awake import Awake
from headrace.process.moved import followed
from headrace.serving.gate.admit import Refused, admit_delta, admit_snapshot, check_served
from headrace.serving.model.refusals import Refusals
from headrace.serving.model.row_table import split_initial
from headrace.serving.model.scorer import recipe_of
from headrace.serving.model.served_sum import dense_bits, dense_sha256, sum_after, sum_held
from headrace.serving.model.shared_reader import Meta
from headrace.serving.model.shared_region import Held, SharedModel

logger = logging.getLogger("headrace.serve")

_REFUSED_MAX = 64
_RECENT_MAX = 4_096
"""Versions whose digest is kept until a snapshot of one of them is announced: 13 minutes of five a second."""


@dataclass(kw_only=True)
class Updater:
    """Follows one project's model, the decided one. `reader` belongs to this thread alone."""

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
    _decided: str = field(default="", init=False)
    """The model that is to be served; "" is that under the project's own name."""
    _announced: dict[str, Manifest] = field(default_factory=dict, init=False)
    """The newest manifest of each of the project's models."""
    _tried: str = field(default="", init=False)
    """The snapshot that was loaded or refused last."""
    _is_broken: bool = field(default=False, init=False)
    """A delta came whose base is not the served version, and which is newer."""
    _refused_chains: deque[str] = field(default_factory=lambda: deque(maxlen=_REFUSED_MAX), init=False)
    """The snapshots that were refused last: no delta of their chains is taken."""
    _is_wrong: bool = field(default=False, init=False)
    """What is served is not what the trainer says: any snapshot is better."""
    _recent: dict[tuple[str, str], str] = field(default_factory=dict, init=False)
    """Digests of versions that were served, by version and how rows travelled, oldest first."""
    _refusals: Refusals = field(init=False)
    _begun: bool = field(default=False, init=False)
    _model_offset: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._refusals = Refusals()
        self._awake = Awake(self.clock.monotonic)
        self._turned_s = self._awake.monotonic()

    @property
    def _newest(self) -> Manifest | None:
        return self._announced.get(self._decided or self.project.name)

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
            self._note(record)
        self._model_offset = ends[0]
        if self._meta is None and self.shared.holds_model:
            meta = self.shared.meta()
            self._take_up(meta)
            if not self._is_wrong and self._reads_on(meta):
                return
        self._follow()

    def _take_up(self, meta: Meta) -> None:
        """Go on from the version in a region that was taken over."""
        self._meta, self._taken_s = meta, self.clock.monotonic()
        self._check_memory(meta)

    def _check_memory(self, meta: Meta) -> None:
        """Sum all that lies in shared memory anew, and compare it with what the trainer and the last sum say."""
        held, recipe = self.shared.held(), recipe_of(meta.recipe_json)
        found, dense = sum_held(held, width=1 + recipe.row_dim), dense_sha256(held, meta.shapes)
        self._meta = msgspec.structs.replace(meta, held=found, dense_sha256=dense)
        try:
            if meta.held is not None and (meta.held, meta.dense_sha256) != (found, dense):
                text = f"{meta.manifest.version} had rows {meta.held.text} when it was written; {found.text} lie there"
                raise Refused("digest", f"{text}: memory of this replica went wrong. The next snapshot is loaded.")
            self._remember(meta.manifest, check_served(meta.manifest, found.text, dense))
        except Refused as error:
            self._refuse(error)
            self._went_wrong(meta.manifest)

    def _reads_on(self, meta: Meta) -> bool:
        """Read deltas on behind a model that was taken over; False where they are gone."""
        deltas = self.topics.of(meta.manifest.model).deltas
        if meta.manifest.generation != self.topics.generation or meta.next_delta < 0:
            return False
        if not self.reader.begin_offsets(deltas)[0] <= meta.next_delta <= self.reader.end_offsets(deltas)[0]:
            return False
        self.reader.assign({(self.topics.model, 0): self._model_offset, (deltas, 0): meta.next_delta})
        return True

    def _follow(self) -> None:
        """Load the newest snapshot where it leads further, and read deltas from where its chain begins.

        Where the decided model has none that can be served, the deltas of the served one are read on.
        """
        self._load_snapshot()
        self._begun = False  # Until deltas are read from the new place: what fails on the way there is begun again.
        newest, model, start = self._newest, self._decided or self.project.name, -1
        if self._meta is not None and self._meta.manifest.model != model:
            model, start = self._meta.manifest.model, self._meta.next_delta
        elif newest is not None:
            start = newest.deltas_offset
        deltas = self.topics.of(model).deltas
        start = start if start >= 0 else self.reader.end_offsets(deltas)[0]
        start = max(start, self.reader.begin_offsets(deltas)[0])
        self.reader.assign({(self.topics.model, 0): self._model_offset, (deltas, 0): start})
        self._begun = True

    def take(self, records: Sequence[Record]) -> None:
        """Take records of `model` and `deltas`, in order."""
        for record in records:
            self._begins(f"record {record.offset} of {record.topic} to be taken")
            if record.topic == self.topics.model:
                self._model_offset = record.offset + 1
                self._note(record)
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
        if served is None or served.run != newest.run or served.step < newest.step:
            return True
        return self._is_wrong or (served.step == newest.step and served.rows != newest.rows)

    def _note(self, record: Record) -> None:
        """Take a record of `model`: a manifest, a decision, or what is neither."""
        if record.value is None:
            return
        kind = record.headers.get("kind", "snapshot")
        try:
            if kind == "snapshot":
                self._note_manifest(decode_manifest(record.value))
            elif kind == DECISION:
                self._note_decision(decode_decision(record.value))
        except msgspec.MsgspecError as error:
            what = "manifest" if kind == "snapshot" else kind
            self._refuse(Refused("damaged", f"record {record.offset} of {record.topic} is no {what}: {error}"))

    def _note_manifest(self, manifest: Manifest) -> None:
        if manifest.model.partition(".")[0] == self.project.name and manifest.kind == "snapshot":
            if self._refusals.refuses(manifest.run, manifest.step):
                logger.info("snapshot %s is of a run that was left, and is not loaded", manifest.version)
                return
            self._announced[manifest.model] = manifest
            self._compare(manifest)

    def _note_decision(self, decision: Decision) -> None:
        if decision.model != self.project.name:
            return
        if decision.what == "rollback":
            self._refusals.note(decision)
            refuses = self._refusals.refuses
            self._announced = {m: each for m, each in self._announced.items() if not refuses(each.run, each.step)}
            return
        decided = msgspec.structs.replace(self.project, variant=decision.variant).model
        if decided != (self._decided or self.project.name):
            logger.info("model %s is to be served: %s (%s)", decided, decision.reason or "promoted", decision.by)
        self._decided = decided

    def _compare(self, manifest: Manifest) -> None:
        """Compare the digest of a snapshot with that of the same version as deltas led to it here."""
        found = self._recent.get((manifest.version, manifest.rows))
        if found is not None and manifest.served not in ("", found):
            text = f"{manifest.version} was served with digest {found}, and its snapshot has {manifest.served}."
            self._refuse(Refused("digest", f"{text} The snapshot is loaded."))
            self._went_wrong(self._meta.manifest if self._meta is not None else manifest)
        elif found is not None and self._meta is not None:
            self._check_memory(self._meta)

    def _remember(self, manifest: Manifest, digest: str) -> None:
        self._recent[manifest.version, manifest.rows] = digest
        while len(self._recent) > _RECENT_MAX:
            del self._recent[next(iter(self._recent))]

    def _went_wrong(self, manifest: Manifest) -> None:
        """Take nothing more of this chain: what it leads to is not what the trainer has."""
        self._refused_chains.append(manifest.chain or manifest.version)
        self._recent.clear()
        self._is_broken = self._is_wrong = True

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
            weights = admit_snapshot(manifest, data, project=self.project)
            if manifest.format == 1:
                weights = split_initial(weights, recipe_of(manifest.recipe_json))
            sums = row_sum(weights.keys_K, weights.values_KV), sha256_of(bits_of(weights.dense))
            digest = check_served(manifest, sums[0].text, sums[1])
            begun = manifest.version, manifest.spec_json, manifest.recipe_json
            meta = self._meta_from(manifest, weights, *begun, sums, next_delta=manifest.deltas_offset)
            self.shared.check_fits(weights, meta, fresh=True)
        except (Refused, Overloaded) as error:
            self._refuse(error)
            self._refused_chains.append(manifest.version)
            return
        check = partial(self._check_prepared, meta)
        try:
            self._swap(meta, lambda: self.shared.load_snapshot(weights, meta, check=check), digest)
        except Refused as error:
            self._refuse(error)
            self._refused_chains.append(manifest.version)
            return
        self._is_broken = self._is_wrong = False
        if manifest.version in self._refused_chains:  # Of a replica that went wrong: from here on it may be right.
            self._refused_chains.remove(manifest.version)
        logger.info("serving snapshot %s, %d rows", manifest.version, len(weights.keys_K))

    def _check_prepared(self, meta: Meta, held: Held, failed: list[int]) -> None:
        """Raise `Refused` where what lies in the idle copy is not what came, or where it cannot be scored."""
        version = meta.manifest.version
        if failed:
            said = ", ".join(map(str, failed))
            raise Refused("not_scored", f"{version} cannot score recent requests in processes {said}: see their log.")
        found = sum_held(held, width=1 + recipe_of(meta.recipe_json).row_dim), dense_sha256(held, meta.shapes)
        if found != (meta.held, meta.dense_sha256):
            raise Refused("digest", f"{version} was written and reads as rows {found[0].text}: this memory is wrong.")

    def _apply_delta(self, record: Record) -> None:
        served = self._meta
        if served is None or record.value is None or record.key != served.manifest.model.encode():
            return
        if self._is_wrong:
            return
        base = served.manifest.version
        wanted, rows = record.headers.get("base", base), served.manifest.rows
        if wanted != base or record.headers.get("rows", rows) != rows:
            self._is_broken |= _is_newer(record.headers.get("version", ""), served.manifest)
            return
        try:
            recipe, held = recipe_of(served.recipe_json), self.shared.held()
            weights, manifest, dense = admit_delta(
                record.value,
                model=served.manifest.model,
                served=served.manifest,
                dim=recipe.row_dim,
                shapes=served.shapes,
                refused=self._refused_chains,
                dense_N=dense_bits(held, served.shapes),
            )
            if self._refusals.refuses(manifest.run, manifest.step):
                return
            if manifest.format == 1:
                weights = split_initial(weights, recipe)
            sums = sum_after(served.held or RowSum(), held, weights), dense
            digest = check_served(manifest, sums[0].text, dense)
            # A delta has no digest of the whole model: that of the snapshot which the chain began with stays.
            manifest = msgspec.structs.replace(manifest, digest=served.manifest.digest)
            begun = served.snapshot, served.spec_json, served.recipe_json
            meta = self._meta_from(manifest, weights, *begun, sums, next_delta=record.offset + 1)
            self.shared.check_fits(weights, meta, weights.gone_K, fresh=False)
        except (Refused, Overloaded) as error:
            self._refuse(error)
            self._is_broken = True
            if isinstance(error, Refused) and error.reason == "digest":
                self._went_wrong(served.manifest)
            return
        self._swap(meta, lambda: self.shared.apply_delta(weights, meta, weights.gone_K), digest)

    def _meta_from(
        self,
        manifest: Manifest,
        weights: Weights,
        snapshot: str,
        spec: str,
        recipe: str,
        sums: tuple[RowSum, str],
        *,
        next_delta: int,
    ) -> Meta:
        slim = msgspec.structs.replace(manifest, spec_json="", recipe_json="", digest_parts={})
        shapes = {name: list(a.shape) for name, a in weights.dense.items()}
        return Meta(slim, snapshot, spec, recipe, shapes, self.clock.now_ms(), next_delta, *sums)

    def _swap(self, meta: Meta, act: Callable[[], None], digest: str) -> None:
        started = time.perf_counter()
        try:
            act()
        except Unavailable as error:  # Of a write: nobody knows how far it went, so nobody tries it again.
            raise InvariantBroken(f"writing {meta.manifest.version} failed; restart `serve`: {error}") from error
        self.metrics.observe("swap_seconds", time.perf_counter() - started)
        if meta.manifest.kind == "delta":
            waited_ms = max(0, self.clock.now_ms() - meta.manifest.created_ms)
            self.metrics.observe("hop_served_seconds", waited_ms / 1_000)
        self.metrics.add("swaps_total")
        self.metrics.set("model_step", meta.manifest.step)
        self.metrics.set("table_rows", self.shared.rows)
        self._meta, self._taken_s = meta, self.clock.monotonic()
        self._remember(meta.manifest, digest)
        self.shared.note_refusal("")

    def _refuse(self, error: HeadraceError) -> None:
        reason = error.reason if isinstance(error, Refused) else "does_not_fit"
        self.shared.note_refusal(f"{reason}: {error}", is_full=isinstance(error, Overloaded))
        self.metrics.add("errors_total", kind=reason)
        self.metrics.add("versions_refused_total", reason=reason)
        if reason == "digest":
            self.metrics.add("replica_digest_wrong_total")
        logger.error("refused, the served version stays: %s", error)


def _is_newer(version: str, served: Manifest) -> bool:
    run, _, step = version.rpartition("-")
    return run != served.run or (step.isascii() and step.isdigit() and int(step) > served.step)
