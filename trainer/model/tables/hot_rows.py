"""A cache of hot rows on a device. Rows are read, learnt and kept there, and go back to the host when others need room.

Every row of a batch is loaded into the cache before the batch is scored, and learns there. The least recently used rows
are evicted, a quarter of the cache at a time. Rows are copied as they are, so where a row lies changes no bit and no
checkpoint says it: equal batches give equal bits on devices of a kind. (They differ from the compiled kernels' bits by
rounding.) Keys, last uses, admission and expiry stay with the tables on the host. A lookup returns the newest values.

Memory on the device: 4 (V + S) bytes a row, V values and S numbers of its optimizer, for each kind of row.

Axes: U distinct ids of a batch (see `DistinctIds`), K rows in question, V values, S optimizer's numbers, H entries of
the cache, R rows of a table.

Source: the idea, Miao et al., "HET", VLDB 2022. Their workers allow each other stale reads; here one worker reads, and
never stale values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.contract.spec import PAD
from headrace.trainer.model.tables.columns import NO_ROWS, AllStoredRows, Columns
from headrace.trainer.model.tables.distinct_ids import DistinctIds
from headrace.trainer.model.tables.group import Tables
from headrace.trainer.model.tables.row_index import Float32s, Int64s, RowIndex
from headrace.trainer.model.tables.table import State, Table
from headrace.trainer.model.tables.torch_steps import step

_EVICTED_SHARE = 4
_FREE = -1


def sent(array: npt.NDArray[Any], device: str) -> torch.Tensor:
    """Return an array as a tensor on the device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


class _Cache:
    """The hot rows of one table."""

    def __init__(self, table: Table, *, device: str, rows: int) -> None:
        self.table, self.device = table, device
        self.rows_H, self.keys_H, self.used_H = (np.empty(0, np.int64) for _ in range(3))
        self.learnt_H = np.empty(0, np.bool_)
        """Entries that have learnt since they were copied last."""
        self.entry_R, self._vacant = np.empty(0, np.int64), np.empty(0, np.int64)
        self.values_HV = torch.empty(0, 1 + table.dim, device=device)
        self.states_HS = torch.empty(0, table.states_RS.shape[1], device=device)
        self.now = 0
        self._extend(rows)

    def clear(self) -> None:
        """Forget everything, without writing it back."""
        self.learnt_H[:] = False
        self.rows_H[:], self.keys_H[:], self.entry_R = _FREE, PAD, np.empty(0, np.int64)
        self._vacant = np.arange(len(self.rows_H))

    def load(self, rows_K: Int64s) -> Int64s:
        """Load rows into the cache and return their entries in it. A row may be named twice."""
        self.now += 1
        if self.table.index.high > len(self.entry_R):
            more = max(self.table.index.high, 2 * len(self.entry_R)) - len(self.entry_R)
            self.entry_R = np.concatenate([self.entry_R, np.full(more, _FREE)])
        entry_K = self.entry_R[rows_K]
        self.used_H[entry_K[entry_K >= 0]] = self.now
        missing_K = np.unique(rows_K[entry_K < 0])
        if len(missing_K):
            self._make_room(len(missing_K))
            self._vacant, free_K = np.split(self._vacant, [-len(missing_K)])
            at_K = self._sent(free_K)
            self.values_HV[at_K] = self._sent(self.table.values_RV[missing_K])
            self.states_HS[at_K] = self._sent(self.table.states_RS[missing_K])
            self.rows_H[free_K], self.keys_H[free_K] = missing_K, self.table.keys_of(missing_K)
            self.used_H[free_K], self.entry_R[missing_K] = self.now, free_K
            entry_K = self.entry_R[rows_K]
        return entry_K

    def learn(self, rows_K: Int64s, grad_KV: torch.Tensor) -> Int64s:
        """Take one step with the gradients of rows that were loaded, and return each row once."""
        idle_K = self.table.now_s - self.table.last_s_R[rows_K].astype(np.int64)
        words_RW = self.table.index.arrays.words_RW
        self.table.index.changing(rows_K)
        touched_K = self.table.optimizer.touch(words_RW, rows_K, now_s=self.table.now_s)
        if len(touched_K) < len(rows_K):
            rows_K, first_K, again_K = np.unique(rows_K, return_index=True, return_inverse=True)
            idle_K = idle_K[first_K]
            sums_KV = torch.zeros(len(rows_K), grad_KV.shape[1], device=self.device)
            # Unlike index_add_, this one adds in a fixed order on CUDA too.
            grad_KV = sums_KV.index_put_((self._sent(again_K),), grad_KV, accumulate=True)
        self.learnt_H[self.entry_R[rows_K]] = True
        at_K = self._sent(self.entry_R[rows_K])
        idle = self._sent(idle_K.astype(np.float32))
        learnt = step(self.table.optimizer, self.values_HV[at_K], self.states_HS[at_K], grad_KV, idle)
        self.values_HV[at_K], self.states_HS[at_K] = learnt
        return touched_K

    def values_of(self, rows_K: Int64s, out_KV: Float32s) -> None:
        """Write the values of those rows that are in the cache; leave the others and row -1 as they are."""
        here_K = self._here(rows_K)
        if len(here_K):
            out_KV[here_K] = self.values_HV[self._sent(self.entry_R[rows_K[here_K]])].cpu().numpy()

    def squares_of(self, rows_K: Int64s, out_K: Float32s) -> None:
        """Write the sums of squares of the linear weights of those rows that are in the cache."""
        at = self.table.optimizer.squares_at(1 + self.table.dim)
        here_K = self._here(rows_K)
        if at >= 0 and len(here_K):
            out_K[here_K] = self.states_HS[self._sent(self.entry_R[rows_K[here_K]]), at].cpu().numpy()

    def _here(self, rows_K: Int64s) -> Int64s:
        """Return where in `rows_K` rows are that the cache has."""
        here_K = np.flatnonzero((rows_K >= 0) & (rows_K < len(self.entry_R)))
        return here_K[self.entry_R[rows_K[here_K]] >= 0]

    def drop(self, keys_K: Int64s) -> None:
        """Free the entries of keys that the table has removed; their rows may be other keys' already."""
        if len(keys_K):
            self._free(np.flatnonzero(np.isin(self.keys_H, keys_K)))

    def write_back(self, entry_K: Int64s) -> None:
        """Copy what entries learnt to their rows on the host."""
        entry_K = entry_K[self.learnt_H[entry_K]]
        self.learnt_H[entry_K] = False
        self.table.index.changing(self.rows_H[entry_K])
        at_K, rows_K = self._sent(entry_K), self.rows_H[entry_K]
        self.table.values_RV[rows_K] = self.values_HV[at_K].cpu().numpy()
        self.table.states_RS[rows_K] = self.states_HS[at_K].cpu().numpy()

    def write_all_back(self) -> None:
        """Copy every entry to its row on the host, and keep it in the cache."""
        self.write_back(np.flatnonzero(self.rows_H != _FREE))

    def _make_room(self, entries: int) -> None:
        """Evict the least recently used rows, never those of this batch. Extend the cache where that is not enough."""
        short = entries - len(self._vacant)
        if short <= 0:
            return
        idle_H = np.flatnonzero((self.rows_H != _FREE) & (self.used_H < self.now))
        oldest_K = idle_H[np.argsort(self.used_H[idle_H], kind="stable")]
        evicted_K = oldest_K[: max(short, len(self.rows_H) // _EVICTED_SHARE)]
        self.write_back(evicted_K)
        self._free(evicted_K)
        if short > len(evicted_K):
            self._extend(max(short - len(evicted_K), len(self.rows_H)))

    def _free(self, entry_K: Int64s) -> None:
        self.entry_R[self.rows_H[entry_K]] = _FREE
        self.learnt_H[entry_K] = False
        self.rows_H[entry_K], self.keys_H[entry_K] = _FREE, PAD
        self._vacant = np.concatenate([self._vacant, entry_K])

    def _extend(self, entries: int) -> None:
        self._vacant = np.concatenate([self._vacant, len(self.rows_H) + np.arange(entries)])
        self.rows_H = np.concatenate([self.rows_H, np.full(entries, _FREE)])
        self.keys_H = np.concatenate([self.keys_H, np.full(entries, PAD)])
        self.used_H = np.concatenate([self.used_H, np.zeros(entries, np.int64)])
        self.learnt_H = np.concatenate([self.learnt_H, np.zeros(entries, np.bool_)])
        self.values_HV, self.states_HS = (
            torch.cat([have, torch.zeros(entries, have.shape[1], device=self.device)])
            for have in (self.values_HV, self.states_HS)
        )

    def _sent(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return sent(array, self.device)


class HotRows:
    """`Tables` whose rows are read and learnt on a device. Same methods; values and gradients are tensors."""

    def __init__(self, tables: Tables, *, device: str, rows: int) -> None:
        """Make an empty cache.

        Args:
            device: a device of torch's, the CPU too.
            rows: most rows of each kind; a batch that has more extends it.
        """
        self.tables, self.device = tables, device
        self.caches = [_Cache(table, device=device, rows=rows) for table in tables.tables]

    def __len__(self) -> int:
        return len(self.tables)

    @property
    def nbytes(self) -> int:
        """Bytes in use on the host."""
        return self.tables.nbytes

    @property
    def device_bytes(self) -> int:
        """Bytes of rows on the device, used or not."""
        return sum(t.numel() * t.element_size() for c in self.caches for t in (c.values_HV, c.states_HS))

    def distinct_ids(self, keys_BF: Int64s, event_time_ms_B: Int64s | None = None) -> DistinctIds:
        """Return the distinct ids of a batch; see `Tables.distinct_ids`."""
        ids = self.tables.distinct_ids(keys_BF, event_time_ms_B)
        for cache in self.caches:
            cache.drop(cache.table.forgotten())
        return ids

    def gather(self, ids: DistinctIds) -> torch.Tensor:
        """Load the rows and return a copy of the values of each distinct id, on the device: float32 [U, V]."""
        out_UV = torch.zeros(len(ids.keys_U), 1 + self.tables.dim, device=self.device)
        for cache, ids_K, rows_K in self._parts(ids):
            at_K = sent(cache.load(rows_K), self.device)
            out_UV[sent(ids_K, self.device), : 1 + cache.table.dim] = cache.values_HV[at_K]
        without_K = np.flatnonzero(ids.rows_U < 0)
        if len(without_K):
            initial_KV = self.tables.gather(ids)[without_K]
            out_UV[sent(without_K, self.device)] = sent(initial_KV, self.device)
        return out_UV

    def update(self, ids: DistinctIds, grad_UV: torch.Tensor, event_time_ms_B: Int64s) -> Int64s:
        """Apply one step to rows that `gather` loaded; return the keys that learnt, each once a table."""
        touched = []
        for cache, ids_K, rows_K in self._parts(ids):
            touched_K = cache.learn(rows_K, grad_UV[sent(ids_K, self.device), : 1 + cache.table.dim])
            touched.append(cache.table.keys_of(touched_K))
        return np.concatenate(touched)

    def lookup(self, keys_K: Int64s) -> Float32s:
        """Return the newest values of each key, on the host; see `Tables.lookup`."""
        out_KV = self.tables.lookup(keys_K)
        for cache in self.caches:
            cache.values_of(cache.table.index.find(keys_K), out_KV[:, : 1 + cache.table.dim])
        return out_KV

    def squares(self, keys_K: Int64s) -> Float32s:
        """Return the newest sum of squares of each key's linear weight, on the host; see `Table.squares`."""
        out_K = self.tables.squares(keys_K)
        for cache in self.caches:
            cache.squares_of(cache.table.index.find(keys_K), out_K)
        return out_K

    def expire(self, now_ms: int) -> Int64s:
        """Return the keys that were forgotten since the last call; see `Table.expire`."""
        gone = []
        for cache in self.caches:
            gone_K = cache.table.expire(now_ms)
            # Keys that were asked for after they had expired have new rows, which may have learnt since.
            cache.drop(gone_K[cache.table.index.find(gone_K) < 0])
            gone.append(gone_K)
        return np.concatenate(gone)

    def keys(self) -> Int64s:
        """Return all keys that have a row, table by table."""
        return self.tables.keys()

    def state(self) -> State:
        """Return `Tables.state`, hot rows as they are now."""
        self.settle()
        return self.tables.state()

    def rest(self) -> State:
        """See `Tables.rest`."""
        return self.tables.rest()

    def indexes(self) -> dict[str, tuple[RowIndex, Columns]]:
        """See `Tables.indexes`. What is hot is older there until `settle`."""
        return self.tables.indexes()

    def settle(self) -> None:
        """Copy what hot rows learnt to their rows on the host."""
        for cache in self.caches:
            cache.write_all_back()

    def load(self, state: Mapping[str, npt.NDArray[np.generic]], rows: AllStoredRows = NO_ROWS) -> None:
        """Replace everything by what `state` returned; no row is hot then. `rows` as `Tables.load`."""
        self.tables.load(state, rows)
        for cache in self.caches:
            cache.clear()

    def _parts(self, ids: DistinctIds) -> Iterator[tuple[_Cache, Int64s, Int64s]]:
        """Yield each table's cache, where in U its ids are that have a row, and their rows."""
        for cache, columns in zip(self.caches, self.tables.columns, strict=True):
            ids_K = ids.of(columns)
            ids_K = ids_K[ids.rows_U[ids_K] >= 0]
            yield cache, ids_K, ids.rows_U[ids_K]
