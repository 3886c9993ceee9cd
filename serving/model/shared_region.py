"""The model in shared memory: two copies that take turns, so that a request reads exactly one version.

The writer applies a delta to the idle copy, flips the active number, waits (bounded) until no reader is in the other
copy, and applies the delta there too. Each copy has a sequence number, odd while it is being written; a reader notes
it before and checks it after, and reads again when it moved. So even a reader that the writer did not wait for never
returns a mixture: the sequence number is the guarantee, the readers' words in the head only make reading again rare.

`load_snapshot` and `apply_delta` are the only writers. What may be written is decided before, by the gate
(`serving/gate/admit.py`) and by `check_fits`.

Memory order: the check needs the data's loads to lie between the two loads of the sequence, and the data's stores
between its two stores. `fence` separates them: two lock operations in a row, past which no access moves on any
platform that CPython supports (on x86-64 loads and stores keep their order anyway). The store of a reader's word and
its load of the sequence may change order; that is the reader that the writer does not wait for.

A reader that died within `read` leaves its word behind. The writer looks whether the process of a reader that it waits
for lives (by its id and its beginning, for ids are used again), and frees the word of one that does not.

Cost: two copies of rows and dense weights, every delta applied twice, 1 us a read, and a writer that waits for the
slowest reader of the copy that it left, at most `wait_s`; a reader that is slower still reads again.

Layout of the file (an mmap, in `/dev/shm` by default; `serving/model/region_file.py` makes it or takes it over): head
int64 [2048], what was refused, ring of recent versions, then for each copy: meta, dense float32, index int64 [2, C]
(key, row), keys int64 [R], values float32 [R, V]; `serving/model/row_table.py` has what happens in the last three.

Legend: C entries of the index, R rows at most, V values a row (linear, then embedding), K keys asked or changed.
"""

from __future__ import annotations

import math
import mmap
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.contract.errors import InvariantBroken, Overloaded, Unavailable
from headrace.contract.formats.snapshot import Manifest, Weights
from headrace.kernels.row_sums import RowSum
from headrace.serving.model.known import Known, decode_known, encode_known
from headrace.serving.model.process_times import began_at, boot_number
from headrace.serving.model.region_text import fence, put_text, text_in
from headrace.serving.model.row_table import Float32s, Int64s, apply, find, remove
from headrace.trainer.model.tables.table import initial_values

T = TypeVar("T")

READERS_MAX = 256
_ACTIVE, _SEQ, _ROWS, _META_SIZE, _RING_NEXT, _IS_FULL, _LAYOUT, _BOOT, _DIM, _ROWS_MAX = (
    0,
    1,
    3,
    5,
    7,
    8,
    9,
    10,
    11,
    12,
)
LAYOUT = 3
"""Raise it with every change of what lies where, so that no other version takes the region over."""
# Words of each reader: the copy that it is in (plus 1), its process, when that began; then how far its counters are.
_READERS, _PIDS, _BEGAN, _OFFSETS, _CURRENT_MS, _TOLD_MS = (16 + i * READERS_MAX for i in range(6))
_WORDS = 6
_HEAD = 2048
RING, RING_BYTES = 2048, 8192
NOTE_BYTES = 4096
META_BYTES = 1_048_576
DENSE_MAX = 4_194_304
"""Most dense weights: 16 MiB a copy."""
ASK_AGAIN_MAX = 1_000
_LOOK_S = 0.005
"""How often the writer looks whether a reader that it waits for lives. 5 ms: a request takes less."""
_NO_KEYS = np.empty(0, np.int64)


class Meta(msgspec.Struct, frozen=True):
    """What a copy says about the version that it holds."""

    manifest: Manifest
    """That of the snapshot or delta that made this version."""
    snapshot: str
    """The snapshot's version that this copy began with."""
    spec_json: str
    recipe_json: str
    shapes: dict[str, list[int]]
    applied_ms: int = 0
    next_delta: int = -1
    """Offset in `deltas` behind what made this version: where whoever takes the region over reads on. -1: unknown."""
    held: RowSum | None = None
    """Of the rows that this version has; None in regions of earlier releases."""
    dense_sha256: str = ""
    """Of its dense weights, likewise."""


class Told(NamedTuple):
    """How far the counters of one process are, as it said itself. Times are of the machine's monotonic clock."""

    worker: int
    offset: int
    """Of the next record of `features` that it reads."""
    current_ms: int
    """When it was known to have read all that there was."""
    told_ms: int


def region_bytes(dim: int, rows_max: int) -> int:
    """Return the size of the region. Pages take memory when they are first written."""
    sizes = [META_BYTES, DENSE_MAX * 4, _entries(rows_max) * 16, rows_max * 8, rows_max * (1 + dim) * 4]
    return _HEAD * 8 + NOTE_BYTES + RING * RING_BYTES + 2 * sum(-(-s // 4096) * 4096 for s in sizes)


def _entries(rows_max: int) -> int:
    return 1 << (2 * rows_max - 1).bit_length()


class SharedModel:
    """The region, opened by the writer (`create=True`) and by every reader. One writer; readers have numbers."""

    def __init__(self, path: Path, *, dim: int, rows_max: int, reader: int = 0, create: bool = False) -> None:
        if not 0 <= reader < READERS_MAX:
            raise Overloaded(f"reader {reader}: at most {READERS_MAX} processes read one model.")
        self.path, self.rows_max, self._reader = path, rows_max, reader
        entries, width, size = _entries(rows_max), 1 + dim, region_bytes(dim, rows_max)
        if create:
            path.unlink(missing_ok=True)
            with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.truncate(size)  # Sparse: only pages that are written take memory.
        with open(path, "r+b") as file:
            if os.fstat(file.fileno()).st_size != size:
                raise InvariantBroken(f"{path} has another size; the updater must make it anew: restart `serve`.")
            self._map = mmap.mmap(file.fileno(), size)
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        self._reserved_rows = -1
        raw = np.frombuffer(self._map, np.uint8)
        self._head = raw[: _HEAD * 8].view(np.int64)
        at = _HEAD * 8
        self._note = raw[at : at + NOTE_BYTES]
        at += NOTE_BYTES
        self._ring = raw[at : at + RING * RING_BYTES].reshape(RING, RING_BYTES)
        at += RING * RING_BYTES
        self._meta: list[npt.NDArray[np.uint8]] = []
        self._dense: list[Float32s] = []
        self._index: list[Int64s] = []
        self._keys: list[Int64s] = []
        self._values: list[Float32s] = []
        for _ in range(2):
            self._meta.append(raw[at : at + META_BYTES])
            at += META_BYTES
            self._dense.append(raw[at : at + DENSE_MAX * 4].view(np.float32))
            at += DENSE_MAX * 4
            self._index.append(raw[at : at + entries * 16].view(np.int64).reshape(2, entries))
            at += -(-entries * 16 // 4096) * 4096
            self._keys.append(raw[at : at + rows_max * 8].view(np.int64))
            at += -(-rows_max * 8 // 4096) * 4096
            self._values.append(raw[at : at + rows_max * width * 4].view(np.float32).reshape(rows_max, width))
            at += -(-rows_max * width * 4 // 4096) * 4096
        self._known: tuple[int, int, Meta] | None = None
        self._pid, self._identity = 0, (LAYOUT, boot_number(), dim, rows_max)
        self.lock = -1
        """The writer's lock on the file, see `serving/model/region_file.py`."""
        if create:
            self._head[_LAYOUT : _ROWS_MAX + 1] = self._identity

    # Reading.

    def read(self, use: Callable[[View], T]) -> tuple[T, Meta]:
        """Return `use(view)` and the meta of the one version that it saw. `use` may run again: it changes nothing.

        Raises `Unavailable` while no model was loaded, or when a version could not be held for long enough.
        """
        if self._pid != os.getpid():  # Opened here, or before a fork.
            self._name_reader()
        for _ in range(ASK_AGAIN_MAX):
            copy = int(self._head[_ACTIVE])
            self._head[_READERS + self._reader] = copy + 1
            try:
                before = int(self._head[_SEQ + copy])
                if before == 0:
                    raise Unavailable("no model is loaded yet; ask again when /readyz says so.")
                if before % 2 or int(self._head[_ACTIVE]) != copy:
                    continue
                fence()
                try:
                    meta = self._meta_of(copy, before)
                    result = use(View(self, copy, meta))
                except Exception:
                    # An error of `use` in a copy that is being written says nothing about the model.
                    if int(self._head[_SEQ + copy]) == before:
                        raise
                    continue
                fence()
                if int(self._head[_SEQ + copy]) == before:
                    return result, meta
            finally:
                self._head[_READERS + self._reader] = 0
        raise Unavailable(f"the model changed {ASK_AGAIN_MAX} times while one request read it.")

    def _name_reader(self) -> None:
        self._pid = os.getpid()
        self._head[_READERS + self._reader] = 0
        self._head[_BEGAN + self._reader] = began_at(self._pid)
        self._head[_PIDS + self._reader] = self._pid

    def _meta_of(self, copy: int, seq: int) -> Meta:
        if self._known is not None and self._known[:2] == (copy, seq):
            return self._known[2]
        size = int(self._head[_META_SIZE + copy])
        meta = msgspec.json.decode(self._meta[copy][:size].tobytes(), type=Meta)
        fence()
        if int(self._head[_SEQ + copy]) == seq:
            self._known = (copy, seq, meta)
        return meta

    def meta(self) -> Meta:
        """Return what the active copy says about its version."""
        return self.read(lambda view: None)[1]

    def known_by(self, version: str) -> Known | None:
        """Return what a recent version (one of the last 2,000 or so) contains, or None."""
        newest = int(self._head[_RING_NEXT])
        for number in range(newest, max(-1, newest - RING + 1), -1):
            # One more than the newest: a version that readers see already may not be counted yet.
            found = text_in(self._ring[number % RING])
            try:
                known = decode_known(found)
            except msgspec.DecodeError:
                continue
            fence()
            if known.version == version and int(self._head[_RING_NEXT]) < number + RING:
                return known
        return None

    def refused(self) -> str:
        """Return why the newest snapshot or delta was refused; empty when it was taken."""
        return text_in(self._note).decode(errors="replace")

    def tell(self, *, offset: int, current_ms: int, now_ms: int) -> None:
        """Tell all processes how far the counters of this one are: see `Told`."""
        if self._pid != os.getpid():
            self._name_reader()
        words = {_OFFSETS: offset, _CURRENT_MS: current_ms, _TOLD_MS: max(1, now_ms)}
        for word, value in words.items():
            self._head[word + self._reader] = value

    def told(self) -> list[Told]:
        """Return what each process told last, by its number."""
        tables = (self._head[word : word + READERS_MAX] for word in (_OFFSETS, _CURRENT_MS, _TOLD_MS))
        offsets, current, told = (table.copy() for table in tables)
        return [Told(int(i), int(offsets[i]), int(current[i]), int(told[i])) for i in np.flatnonzero(told)]

    @property
    def holds_model(self) -> bool:
        """True once a model was loaded or taken over."""
        return int(self._head[_SEQ + int(self._head[_ACTIVE])]) > 0

    @property
    def dim(self) -> int:
        """Return the widest `Recipe.row_dim` that the region has room for."""
        return int(self._values[0].shape[1]) - 1

    @property
    def is_full(self) -> bool:
        """True while what came last was refused because it does not fit."""
        return bool(self._head[_IS_FULL])

    @property
    def rows(self) -> int:
        """Return how many rows the active copy has."""
        return int(self._head[_ROWS + int(self._head[_ACTIVE])])

    # Writing: one process only.

    def held(self) -> Held:
        """Return the active copy, rows in use alone."""
        active, rows = int(self._head[_ACTIVE]), self.rows
        arrays = self._keys[active][:rows], self._values[active][:rows], self._dense[active].view(np.uint32)
        return Held(self._index[active], *arrays)

    def take_over(self, is_good: Callable[[Meta], bool]) -> bool:
        """Make this region, which an earlier writer left, whole again; False where it cannot be served."""
        active = int(self._head[_ACTIVE])
        if tuple(self._head[_LAYOUT : _ROWS_MAX + 1]) != self._identity or not boot_number() or active not in (0, 1):
            return False
        seq, rows, size = (int(self._head[word + active]) for word in (_SEQ, _ROWS, _META_SIZE))
        if seq <= 0 or seq % 2 or not 0 <= rows <= self.rows_max or not 0 < size <= META_BYTES:
            return False
        try:
            meta = msgspec.json.decode(self._meta[active][:size].tobytes(), type=Meta)
            if not is_good(meta):
                return False
        except msgspec.MsgspecError:
            return False
        self._head[_READERS : _READERS + _WORDS * READERS_MAX] = 0
        idle = 1 - active
        self._head[_SEQ + idle] |= 1  # A writer may have died while it wrote there.
        for word in (_ROWS, _META_SIZE):
            self._head[word + idle] = self._head[word + active]
        # No more than is in use: every page that is written takes memory.
        dense = sum(math.prod(shape) for shape in meta.shapes.values())
        for part, used in ((self._meta, size), (self._dense, dense), (self._keys, rows), (self._values, rows)):
            part[idle][:used] = part[active][:used]
        self._index[idle][:] = self._index[active]
        self._head[_SEQ + idle] += 1
        self.note_refusal("")
        return True

    def load_snapshot(self, weights: Weights, meta: Meta, *, wait_s: float = 1.0) -> None:
        """Put a whole model into both copies, in place of what they hold."""

        def load(copy: int) -> None:
            self._index[copy][0] = 0
            self._head[_ROWS + copy] = 0
            self._put(copy, weights, meta)

        self._write_both(load, meta, wait_s)

    def apply_delta(self, weights: Weights, meta: Meta, gone_K: Int64s = _NO_KEYS, *, wait_s: float = 1.0) -> None:
        """Apply a delta to both copies; `check_fits` has said that its rows fit. Rows of `gone_K` leave."""

        def put(copy: int) -> None:
            rows = int(self._head[_ROWS + copy])
            self._head[_ROWS + copy] = remove(
                self._index[copy], self._keys[copy], self._values[copy], rows, np.ascontiguousarray(gone_K)
            )
            self._put(copy, weights, meta)

        self._write_both(put, meta, wait_s)

    def note_refusal(self, why: str, *, is_full: bool = False) -> None:
        """Tell all processes why a snapshot or delta was refused; "" takes it back.

        `is_full` says that the region has no room: nothing is served anew until a person makes room.
        """
        put_text(self._note, why.encode()[: NOTE_BYTES - 8])
        self._head[_IS_FULL] = is_full

    def _write_both(self, write: Callable[[int], None], meta: Meta, wait_s: float) -> None:
        active = int(self._head[_ACTIVE])
        if (self._head[_SEQ : _SEQ + 2] % 2).any():
            raise InvariantBroken("a write of the model broke off half-way; restart `serve` to load it anew.")
        number = int(self._head[_RING_NEXT])
        put_text(self._ring[number % RING], encode_known(meta.manifest))
        self._write_copy(1 - active, write)
        self._head[_ACTIVE] = 1 - active
        self._head[_RING_NEXT] = number + 1
        self._await_readers(active, wait_s)
        self._write_copy(active, write)

    def _await_readers(self, copy: int, wait_s: float) -> None:
        """Wait until no living reader is in a copy, at most `wait_s`."""
        words = self._head[_READERS : _READERS + READERS_MAX]
        until, look_at = time.monotonic() + wait_s, time.monotonic() + _LOOK_S
        while (words == copy + 1).any() and time.monotonic() < until:
            if time.monotonic() >= look_at:
                for reader in np.flatnonzero(words == copy + 1):
                    pid, began = int(self._head[_PIDS + reader]), int(self._head[_BEGAN + reader])
                    if began_at(pid) != began:
                        words[reader] = 0
                look_at = time.monotonic() + _LOOK_S
            time.sleep(0.0002)

    def _write_copy(self, copy: int, write: Callable[[int], None]) -> None:
        """Write while the sequence number is odd. An exception leaves it odd: the copy is never used again."""
        self._head[_SEQ + copy] += 1
        fence()
        write(copy)
        fence()
        self._head[_SEQ + copy] += 1

    def check_fits(self, weights: Weights, meta: Meta, gone_K: Int64s = _NO_KEYS, *, fresh: bool) -> None:
        """Raise `Overloaded` when a model or delta does not fit; call before it is written.

        Raises `InvariantBroken` for rows that the gate never lets pass.
        """
        rows = 0 if fresh else self.rows
        new = len(weights.keys_K)
        shape, width = weights.values_KV.shape, self._values[0].shape[1]
        if shape[0] != new or shape[1] > width or (weights.keys_K == 0).any():
            raise InvariantBroken(
                f"{meta.manifest.version} has rows of shape {shape} for {new} keys, 0 must not be among them; the "
                f"region is {width} wide. The gate must refuse it: see `serving/gate/admit.py`."
            )
        if rows + new > self.rows_max and not fresh:
            new = int((self._rows_of(weights.keys_K) < 0).sum())
            rows -= int((self._rows_of(gone_K) >= 0).sum())
        positions = len(encode_known(meta.manifest))
        if positions > RING_BYTES - 8:
            raise Overloaded(f"positions of {positions} bytes do not fit into {RING_BYTES}.")
        if rows + new > self.rows_max:
            raise Overloaded(
                f"{rows + new} rows do not fit; serve.rows_max is {self.rows_max}: raise it and restart `serve`, or "
                "let the recipe expire rows sooner (Recipe.expire_after_ms)."
            )
        if sum(a.size for a in weights.dense.values()) > DENSE_MAX:
            raise Overloaded(f"more than {DENSE_MAX} dense weights do not fit.")
        if len(msgspec.json.encode(meta)) > META_BYTES:
            raise Overloaded(f"a feature spec of more than {META_BYTES} bytes does not fit.")
        self._reserve(min(self.rows_max, rows + new))

    def _reserve(self, rows: int) -> None:
        """Take the memory that `rows` rows need in both copies, or raise `Overloaded` and leave both as they are.

        A page that is first written when the filesystem is full ends the process with SIGBUS, and the next one too.
        """
        if rows <= self._reserved_rows:
            return
        parts: list[npt.NDArray[Any]] = [self._head, self._note, self._ring]
        for copy in range(2):
            parts += [self._meta[copy], self._dense[copy], self._index[copy]]
            parts += [self._keys[copy][:rows], self._values[copy][:rows]]
        origin = self._head.__array_interface__["data"][0]
        try:
            for part in parts:
                os.posix_fallocate(self._file, part.__array_interface__["data"][0] - origin, max(1, part.nbytes))
        except OSError as error:
            raise Overloaded(
                f"{self.path.parent} has no room for {rows} rows ({error.strerror}); make room: the next snapshot is "
                "tried again."
            ) from error
        self._reserved_rows = rows

    def _rows_of(self, keys_K: Int64s) -> Int64s:
        rows_K = np.empty(len(keys_K), np.int64)
        find(self._index[int(self._head[_ACTIVE])], keys_K, rows_K)
        return rows_K

    def _put(self, copy: int, weights: Weights, meta: Meta) -> None:
        at = 0
        for array in weights.dense.values():
            self._dense[copy][at : at + array.size] = array.reshape(-1)
            at += array.size
        rows = int(self._head[_ROWS + copy])
        keys_K, values_KV = np.ascontiguousarray(weights.keys_K), np.ascontiguousarray(weights.values_KV)
        rows = int(apply(self._index[copy], self._keys[copy], self._values[copy], rows, keys_K, values_KV))
        if rows < 0:
            raise InvariantBroken(f"{meta.manifest.version} does not fit; it was written without `check_fits`.")
        self._head[_ROWS + copy] = rows
        data = msgspec.json.encode(meta)
        self._meta[copy][: len(data)] = np.frombuffer(data, np.uint8)
        self._head[_META_SIZE + copy] = len(data)


class Held(NamedTuple):
    """What the active copy holds, as views. For the writer alone, between its writes."""

    index_2C: Int64s
    keys_R: Int64s
    values_RV: Float32s
    dense_N: npt.NDArray[np.uint32]
    """The bits of all dense weights that the copy has room for."""


class View:
    """One copy during one `read`; not to be kept."""

    def __init__(self, model: SharedModel, copy: int, meta: Meta) -> None:
        self.meta = meta
        self._index = model._index[copy]
        self._values = model._values[copy]
        self._flat = model._dense[copy]

    def lookup(self, keys_K: Int64s, *, seed: int, scale: float, dim: int | None = None) -> Float32s:
        """Return the values of keys, float32 [K, V]; a key that was never learnt has its initial values.

        `dim` is the model's, where it is narrower than the region's.
        """
        dim = self._values.shape[1] - 1 if dim is None else dim
        rows_K = np.empty(len(keys_K), np.int64)
        find(self._index, keys_K, rows_K)
        values_KV: Float32s = self._values[rows_K, : 1 + dim]
        missing_K = rows_K < 0
        if missing_K.any():
            values_KV[missing_K] = initial_values(keys_K[missing_K], dim=dim, seed=seed, scale=scale)
        return values_KV

    def dense(self) -> dict[str, Float32s]:
        """Return the dense weights by name, as views."""
        found: dict[str, Float32s] = {}
        at = 0
        for name, shape in self.meta.shapes.items():
            count = int(np.prod(shape, dtype=np.int64))
            found[name] = self._flat[at : at + count].reshape(shape)
            at += count
        return found
