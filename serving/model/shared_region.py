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

A model that outgrows the region moves to a larger one (`serving/model/growth.py`): the head of the old one then says
that there is another, and each reader goes over before its next read. What reads the old one ends there, for nothing is
written to it any more; its memory is freed when the last process has gone over. `serving/model/region_layout.py` has
what lies where, `serving/model/row_table.py` what happens among rows, and `serving/model/region_file.py` the name.

Before a whole model is switched to it is warmed (`warm`, `_prepare`): each process scores its recent requests against
it once, so that its pages are mapped and the codes of its features and recipe are made, and says so.

Legend: R rows at most, V values a row (linear, then embedding), K keys asked or changed.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.contract.errors import HeadraceError, InvariantBroken, Overloaded
from headrace.contract.formats.snapshot import Weights
from headrace.serving.model.growth import Room, fill_larger, locked, rows_for, take_name
from headrace.serving.model.known import encode_known
from headrace.serving.model.process_times import began_at, boot_number
from headrace.serving.model.region_layout import (
    _ACTIVE,
    _BEGAN,
    _IS_FULL,
    _LAYOUT,
    _META_SIZE,
    _MOVED,
    _PIDS,
    _PREPARED,
    _READERS,
    _RING_NEXT,
    _ROWS,
    _ROWS_MAX,
    _SEQ,
    _WARMED,
    _WORDS,
    DENSE_MAX,
    LAYOUT,
    META_BYTES,
    NOTE_BYTES,
    READERS_MAX,
    RING,
    RING_BYTES,
    Region,
    room_in,
)
from headrace.serving.model.region_layout import region_bytes as region_bytes
from headrace.serving.model.region_text import fence, put_text
from headrace.serving.model.row_table import Float32s, Int64s, apply, find, remove
from headrace.serving.model.shared_reader import IN_A_LARGER_REGION, LARGER, Meta, SharedReader
from headrace.serving.model.shared_reader import Told as Told
from headrace.serving.model.shared_reader import View as View

logger = logging.getLogger("headrace.serve")

_LOOK_S = 0.005
"""How often the writer looks whether a reader that it waits for lives. 5 ms: a request takes less."""
_WARM_S = 2.0
"""Longest wait until each process has warmed a model."""
_NO_KEYS = np.empty(0, np.int64)


class Held(NamedTuple):
    """What a copy holds, as views. For the writer alone, between its writes."""

    index_2C: Int64s
    keys_R: Int64s
    values_RV: Float32s
    dense_N: npt.NDArray[np.uint32]
    """The bits of all dense weights that the copy has room for."""


def _who_looks(region: Region) -> list[int]:
    """Return the living readers that look whether something is to be warmed; others are not waited for."""
    pids, began, warmed = (region.head[word : word + READERS_MAX] for word in (_PIDS, _BEGAN, _WARMED))
    return [int(r) for r in np.flatnonzero(warmed) if began_at(int(pids[r])) == began[r]]


def _takes_all(held: Held, failed: list[int]) -> None:
    """The check that lets every model pass."""


class SharedModel(SharedReader):
    """The region, opened by the writer (`create=True`) and by every reader. One writer; readers have numbers."""

    def __init__(
        self,
        path: Path,
        *,
        dim: int,
        rows_max: int,
        reader: int = 0,
        create: bool = False,
        room: Room | None = None,
    ) -> None:
        """Open the region, or make one.

        Args:
            dim: with `create`, the widest `Recipe.row_dim` that there is room for; without, what the file says counts.
            rows_max: likewise the rows of a copy.
            room: what it may grow to; None: it does not grow.
        """
        if create:
            region = Region.create(path, dim=dim, rows_max=rows_max)
        else:
            region = Region(path, **dict(zip(("dim", "rows_max"), room_in(path) or (dim, rows_max), strict=True)))
        super().__init__(region, path, reader)
        self.room = room

    # Writing: one process only.

    def held(self) -> Held:
        """Return the active copy, rows in use alone."""
        return self._held_in(int(self._region.head[_ACTIVE]))

    def _held_in(self, copy: int) -> Held:
        region, rows = self._region, int(self._region.head[_ROWS + copy])
        arrays = region.keys[copy][:rows], region.values[copy][:rows], region.dense[copy].view(np.uint32)
        return Held(region.index[copy], *arrays)

    def take_over(self, is_good: Callable[[Meta], bool]) -> bool:
        """Make this region, which an earlier writer left, whole again; False where it cannot be served."""
        head = self._region.head
        active = int(head[_ACTIVE])
        mine = LAYOUT, boot_number(), self.dim, self.rows_max
        if tuple(head[_LAYOUT : _ROWS_MAX + 1]) != mine or not boot_number() or active not in (0, 1):
            return False
        seq, rows, size = (int(head[word + active]) for word in (_SEQ, _ROWS, _META_SIZE))
        if seq <= 0 or seq % 2 or not 0 <= rows <= self.rows_max or not 0 < size <= META_BYTES:
            return False
        try:
            meta = msgspec.json.decode(self._region.meta[active][:size].tobytes(), type=Meta)
            if not is_good(meta):
                return False
        except msgspec.MsgspecError:
            return False
        head[_READERS : _READERS + _WORDS * READERS_MAX] = 0
        head[_MOVED] = head[_PREPARED] = 0
        self._level(1 - active)  # A writer may have died while it wrote there.
        self.note_refusal("")
        return True

    def _level(self, copy: int) -> None:
        """Make a copy what the other one is."""
        region, other = self._region, 1 - copy
        region.head[_SEQ + copy] |= 1
        fence()
        self._copy_over(copy, other)
        fence()
        region.head[_SEQ + copy] += 1

    def _copy_over(self, copy: int, other: int) -> None:
        region = self._region
        for word in (_ROWS, _META_SIZE):
            region.head[word + copy] = region.head[word + other]
        rows, size = int(region.head[_ROWS + other]), int(region.head[_META_SIZE + other])
        shapes = msgspec.json.decode(region.meta[other][:size].tobytes(), type=Meta).shapes
        # No more than is in use: every page that is written takes memory.
        dense = sum(math.prod(shape) for shape in shapes.values())
        region.meta[copy][:size] = region.meta[other][:size]
        region.dense[copy][:dense] = region.dense[other][:dense]
        region.keys[copy][:rows] = region.keys[other][:rows]
        region.values[copy][:rows] = region.values[other][:rows]
        region.index[copy][:] = region.index[other]

    def load_snapshot(
        self,
        weights: Weights,
        meta: Meta,
        *,
        wait_s: float = 1.0,
        check: Callable[[Held, list[int]], None] = _takes_all,
    ) -> None:
        """Put a whole model into both copies, in place of what they hold.

        Args:
            check: gets what lies in the idle copy, before it is switched to, and the readers that cannot score recent
                requests with it. Where it raises, the served version stays, in both copies.
        """

        def load(copy: int) -> None:
            self._region.index[copy][0] = 0
            self._region.head[_ROWS + copy] = 0
            self._put(copy, weights, meta)

        def prepared(copy: int) -> None:
            failed = self._prepare()
            check(self._held_in(copy), failed)

        self._write_both(load, meta, wait_s, lambda copy: self._copy_over(copy, 1 - copy), prepared)

    def apply_delta(self, weights: Weights, meta: Meta, gone_K: Int64s = _NO_KEYS, *, wait_s: float = 1.0) -> None:
        """Apply a delta to both copies; `check_fits` has said that its rows fit. Rows of `gone_K` leave."""
        gone_K = np.ascontiguousarray(gone_K)

        def put(copy: int) -> None:
            region, rows = self._region, int(self._region.head[_ROWS + copy])
            rows = remove(region.index[copy], region.keys[copy], region.values[copy], rows, gone_K)
            region.head[_ROWS + copy] = rows
            self._put(copy, weights, meta)

        self._write_both(put, meta, wait_s, put)

    def note_refusal(self, why: str, *, is_full: bool = False) -> None:
        """Tell all processes why a snapshot or delta was refused; "" takes it back.

        `is_full` says that the region has no room: nothing is served anew until a person makes room.
        """
        put_text(self._region.note, why.encode()[: NOTE_BYTES - 8])
        self._region.head[_IS_FULL] = is_full

    def _write_both(
        self,
        write: Callable[[int], None],
        meta: Meta,
        wait_s: float,
        write_again: Callable[[int], None],
        prepared: Callable[[int], None] = lambda copy: None,
    ) -> None:
        head = self._region.head
        active = int(head[_ACTIVE])
        if (head[_SEQ : _SEQ + 2] % 2).any():
            raise InvariantBroken("a write of the model broke off half-way; restart `serve` to load it anew.")
        number = int(head[_RING_NEXT])
        self._write_copy(1 - active, write)
        try:
            prepared(1 - active)
        except HeadraceError:
            if head[_SEQ + active] > 0:
                self._level(1 - active)
            raise
        told = encode_known(meta.manifest)
        put_text(self._region.ring[number % RING], told)
        head[_ACTIVE] = 1 - active
        head[_RING_NEXT] = number + 1
        self._await_readers(active, wait_s)
        self._write_copy(active, write_again)

    def _prepare(self, kind: int = 0, wait_s: float = _WARM_S) -> list[int]:
        """Wait until each process has warmed what is prepared, at most `wait_s`; return the readers that failed."""
        head = self._region.head
        pids, began, warmed = (head[word : word + READERS_MAX] for word in (_PIDS, _BEGAN, _WARMED))
        waits = _who_looks(self._region)
        if not waits:
            return []
        number = (time.monotonic_ns() | IN_A_LARGER_REGION) ^ (IN_A_LARGER_REGION ^ kind)
        head[_PREPARED] = number
        until, look_at = time.monotonic() + wait_s, time.monotonic() + 0.1
        while any(abs(int(warmed[r])) != number for r in waits) and time.monotonic() < until:
            if time.monotonic() >= look_at:
                waits = [r for r in waits if began_at(int(pids[r])) == began[r]]
                look_at = time.monotonic() + 0.1
            time.sleep(0.005)
        failed = [int(r) for r in waits if warmed[r] == -number]
        head[_PREPARED] = 0
        return failed

    def _await_readers(self, copy: int, wait_s: float) -> None:
        """Wait until no living reader is in a copy, at most `wait_s`."""
        words = self._region.head[_READERS : _READERS + READERS_MAX]
        until, look_at = time.monotonic() + wait_s, time.monotonic() + _LOOK_S
        while (words == copy + 1).any() and time.monotonic() < until:
            if time.monotonic() >= look_at:
                for reader in np.flatnonzero(words == copy + 1):
                    pid, began = int(self._region.head[_PIDS + reader]), int(self._region.head[_BEGAN + reader])
                    if began_at(pid) != began:
                        words[reader] = 0
                look_at = time.monotonic() + _LOOK_S
            time.sleep(0.0002)

    def _write_copy(self, copy: int, write: Callable[[int], None]) -> None:
        """Write while the sequence number is odd. An exception leaves it odd: the copy is never used again."""
        self._region.head[_SEQ + copy] += 1
        fence()
        write(copy)
        fence()
        self._region.head[_SEQ + copy] += 1

    def check_fits(self, weights: Weights, meta: Meta, gone_K: Int64s = _NO_KEYS, *, fresh: bool) -> None:
        """Raise `Overloaded` when a model or delta does not fit; call before it is written. The region grows for it
        where it may.

        Raises `InvariantBroken` for rows that the gate never lets pass.
        """
        rows = 0 if fresh else self.rows
        new = len(weights.keys_K)
        shape, width = weights.values_KV.shape, 1 + self.dim
        if shape[0] != new or (weights.keys_K == 0).any():
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
        if shape[1] > width and self.room is None:
            raise Overloaded(f"rows of {shape[1]} values do not fit; there is room for {width}: restart `serve`.")
        if rows + new > self.rows_max and self.room is None:
            raise Overloaded(
                f"{rows + new} rows do not fit; serve.rows_max is {self.rows_max}: raise it and restart `serve`, or "
                "let the recipe expire rows sooner (Recipe.expire_after_ms)."
            )
        if sum(a.size for a in weights.dense.values()) > DENSE_MAX:
            raise Overloaded(f"more than {DENSE_MAX} dense weights do not fit.")
        if len(msgspec.json.encode(meta)) > META_BYTES:
            raise Overloaded(f"a feature spec of more than {META_BYTES} bytes does not fit.")
        if self.room is not None and (shape[1] > width or rows + new > self.rows_max):
            why = f"{meta.manifest.version} has {rows + new:,} rows of {shape[1]} values, and there is room for "
            self._grow(max(shape[1], width) - 1, rows + new, self.room, f"{why}{self.rows_max:,} of {width}")
        self._region.reserve(min(self.rows_max, rows + new), self.path.parent)

    def _grow(self, dim: int, rows: int, room: Room, why: str) -> None:
        """Go over to a larger region with all processes: steps 1 to 5 of `serving/model/growth.py`."""
        old, aside, rows_max = self._region, self.path.with_name(self.path.name + LARGER), rows_for(rows, self.rows_max)
        larger = fill_larger(old, aside, dim=dim, rows_max=rows_max, rows=max(rows, self.rows), room=room, why=why)
        lock = locked(aside)
        self._prepare(IN_A_LARGER_REGION)
        with self._going_over:
            take_name(aside, self.path)
            self._region = larger
            old.head[_MOVED] = 1
            if self.lock >= 0:
                os.close(self.lock)
            self.lock = lock
        # Without a model nobody goes over before one is loaded.
        until = time.monotonic() + (_WARM_S if self.holds_model else 0.0)
        while any(larger.head[_WARMED + r] == 0 for r in _who_looks(old)) and time.monotonic() < until:
            time.sleep(0.005)
        logger.info("the region has room for %d rows of %d values now", rows_max, 1 + dim)

    def _rows_of(self, keys_K: Int64s) -> Int64s:
        rows_K = np.empty(len(keys_K), np.int64)
        find(self._region.index[int(self._region.head[_ACTIVE])], keys_K, rows_K)
        return rows_K

    def _put(self, copy: int, weights: Weights, meta: Meta) -> None:
        at = 0
        for array in weights.dense.values():
            self._region.dense[copy][at : at + array.size] = array.reshape(-1)
            at += array.size
        region, rows = self._region, int(self._region.head[_ROWS + copy])
        keys_K, values_KV = np.ascontiguousarray(weights.keys_K), np.ascontiguousarray(weights.values_KV)
        rows = int(apply(region.index[copy], region.keys[copy], region.values[copy], rows, keys_K, values_KV))
        if rows < 0:
            raise InvariantBroken(f"{meta.manifest.version} does not fit; it was written without `check_fits`.")
        self._region.head[_ROWS + copy] = rows
        data = msgspec.json.encode(meta)
        self._region.meta[copy][: len(data)] = np.frombuffer(data, np.uint8)
        self._region.head[_META_SIZE + copy] = len(data)
