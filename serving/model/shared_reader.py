"""The shared model as its readers see it: each request reads exactly one version.

`serving/model/shared_region.py` has the protocol and the writer. What is here runs in every process that answers: it
reads, says how far its counters are, warms what is prepared, and goes over to a larger region.

Legend: V values a row (linear, then embedding), K keys asked.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from headrace.contract.errors import HeadraceError, InvariantBroken, Overloaded, Unavailable
from headrace.contract.formats.snapshot import Manifest
from headrace.kernels.row_sums import RowSum
from headrace.serving.model.known import Known, decode_known
from headrace.serving.model.region_layout import (
    _ACTIVE,
    _CURRENT_MS,
    _IS_FULL,
    _META_SIZE,
    _MOVED,
    _OFFSETS,
    _PIDS,
    _PREPARED,
    _READERS,
    _RING_NEXT,
    _ROWS,
    _SEQ,
    _TOLD_MS,
    _WARMED,
    READERS_MAX,
    RING,
    Region,
    room_in,
)
from headrace.serving.model.region_text import fence, text_in
from headrace.serving.model.row_table import Float32s, Int64s, find, touch
from headrace.trainer.model.tables.table import initial_values

T = TypeVar("T")

ASK_AGAIN_MAX = 1_000
RECENT_MAX = 8
"""Requests that are kept to warm the next model."""
WARM_EVERY_S = 0.05
"""How often a process looks whether something is to be warmed."""
LARGER = ".larger"
"""Ends the name of the file in which a larger region is filled."""
IN_A_LARGER_REGION = 1
"""The last bit of the number of what is prepared; without it, it lies in the idle copy."""


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


class SharedReader:
    """The region, opened by a process that answers. Readers have numbers."""

    def __init__(self, region: Region, path: Path, reader: int = 0) -> None:
        if not 0 <= reader < READERS_MAX:
            raise Overloaded(f"reader {reader}: at most {READERS_MAX} processes read one model.")
        self.path, self._reader, self._region = path, reader, region
        self._larger: Region | None = None
        self._going_over = threading.Lock()
        self._recent: deque[Callable[[View], Any]] = deque(maxlen=RECENT_MAX)
        self.lock = -1
        """The writer's lock on the file, see `serving/model/region_file.py`."""

    def become(self, reader: int) -> None:
        """Be another reader from here on: a worker that was just forked."""
        if not 0 <= reader < READERS_MAX:
            raise Overloaded(f"reader {reader}: at most {READERS_MAX} processes read one model.")
        self._reader = reader

    @property
    def dim(self) -> int:
        """Return the widest `Recipe.row_dim` that the region has room for."""
        return self._region.dim

    @property
    def rows_max(self) -> int:
        """Return how many rows a copy has room for."""
        return self._region.rows_max

    def read(self, use: Callable[[View], T], *, is_request: bool = False) -> tuple[T, Meta]:
        """Return `use(view)` and the meta of the one version that it saw. `use` may run again: it changes nothing.

        Args:
            is_request: keep it, to warm the next model with it.

        Raises `Unavailable` while no model was loaded, or when a version could not be held for long enough.
        """
        if is_request:
            self._recent.append(use)
        for _ in range(ASK_AGAIN_MAX):
            region = self._here()
            head = region.head
            copy = int(head[_ACTIVE])
            head[_READERS + self._reader] = copy + 1
            try:
                before = int(head[_SEQ + copy])
                if before == 0:
                    raise Unavailable("no model is loaded yet; ask again when /readyz says so.")
                if before % 2 or int(head[_ACTIVE]) != copy:
                    continue
                fence()
                try:
                    meta = self._meta_of(copy, before, region)
                    result = use(View(region, copy, meta))
                except Exception:
                    # An error of `use` in a copy that is being written says nothing about the model.
                    if int(head[_SEQ + copy]) == before:
                        raise
                    continue
                fence()
                if int(head[_SEQ + copy]) == before:
                    return result, meta
            finally:
                head[_READERS + self._reader] = 0
        raise Unavailable(f"the model changed {ASK_AGAIN_MAX} times while one request read it.")

    def _meta_of(self, copy: int, seq: int, region: Region | None = None) -> Meta:
        region = region or self._region
        known: tuple[int, Meta] | None = region.known[copy]
        if known is not None and known[0] == seq:
            return known[1]
        size = int(region.head[_META_SIZE + copy])
        meta = msgspec.json.decode(region.meta[copy][:size].tobytes(), type=Meta)
        fence()
        if int(region.head[_SEQ + copy]) == seq:
            region.known[copy] = (seq, meta)
        return meta

    def meta(self) -> Meta:
        """Return what the active copy says about its version."""
        return self.read(lambda view: None)[1]

    # Going over to a larger region, and warming.

    def _here(self) -> Region:
        """Return the region that is read now, and be one of its readers."""
        region = self._region
        if region.head[_MOVED]:
            region = self._go_over()
        if region.named != os.getpid():  # Opened here, or before a fork.
            region.name_reader(self._reader)
        return region

    def _go_over(self) -> Region:
        """Go over to the region that has the file's name now, where it holds a model; else stay."""
        with self._going_over:
            here = self._region
            with suppress(OSError, InvariantBroken):
                inode = os.stat(self.path).st_ino
                larger, room = self._larger, room_in(self.path)
                if inode == here.inode or room is None:
                    return here
                if larger is None or larger.inode != inode:
                    larger = Region(self.path, dim=room[0], rows_max=room[1])
                if int(larger.head[_SEQ + int(larger.head[_ACTIVE])]) > 0:
                    self._region, self._larger = larger, None
                    if self.lock >= 0:  # Inherited: a descriptor of the old file would keep its memory.
                        os.close(self.lock)
                        self.lock = -1
            return self._region

    def warm(self) -> None:
        """Score recent requests against the model that is prepared, and say so. A thread of each process calls it some
        twenty times a second."""
        region = self._here()
        head, me = region.head, self._reader
        if int(head[_PIDS + me]) != os.getpid():
            region.name_reader(me)  # Another writer has taken the region over.
        number = int(head[_PREPARED])
        if number and abs(int(head[_WARMED + me])) != number:
            is_good = self._warmed(region, number)
            head[_WARMED + me] = number if is_good else -number
        elif not number:
            self._larger = None
            head[_WARMED + me] = 1
            with suppress(OSError):
                if os.stat(self.path).st_ino != region.inode:
                    self._go_over()  # Its writer died before it could say so, or began anew.

    def _warmed(self, region: Region, number: int) -> bool:
        """Return whether recent requests can be scored; True where it is not there any more."""
        copy = 1 - int(region.head[_ACTIVE])
        if number & IN_A_LARGER_REGION:
            file = self.path.with_name(self.path.name + LARGER)
            room = room_in(file)
            if room is None:
                return True
            with suppress(OSError, InvariantBroken):
                self._larger = region = Region(file, dim=room[0], rows_max=room[1])
                copy = int(region.head[_ACTIVE])
        before = int(region.head[_SEQ + copy])
        if before == 0 or before % 2:
            return True
        fence()
        try:
            meta = self._meta_of(copy, before, region)
            rows = int(region.head[_ROWS + copy])
            for part in (region.index[copy], region.keys[copy][:rows], region.values[copy][:rows]):
                touch(part.reshape(-1).view(np.uint8))
            for use in tuple(self._recent):
                with suppress(HeadraceError):  # Such as counters that are not read yet.
                    use(View(region, copy, meta))
        except Exception:
            return int(region.head[_SEQ + copy]) != before
        return True

    def known_by(self, version: str) -> Known | None:
        """Return what a recent version (one of the last 2,000 or so) contains, or None."""
        newest = int(self._region.head[_RING_NEXT])
        for number in range(newest, max(-1, newest - RING + 1), -1):
            # One more than the newest: a version that readers see already may not be counted yet.
            found = text_in(self._region.ring[number % RING])
            try:
                known = decode_known(found)
            except msgspec.DecodeError:
                continue
            fence()
            if known.version == version and int(self._region.head[_RING_NEXT]) < number + RING:
                return known
        return None

    def refused(self) -> str:
        """Return why the newest snapshot or delta was refused; empty when it was taken."""
        return text_in(self._region.note).decode(errors="replace")

    def tell(self, *, offset: int, current_ms: int, now_ms: int) -> None:
        """Tell all processes how far the counters of this one are: see `Told`."""
        head = self._here().head
        words = {_OFFSETS: offset, _CURRENT_MS: current_ms, _TOLD_MS: max(1, now_ms)}
        for word, value in words.items():
            head[word + self._reader] = value

    def told(self) -> list[Told]:
        """Return what each process told last, by its number."""
        tables = (self._region.head[word : word + READERS_MAX] for word in (_OFFSETS, _CURRENT_MS, _TOLD_MS))
        offsets, current, told = (table.copy() for table in tables)
        return [Told(int(i), int(offsets[i]), int(current[i]), int(told[i])) for i in np.flatnonzero(told)]

    @property
    def holds_model(self) -> bool:
        """True once a model was loaded or taken over."""
        return int(self._region.head[_SEQ + int(self._region.head[_ACTIVE])]) > 0

    @property
    def is_full(self) -> bool:
        """True while what came last was refused because it does not fit."""
        return bool(self._region.head[_IS_FULL])

    @property
    def rows(self) -> int:
        """Return how many rows the active copy has."""
        return int(self._region.head[_ROWS + int(self._region.head[_ACTIVE])])


class View:
    """One copy during one `read`; not to be kept."""

    def __init__(self, region: Region, copy: int, meta: Meta) -> None:
        self.meta = meta
        self._index = region.index[copy]
        self._values = region.values[copy]
        self._flat = region.dense[copy]

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
            count = math.prod(shape)
            found[name] = self._flat[at : at + count].reshape(shape)
            at += count
        return found
