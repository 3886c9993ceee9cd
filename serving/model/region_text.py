"""Texts in memory that other processes read while they are written, and the fence that keeps stores in order."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from headrace.contract.errors import Overloaded

_fence_lock = threading.Lock()


def fence() -> None:
    """Let no load or store move from one side to the other: two lock operations in a row."""
    with _fence_lock:
        pass
    with _fence_lock:
        pass


def put_text(field: npt.NDArray[np.uint8], data: bytes) -> None:
    """Write a text behind its length, which is 0 while it changes."""
    length = field[:8].view(np.int64)
    length[0] = 0
    fence()
    if len(data) > len(field) - 8:
        raise Overloaded(f"{len(data)} bytes do not fit into {len(field) - 8}.")
    field[8 : 8 + len(data)] = np.frombuffer(data, np.uint8)
    fence()
    length[0] = len(data)


def text_in(field: npt.NDArray[np.uint8]) -> bytes:
    """Return the text of `put_text`, or nothing while it changes."""
    length = int(field[:8].view(np.int64)[0])
    fence()
    data = field[8 : 8 + length].tobytes()
    fence()
    return data if length == int(field[:8].view(np.int64)[0]) else b""
