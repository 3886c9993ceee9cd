"""The digest of a learner's whole state: equal digests mean equal bits.

Two kinds. `SUM` can be put together: of each table a sum of row hashes (`headrace.kernels.row_sums`), whatever the
order of rows, so that shards and parts add up to the whole; of all that has no rows, a SHA-256. `SHA256` is what runs
before it were published with: rows sorted by key, all of it hashed in one go. A manifest names its kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.contract.errors import ConfigRejected
from headrace.kernels.row_sums import RowSum, row_sum

State = Mapping[str, npt.NDArray[np.generic]]

SHA256, SUM = "sha256", "sum128"
"""The kinds. A manifest without a kind is of the first."""


class Parts(msgspec.Struct, frozen=True):
    """A digest of kind `SUM` before it is put together."""

    tables: dict[str, RowSum]
    """By the name of the table's keys."""
    rest: str
    """SHA-256 of what has no rows, and of the tables' columns: names, types, widths."""

    @property
    def text(self) -> str:
        """Return the digest: 64 hex digits."""
        sha = hashlib.sha256(self.rest.encode())
        for name in sorted(self.tables):
            sha.update(f" {name} {self.tables[name].text}".encode())
        return sha.hexdigest()

    def to_text(self) -> dict[str, str]:
        """Return the parts as texts, for a manifest: a difference can be told by table."""
        return {name: found.text for name, found in self.tables.items()} | {"rest": self.rest}


def digest(state: State, kind: str = SUM) -> str:
    """Return the digest of all arrays by name, in hex: rows, optimizer, dense weights, step.

    `state` is `Learner.state()`. Raises `ConfigRejected` for a kind that is not known here.
    """
    if kind == SUM:
        return parts(state).text
    if kind == SHA256:
        return _sha256(state)
    raise ConfigRejected(f"digests of kind {kind!r} are of a later release than this one: update Headrace.")


def parts(state: State) -> Parts:
    """Return the digest of kind `SUM`, part by part.

    Where an array `<table>.keys` is, the arrays `<table>.<name>` have an entry a row, and are hashed row by row in
    the order of their names.
    """
    columns: dict[str, list[str]] = {}
    sha = hashlib.sha256()
    for name in sorted(state):
        table, array = name[: name.rfind(".") + 1], state[name]
        if f"{table}keys" not in state:
            _hash_array(sha, name, array)
            continue
        sha.update(f"{name} {array.dtype.str} {array.shape[1:]}\n".encode())
        columns.setdefault(table, []).append(name)
    tables = {}
    for table, names in columns.items():
        keys = f"{table}keys"
        tables[keys] = row_sum(state[keys].astype(np.int64, copy=False), *(state[n] for n in names if n != keys))
    return Parts(tables, sha.hexdigest())


def _sha256(state: State) -> str:
    """Return SHA-256 over all arrays by name, those of tables in ascending order of keys."""
    sha = hashlib.sha256()
    orders: dict[str, npt.NDArray[np.int64]] = {}
    for name in sorted(state):
        array = state[name]
        keys = name[: name.rfind(".") + 1] + "keys"
        if keys in state:
            if keys not in orders:
                orders[keys] = np.argsort(state[keys], kind="stable")
            array = array[orders[keys]]
        _hash_array(sha, name, array)
    return sha.hexdigest()


def _hash_array(sha: hashlib._Hash, name: str, array: npt.NDArray[np.generic]) -> None:
    array = np.ascontiguousarray(array)
    sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
    sha.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
