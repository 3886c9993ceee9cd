"""The digest of a learner's whole state: equal digests mean equal bits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


def digest(state: Mapping[str, npt.NDArray[np.generic]]) -> str:
    """Return SHA-256 in hex over all arrays by name: rows, optimizer, dense weights, step.

    `state` is `Learner.state()`. Arrays of a table have one entry a row, and rows lie in an order that depends on
    history; so where an array `<table>.keys` is, the arrays `<table>.<name>` are taken in ascending order of keys.
    """
    sha = hashlib.sha256()
    orders: dict[str, npt.NDArray[np.int64]] = {}
    for name in sorted(state):
        array = state[name]
        keys = name[: name.rfind(".") + 1] + "keys"
        if keys in state:
            if keys not in orders:
                orders[keys] = np.argsort(state[keys], kind="stable")
            array = array[orders[keys]]
        array = np.ascontiguousarray(array)
        sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        sha.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
    return sha.hexdigest()
