"""The digest of a learner's whole state: equal digests mean equal bits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


def digest(state: Mapping[str, npt.NDArray[np.generic]]) -> str:
    """Return SHA-256 in hex over rows sorted by key, then every other array by name: weights, optimizer, step.

    `state` is `Learner.state()`: arrays of the table (`table.keys`, `table.values`, ...) have one entry a row.
    """
    sha = hashlib.sha256()
    order = np.argsort(state["table.keys"], kind="stable")
    for name in sorted(state):
        array = state[name]
        if name.startswith("table."):
            array = array[order]
        array = np.ascontiguousarray(array)
        sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        sha.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
    return sha.hexdigest()
