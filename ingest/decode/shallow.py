"""Cuts what is nested so deeply that a reader would give up on the whole: compiled, over bytes. Pure.

Of a list or map that lies too deep its brackets stay and its content goes. Enough levels stay for `validate` to see
that the record has too many, whatever a door puts around it: the event becomes a dead letter, its neighbours are taken.
"""

from __future__ import annotations

import numba
import numpy as np

from headrace.contract.formats.nesting import LEVELS_MAX
from headrace.ingest.decode.msgpack_scan import (
    ARRAY,
    BIN,
    BROKEN,
    EXT,
    FLOAT,
    MAP,
    STR,
    Flag,
    I64s,
    U8s,
    Word,
    as_bytes,
    has_head,
    head,
    quoted_after,
)

KEPT = LEVELS_MAX + 10
"""Levels that stay. Doors put at most 3 around a record: a message, its list of entries, an entry."""
OTLP_KEPT = 4 * LEVELS_MAX + 20
"""Of OTLP's JSON, which needs up to 4 levels for one of a record, and 9 around it."""


@numba.njit(cache=True)
def nested(data: U8s, at: Word, todo_L: I64s) -> tuple[Flag, Word]:
    """Return (whether the value at `at` has more levels than `todo_L` has places, what follows it).

    The value is all there. Where it has more, what follows is not known.
    """
    depth = 0
    while True:
        kind, value, rest = head(data, at)
        at = rest
        if kind == STR or kind == BIN or kind == EXT or kind == FLOAT:
            at += value
        elif kind == ARRAY or kind == MAP:
            if depth == len(todo_L):
                return True, at
            todo_L[depth] = 2 * value if kind == MAP else value
            depth += 1
        while depth > 0 and todo_L[depth - 1] == 0:
            depth -= 1
        if depth == 0:
            return False, at
        todo_L[depth - 1] -= 1


@numba.njit(cache=True)
def _cut_msgpack(data: U8s, todo_L: I64s, out: U8s) -> Word:
    """Write the value that begins `data` without its too deep content; return how many bytes, -1 where it is none."""
    at, size, depth, end = 0, 0, 0, len(data)
    while True:
        if not has_head(data, end, at):
            return -1
        start = at
        kind, value, at = head(data, at)
        if kind == BROKEN:
            return -1
        if kind == STR or kind == BIN or kind == EXT or kind == FLOAT:
            at += value
            if at > end:
                return -1
        if kind == ARRAY or kind == MAP:
            if depth < len(todo_L):
                todo_L[depth] = 2 * value if kind == MAP else value
                depth += 1
            else:
                # Its head becomes that of an empty one. What is in it is skipped by counting.
                todo = 2 * value if kind == MAP else value
                while todo > 0:
                    if not has_head(data, end, at):
                        return -1
                    inner, many, at = head(data, at)
                    todo -= 1
                    if inner == BROKEN:
                        return -1
                    if inner == STR or inner == BIN or inner == EXT or inner == FLOAT:
                        at += many
                    elif inner == ARRAY:
                        todo += many
                    elif inner == MAP:
                        todo += 2 * many
                out[size] = 0x80 if kind == MAP else 0x90
                size += 1
                start = at
        for i in range(start, at):
            out[size] = data[i]
            size += 1
        while depth > 0 and todo_L[depth - 1] == 0:
            depth -= 1
        if depth == 0:
            break
        todo_L[depth - 1] -= 1
    for i in range(at, end):
        out[size] = data[i]
        size += 1
    return size


@numba.njit(cache=True)
def _cut_json(data: U8s, levels: Word, out: U8s) -> Word:
    """Write JSON without what lies deeper than `levels` lists and maps; return how many bytes."""
    depth, quoted, size = 0, 0, 0
    for i in range(len(data)):
        byte = data[i]
        opens = quoted == 0 and (byte == 0x5B or byte == 0x7B)
        closes = quoted == 0 and (byte == 0x5D or byte == 0x7D)
        quoted = quoted_after(byte, quoted)
        if opens:
            depth += 1
        # The brackets of the first that is too deep stay, which are at depth `levels` + 1.
        if depth <= levels or (depth == levels + 1 and (opens or closes)):
            out[size] = byte
            size += 1
        if closes:
            depth -= 1
    return size


def shallow_msgpack(data: bytes, levels: int = KEPT) -> bytes:
    """Return MessagePack whose first value has at most `levels` + 1 levels; itself where that is so already.

    What is no MessagePack, or not whole, comes back as it is: its reader says so.

    >>> shallow_msgpack(b"\\x91\\x91\\x91\\x01", 1), shallow_msgpack(b"\\x91\\x91\\x91\\x01", 3)
    (b'\\x91\\x90', b'\\x91\\x91\\x91\\x01')
    """
    # Each level takes a byte at least.
    if len(data) <= levels:
        return data
    out = np.empty(len(data), np.uint8)
    size = _cut_msgpack(as_bytes(data), np.zeros(levels, np.int64), out)
    return data if size < 0 or size == len(data) else out[:size].tobytes()


def shallow_json(data: bytes, levels: int = KEPT) -> bytes:
    """Return JSON of at most `levels` + 1 levels; itself where that is so already.

    >>> shallow_json(b'[{"a": [1, {"b": "]"}], "c": 2}]', 2)
    b'[{"a": [], "c": 2}]'
    """
    if data.count(b"[") + data.count(b"{") <= levels:
        return data
    out = np.empty(len(data), np.uint8)
    size = _cut_json(as_bytes(data), levels, out)
    return data if size == len(data) else out[:size].tobytes()
