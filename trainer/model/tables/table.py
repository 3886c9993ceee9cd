"""Collisionless tables: every 64-bit slot id has a row of its own, admitted, learnt and expired by event time.

A row is one record of a `RowIndex`: key (8 bytes), last use (4), a linear weight and an embedding (4 each), and the
optimizer's numbers (4 each): 56 bytes at dimension 8 with row-wise Adagrad, and 6.4 to 12.8 for the index. A new
row's values follow from its key and the seed alone, so the order in which keys arrive does not matter. Kernels are
single-threaded and add in a fixed order: equal batches give equal bits.

A key that was not used for `expire_after_ms` is as if it had never been seen. It is found out when it is asked for,
or by the sweep, which goes through 1/4,096 of the keys a step: no step stalls, and what is learnt does not depend on
how far the sweep is. Time is the newest event time so far, in seconds.

Axes: B samples of a batch, F slots of a sample, K keys, N = B * F, R rows of the table, W words of a record,
V = 1 + dim values of a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import numba
import numpy as np
import numpy.typing as npt

from headrace.contract.errors import ConfigRejected
from headrace.contract.spec import PAD
from headrace.kernels.hashes import mix
from headrace.trainer.model.tables.admission import Admission, counter_for
from headrace.trainer.model.tables.columns import NO_ROWS, AllStoredRows, Column, Columns, live
from headrace.trainer.model.tables.optimizers import Optimizer
from headrace.trainer.model.tables.row_index import (
    EXPIRED,
    HEADER_WORDS,
    LAST_USE,
    MISSING,
    SWEEPS,
    Float32s,
    Int32s,
    RowIndex,
)
from headrace.trainer.model.tables.row_index import Int64s as Int64s

State = dict[str, npt.NDArray[np.generic]]

_PAD = np.int64(PAD)
_SECONDS_MAX = 2**32 - 1
_UNIT = np.float64(1.0 / 9007199254740992.0)


@numba.njit(cache=True)
def _fill_one(out_V: Float32s, key: np.int64, mixed_seed: np.uint64, scale: np.float32) -> None:
    out_V[0] = np.float32(0.0)
    state = mix(np.uint64(key) ^ mixed_seed)
    for j in range(1, out_V.shape[0]):
        state = mix(state)
        out_V[j] = np.float32((2.0 * (np.float64(state >> np.uint64(11)) * _UNIT) - 1.0) * scale)


@numba.njit(cache=True)
def _fill_initial(values_KV: Float32s, keys_K: Int64s, seed: np.uint64, scale: np.float32) -> None:
    mixed_seed = mix(seed)
    for i in range(keys_K.shape[0]):
        if keys_K[i] == _PAD:
            values_KV[i, :] = np.float32(0.0)
        else:
            _fill_one(values_KV[i], keys_K[i], mixed_seed, scale)


@numba.njit(cache=True)
def _fill_rows(
    words_RW: Int32s,
    floats_RW: Float32s,
    keys_RX: Int64s,
    fresh_K: Int64s,
    width: int,
    now_s: int,
    seed: np.uint64,
    scale: np.float32,
) -> None:
    mixed_seed = mix(seed)
    for i in range(fresh_K.shape[0]):
        row = fresh_K[i]
        words_RW[row, LAST_USE] = np.int32(np.uint32(now_s))
        _fill_one(floats_RW[row, HEADER_WORDS : HEADER_WORDS + width], keys_RX[row, 0], mixed_seed, scale)


@numba.njit(cache=True)
def _gather(
    floats_RW: Float32s, rows_N: Int64s, keys_N: Int64s, out_NV: Float32s, seed: np.uint64, scale: np.float32
) -> None:
    """Copy values of rows; where there is no row, the key's initial ones, or zeros without keys."""
    mixed_seed, width, has_keys = mix(seed), out_NV.shape[1], keys_N.shape[0] > 0
    for i in range(rows_N.shape[0]):
        row = rows_N[i]
        if row >= 0:
            for j in range(width):
                out_NV[i, j] = floats_RW[row, HEADER_WORDS + j]
        elif has_keys and keys_N[i] != _PAD:
            _fill_one(out_NV[i], keys_N[i], mixed_seed, scale)
        else:
            for j in range(width):
                out_NV[i, j] = np.float32(0.0)


def initial_values(keys_K: Int64s, *, dim: int, seed: int, scale: float) -> Float32s:
    """Return what a row that was never learnt holds: float32 [K, 1 + dim], a function of key and seed alone.

    The linear weight is 0; the embedding is uniform in +-`scale`. `PAD` is all zeros. Serving uses it for keys that a
    snapshot lacks. Less `dim` gives the first values of more.
    """
    values_KV = np.empty((len(keys_K), 1 + dim), np.float32)
    _fill_initial(values_KV, np.ascontiguousarray(keys_K), np.uint64(seed), np.float32(scale))
    return values_KV


class KeyIndex:
    """Maps int64 keys to rows 0, 1, 2 ... in order of first insertion."""

    def __init__(self) -> None:
        self._rows = RowIndex(words=0)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def keys_R(self) -> Int64s:
        """The keys in order of first insertion, a view."""
        return self._rows.keys_R

    def find(self, keys_K: Int64s) -> Int64s:
        """Return the row of each key, -1 where it has none."""
        return self._rows.find(keys_K)

    def insert(self, keys_K: Int64s) -> Int64s:
        """Return the row of each key; a key that has none gets the next one, `PAD` gets -1."""
        return self._rows.insert(keys_K)[0]


class Table:
    """The rows of slots of one width and optimizer. Not thread-safe."""

    def __init__(
        self,
        *,
        dim: int,
        seed: int,
        scale: float,
        optimizer: Optimizer | None = None,
        admission: Admission | None = None,
        expire_after_ms: int = 0,
    ) -> None:
        """Make an empty one.

        Args:
            dim: width of the embedding; 0 for linear weights alone.
            scale: a new embedding's numbers lie in +-scale.
            optimizer: row-wise Adagrad by default.
            admission: at the first sighting by default.
            expire_after_ms: event time after which an unused key is forgotten, at least 1 s; 0 for never.
        """
        if expire_after_ms and expire_after_ms < 1_000:
            raise ConfigRejected(f"expire_after_ms is {expire_after_ms}; last uses are kept in seconds: 0, or >= 1000.")
        self.dim, self.seed, self.scale = dim, seed, scale
        self.optimizer = optimizer or Optimizer()
        self.admission = admission or Admission()
        self.expire_s = expire_after_ms // 1_000
        self.now_s = self._part = 0
        self._states = self.optimizer.state_words(1 + dim)
        self.columns = Columns((Column("values", np.float32, 1 + dim), Column("optimizer", np.float32, self._states)))
        self._forgotten: list[Int64s] = []
        self._clear()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def bytes_per_row(self) -> int:
        """Bytes that a row needs by itself: key, last use, values, the optimizer's numbers."""
        return 4 * (HEADER_WORDS + 1 + self.dim + self._states)

    @property
    def nbytes(self) -> int:
        """Bytes in use: rows, their index, and what admission counts in."""
        return self.index.nbytes + self._counter.nbytes

    @property
    def values_RV(self) -> Float32s:
        """The values of all rows, a view; those of free rows mean nothing."""
        return self.index.floats_RW[: self.index.high, HEADER_WORDS : HEADER_WORDS + 1 + self.dim]

    @property
    def states_RS(self) -> Float32s:
        """The optimizer's numbers of all rows, a view."""
        first = HEADER_WORDS + 1 + self.dim
        return self.index.floats_RW[: self.index.high, first : first + self._states]

    @property
    def last_s_R(self) -> npt.NDArray[np.uint32]:
        """When each row was last used, in seconds of event time, a view."""
        return self.index.arrays.words_RW[: self.index.high, LAST_USE].view(np.uint32)

    def rows_for(self, keys_BF: Int64s, event_time_ms_B: Int64s | None = None) -> Int64s:
        """Return the row of each key, making those that are due: int64, shaped as the keys.

        -1 stands for `PAD` and for a key that is not admitted yet. Event times move the table's time on; a key that
        had expired begins anew. Rows hold until the next `rows_for` or `expire`.
        """
        self._advance(event_time_ms_B)
        keys_N = np.ascontiguousarray(keys_BF).reshape(-1)
        oldest = self._oldest()
        rows_N = self.index.find(keys_N, oldest=oldest)
        missing_K = np.flatnonzero(rows_N < 0)
        missing_K = missing_K[keys_N[missing_K] != PAD]
        if len(missing_K):
            keys_K = keys_N[missing_K]
            expired_K = keys_K[rows_N[missing_K] == EXPIRED]
            if len(expired_K):
                expired_K = np.unique(expired_K)
                self.index.remove(expired_K)
                self._forgotten.append(expired_K)
            admitted_K = self._counter.admit(keys_K, now_s=self.now_s, oldest=oldest)
            rows_N[missing_K] = MISSING
            rows_N[missing_K[admitted_K]] = self._insert(keys_K[admitted_K])
        return rows_N.reshape(keys_BF.shape)

    def gather(self, rows_BF: Int64s, keys_BF: Int64s | None = None) -> Float32s:
        """Return a copy of the rows' values: float32 [B, F, V].

        Row -1 has the initial values of its key (`PAD`: zeros), or zeros where no keys are given.
        """
        keys_N = np.empty(0, np.int64) if keys_BF is None else np.ascontiguousarray(keys_BF).reshape(-1)
        return self._values(rows_BF.reshape(-1), keys_N).reshape(*rows_BF.shape, 1 + self.dim)

    def lookup(self, keys_K: Int64s) -> Float32s:
        """Return the values of each key, the initial ones where it has no row: float32 [K, V]. Changes nothing."""
        keys_K = np.ascontiguousarray(keys_K)
        return self._values(self.index.find(keys_K), keys_K)

    def squares(self, keys_K: Int64s) -> Float32s:
        """Return the sum of squares of each key's linear weight, float32 [K]: 0 where the optimizer keeps none, what a
        new row begins with where a key has no row, and infinity where it is not admitted yet."""
        rows_K, at = self.index.find(np.ascontiguousarray(keys_K)), self.optimizer.squares_at(1 + self.dim)
        without = np.float32(np.inf if self.admission.after > 1 else self.optimizer.squares)
        has_K = rows_K >= 0
        out_K = np.where(has_K, np.float32(0), without)
        if at >= 0:
            out_K[has_K] = self.states_RS[rows_K[has_K], at]
        return out_K

    def update(self, rows_BF: Int64s, grad_BFV: Float32s, event_time_ms_B: Int64s) -> Int64s:
        """Apply one step of the optimizer and return the touched rows in order of first appearance.

        Gradients of a row that appears several times are added in the order given and applied once; row -1 learns
        nothing.
        """
        self._advance(event_time_ms_B)
        rows_N = np.ascontiguousarray(rows_BF).reshape(-1)
        grad_NV = np.ascontiguousarray(grad_BFV, np.float32).reshape(len(rows_N), 1 + self.dim)
        index = self.index
        index.changing(rows_N)
        return self.optimizer.step(index.arrays.words_RW, index.floats_RW, rows_N, grad_NV, now_s=self.now_s)

    def expire(self, now_ms: int) -> Int64s:
        """Move time on, sweep one part in 4,096, and return the keys that were forgotten since the last call.

        Whoever publishes the table must publish these keys: they have their initial values again.
        """
        if not self.expire_s:
            return np.empty(0, np.int64)
        self._advance(np.array([now_ms], np.int64))
        oldest = self._oldest()
        self._forgotten.append(self.index.sweep(self._part, oldest=oldest))
        self._counter.sweep(self._part, oldest=oldest)
        self._part = (self._part + 1) % SWEEPS
        removed_K = np.concatenate(self._forgotten)
        self._forgotten = []
        return removed_K

    def forgotten(self) -> Int64s:
        """Return the keys that the next `expire` will name because they were asked for after their time."""
        return np.concatenate([np.empty(0, np.int64), *self._forgotten])

    def keys_of(self, rows_K: Int64s) -> Int64s:
        """Return the keys of rows."""
        return self.index.keys_R[rows_K]

    def keys(self) -> Int64s:
        """Return all keys that have a row, in row order."""
        return self.index.keys_R[self.index.live_rows()]

    def state(self) -> State:
        """Return copies of all rows, in row order, and of what else makes the future; `load` reads them.

        `keys`, `values`, `optimizer` and `last_s` have an entry a row; see `digest` for the others.
        """
        return self.rest() | {
            prefix + name: column
            for prefix, (index, columns) in self.indexes().items()
            for name, column in live(columns.of(index.arrays.words_RW[: index.high])).items()
        }

    def rest(self) -> State:
        """Return copies of what `state` has besides rows."""
        return {
            "clock.now_and_part": np.array([self.now_s, self._part], np.int64),
            "clock.forgotten": self.forgotten(),
            **self._counter.rest(),
        }

    def indexes(self) -> dict[str, tuple[RowIndex, Columns]]:
        """Return where rows lie, by what their columns' names begin with."""
        return {"": (self.index, self.columns)} | self._counter.indexes()

    def load(self, state: Mapping[str, npt.NDArray[np.generic]], rows: AllStoredRows = NO_ROWS) -> None:
        """Replace everything by what `state` returned. Rows may be free: their key is `PAD`. With `rows`, those of
        `indexes` that it names are taken from there."""
        self._clear()
        if "" in rows:
            self.columns.load_pieces(self.index, rows[""])
        else:
            self.columns.load(self.index, state)
        self.now_s, self._part = (int(x) for x in state["clock.now_and_part"])
        forgotten = state["clock.forgotten"].astype(np.int64)
        self._forgotten = [forgotten] if len(forgotten) else []
        self._counter.load(state, rows)

    def _clear(self) -> None:
        self.index = RowIndex(words=1 + self.dim + self._states)
        self._counter = counter_for(self.admission)

    def _oldest(self) -> int:
        return max(self.now_s - self.expire_s, 0) if self.expire_s else 0

    def _advance(self, event_time_ms_B: Int64s | None) -> None:
        if event_time_ms_B is not None and len(event_time_ms_B):
            self.now_s = min(max(self.now_s, int(event_time_ms_B.max()) // 1_000), _SECONDS_MAX)

    def _values(self, rows_N: Int64s, keys_N: Int64s) -> Float32s:
        out_NV = np.empty((len(rows_N), 1 + self.dim), np.float32)
        _gather(self.index.floats_RW, rows_N, keys_N, out_NV, np.uint64(self.seed), np.float32(self.scale))
        return out_NV

    def _insert(self, keys_K: Int64s) -> Int64s:
        rows_K, fresh_K = self.index.insert(keys_K)
        arrays, values = self.index.arrays, 1 + self.dim
        seed, scale = np.uint64(self.seed), np.float32(self.scale)
        _fill_rows(arrays.words_RW, self.index.floats_RW, arrays.keys_RX, fresh_K, values, self.now_s, seed, scale)
        self.optimizer.begin(self.index.floats_RW, fresh_K, values=values)
        return rows_K
