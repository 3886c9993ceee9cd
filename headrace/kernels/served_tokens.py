"""Writes and opens many tokens of `headrace.contract.formats.served_token` at once. Compiled, pure.

Legend: N tokens, T tasks, K counters, C columns of all counters, X sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.formats.served_token import (
    ARM,
    COUNTER,
    ENTITY,
    FORMAT,
    FORMATS_MAX,
    HEAD_BYTES,
    PROPENSITY,
    SCORE,
    SEAL_BYTES,
    TOO_NEW,
    UNREADABLE,
    VERSION,
    WHOLE_MAX,
    WRONG_KEY,
    TokenKey,
    TokenLayout,
)
from headrace.kernels.arrays import Bools, I32s, I64s, Int, U8s
from headrace.kernels.siphash import siphash

Float32s = npt.NDArray[np.float32]
U32s = npt.NDArray[np.uint32]
_LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8)
_VALUES = np.full(256, -1, np.int64)
_VALUES[_LETTERS] = np.arange(64)
_QUOTE, _COMMA = 34, 44
# kind and id, and a size of 4 bytes; of a counter's value 5 bytes at most.
_SECTION = 9
_SIZE_MAX = 4
_ABSENT, _GOOD, _UNREADABLE, _WRONG_KEY, _TOO_NEW = range(5)
_REASONS = ("", "", UNREADABLE, WRONG_KEY, TOO_NEW)


def seal_tokens(
    layout: TokenLayout,
    key: TokenKey,
    head: bytes,
    scores_NT: Float32s,
    values_NC: Float32s,
    entities: Sequence[Sequence[bytes]],
) -> bytes:
    """Return the tokens as a JSON array of N texts.

    Args:
        head: what `token_head` returned.
        scores_NT: float32 [N, T].
        values_NC: float32 [N, C], one row where all candidates have the same.
        entities: of each source, what each of N candidates has: its columns as a msgpack array.
    """
    rows = len(scores_NT)
    blob, starts_XN, sizes_XN = _blob(entities, rows)
    most = len(head) + _SECTION * (scores_NT.shape[1] + len(entities) + len(layout.counter_ids_K)) + SEAL_BYTES
    most += 4 * scores_NT.shape[1] + 5 * values_NC.shape[1] + int(sizes_XN.sum(axis=0).max(initial=0))
    out = np.empty(2 + rows * (3 + (most * 4 + 2) // 3 + 1), np.uint8)
    size = _seal_all(
        np.frombuffer(head, np.uint8), np.uint64(key.low), np.uint64(key.high), layout.task_ids_T, scores_NT,
        layout.counter_ids_K, layout.ends_K, values_NC, layout.crawl_ids_X, blob, starts_XN, sizes_XN,
        np.empty(most, np.uint8), out,
    )  # fmt: skip
    return out[:size].tobytes()


def _blob(entities: Sequence[Sequence[bytes]], rows: int) -> tuple[U8s, I64s, I64s]:
    sizes_XN = np.array([[len(one) for one in each] for each in entities], np.int64).reshape(len(entities), rows)
    starts_XN = (np.cumsum(sizes_XN.reshape(-1)) - sizes_XN.reshape(-1)).reshape(sizes_XN.shape)
    blob = np.frombuffer(b"".join(b"".join(each) for each in entities) or b"\0", np.uint8)
    return blob, starts_XN, sizes_XN


class Opened(NamedTuple):
    """What N tokens say; rows without one, or whose token is refused, say nothing."""

    reasons: dict[int, str]
    """Of each row whose token is refused: why, of `served_token.REFUSALS`."""
    is_open_N: Bools
    version: list[str | None]
    arm: list[str | None]
    propensity_N: Float32s
    """NaN where there is none."""
    scores_NT: Float32s
    """NaN where a token has none of a task."""
    values_NC: Float32s
    has_NK: Bools
    """Which counters a token holds."""
    entities: list[list[list[Any] | None]]
    """Of each source, the columns of each row; None where its token has none of that source."""


def open_tokens(layout: TokenLayout, key: TokenKey, tokens: pa.Array) -> Opened:
    """Return what tokens say, a string column with null where a row has none."""
    rows, tasks, counters, sources = len(tokens), len(layout.tasks), len(layout.counters), len(layout.crawls)
    columns = int(layout.ends_K[-1]) if counters else 0
    _, starts, data = tokens.buffers()
    starts_S = np.frombuffer(starts, np.int32)[tokens.offset : tokens.offset + rows + 1]
    data_U = np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(1, np.uint8)
    raw = np.empty(max(1, len(data_U)), np.uint8)
    states_N, is_there_N = np.zeros(rows, np.int64), tokens.is_valid().to_numpy(zero_copy_only=False)
    scores_NT, values_NC = np.full((rows, tasks), np.nan, np.float32), np.zeros((rows, columns), np.float32)
    has_NK, propensity_N = np.zeros((rows, counters), np.bool_), np.full(rows, np.nan, np.float32)
    # Of version, arm and each source: where it lies in `raw`, and its size; -1 where there is none.
    parts_NP2 = np.full((rows, 2 + sources, 2), -1, np.int64)
    _open_all(
        data_U, starts_S, is_there_N, np.uint64(key.number), np.uint64(key.low), np.uint64(key.high),
        layout.task_ids_T, layout.counter_ids_K, layout.ends_K, layout.crawl_ids_X, raw, states_N, scores_NT,
        values_NC, has_NK, propensity_N, parts_NP2,
    )  # fmt: skip
    whole, reasons = raw.tobytes(), {}
    texts: list[list[Any]] = [[], []]
    entities: list[list[Any]] = [[] for _ in layout.crawls]
    for row, (state, parts) in enumerate(zip(states_N.tolist(), parts_NP2.tolist(), strict=True)):
        found: list[Any] = [None] * (2 + sources)
        if state == _GOOD:
            try:
                found = [_part(whole, at, size, number, layout) for number, (at, size) in enumerate(parts)]
            except (UnicodeDecodeError, msgspec.MsgspecError):
                states_N[row] = state = _UNREADABLE
        if state > _GOOD:
            reasons[row] = _REASONS[state]
        for into, value in zip((*texts, *entities), found, strict=True):
            into.append(value)
    is_open_N = states_N == _GOOD
    version, arm = texts
    return Opened(reasons, is_open_N, version, arm, propensity_N, scores_NT, values_NC, has_NK, entities)


def _part(whole: bytes, at: int, size: int, number: int, layout: TokenLayout) -> Any:
    if at < 0:
        return None
    content = whole[at : at + size]
    if number < 2:
        return content.decode()
    columns: list[Any] = msgspec.msgpack.decode(content, type=list)
    if len(columns) != len(layout.crawls[number - 2].columns()):
        raise msgspec.ValidationError("a source has another number of columns")
    return columns


@numba.njit(cache=True)
def _put_number(raw: U8s, at: Int, number: Int) -> Int:
    """Write a varint and return what follows."""
    while number >= 128:
        raw[at] = (number & 127) | 128
        number >>= 7
        at += 1
    raw[at] = number
    return at + 1


@numba.njit(cache=True)
def _put_word(raw: U8s, at: Int, word: np.uint32) -> Int:
    """Write 32 bits, the lowest first, and return what follows."""
    for i in range(4):
        raw[at + i] = (word >> np.uint32(8 * i)) & np.uint32(255)
    return at + 4


@numba.njit(cache=True)
def _bits(value: np.float32, scratch_1: Float32s) -> np.uint32:
    scratch_1[0] = value
    return np.uint32(scratch_1.view(np.uint32)[0])


@numba.njit(cache=True)
def _close_section(raw: U8s, first: Int, at: Int) -> Int:
    """Put the size of a section whose content begins `_SIZE_MAX` behind `first`, move the content up to it."""
    content = first + _SIZE_MAX
    to = _put_number(raw, first, at - content)
    for i in range(at - content):
        raw[to + i] = raw[content + i]
    return to + at - content


@numba.njit(cache=True)
def _seal_all(
    head: U8s, low: np.uint64, high: np.uint64, task_ids_T: U32s, scores_NT: Float32s, counter_ids_K: U32s,
    ends_K: I64s, values_NC: Float32s, crawl_ids_X: U32s, blob: U8s, starts_XN: I64s, sizes_XN: I64s, raw: U8s,
    out: U8s,
) -> Int:  # fmt: skip
    scratch_1 = np.zeros(1, np.float32)
    out[0] = 91  # [
    to = 1
    raw[: head.shape[0]] = head
    for n in range(scores_NT.shape[0]):
        at = head.shape[0]
        for t in range(task_ids_T.shape[0]):
            raw[at], raw[at + 1] = SCORE, 8
            at = _put_word(raw, at + 2, task_ids_T[t])
            at = _put_word(raw, at, _bits(scores_NT[n, t], scratch_1))
        c = 0
        for k in range(counter_ids_K.shape[0]):
            raw[at] = COUNTER
            first = at + 1
            at = _put_word(raw, first + _SIZE_MAX, counter_ids_K[k])
            while c < ends_K[k]:
                value = values_NC[n, c]
                bits = _bits(value, scratch_1)
                whole = np.int64(value) if np.float32(0) <= value <= np.float32(WHOLE_MAX) else np.int64(-1)
                if whole >= 0 and _bits(np.float32(whole), scratch_1) == bits:
                    at = _put_number(raw, at, 2 * whole + 2)
                else:
                    raw[at] = 1
                    at = _put_word(raw, at + 1, bits)
                c += 1
            at = _close_section(raw, first, at)
        for x in range(crawl_ids_X.shape[0]):
            raw[at] = ENTITY
            at = _put_number(raw, at + 1, 4 + sizes_XN[x, n])
            at = _put_word(raw, at, crawl_ids_X[x])
            for i in range(sizes_XN[x, n]):
                raw[at + i] = blob[starts_XN[x, n] + i]
            at += sizes_XN[x, n]
        seal = siphash(raw, 0, at, low, high)
        at = _put_word(raw, at, np.uint32(seal & np.uint64(0xFFFFFFFF)))
        at = _put_word(raw, at, np.uint32(seal >> np.uint64(32)))
        if n:
            out[to] = _COMMA
            to += 1
        out[to] = _QUOTE
        to = _letters(raw, at, out, to + 1)
        out[to] = _QUOTE
        to += 1
    out[to] = 93  # ]
    return to + 1


@numba.njit(cache=True)
def _letters(raw: U8s, size: Int, out: U8s, to: Int) -> Int:
    """Write `size` bytes as base64, and return what follows."""
    for i in range(0, size, 3):
        bits, left = np.int64(0), min(3, size - i)
        for j in range(left):
            bits |= np.int64(raw[i + j]) << (16 - 8 * j)
        for j in range(left + 1):
            out[to] = _LETTERS[(bits >> (18 - 6 * j)) & 63]
            to += 1
    return to


@numba.njit(cache=True)
def _bytes(data: U8s, at: Int, end: Int, raw: U8s, to: Int) -> Int:
    """Write what base64 says, and return what follows; -1 where it is none."""
    bits, held = 0, 0
    while at < end and data[end - 1] == 61 and end - at > 1:  # A client may have padded it.
        end -= 1
    for i in range(at, end):
        value = _VALUES[data[i]]
        if value < 0:
            return -1
        bits = ((bits << 6) | value) & 0xFFFFFF
        held += 6
        if held >= 8:
            held -= 8
            raw[to] = (bits >> held) & 255
            to += 1
    # What is left over is 0, 2 or 4 bits, all 0: one text for each token.
    return to if held < 6 and bits & ((1 << held) - 1) == 0 else -1


@numba.njit(cache=True)
def _number(raw: U8s, at: Int, end: Int) -> tuple[Int, Int]:
    """Return (a varint of 35 bits at most, what follows); -1 where it does not end."""
    number, shift = np.int64(0), 0
    while at < end and shift < 35:
        byte = np.int64(raw[at])
        number |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return number, at
        shift += 7
    return -1, at


@numba.njit(cache=True)
def _word(raw: U8s, at: Int) -> np.uint32:
    word = np.uint32(0)
    for i in range(4):
        word |= np.uint32(raw[at + i]) << np.uint32(8 * i)
    return word


@numba.njit(cache=True)
def _place(ids: U32s, wanted: np.uint32) -> Int:
    for i in range(ids.shape[0]):
        if ids[i] == wanted:
            return i
    return -1


@numba.njit(cache=True)
def _real(word: np.uint32, scratch_1: U32s) -> np.float32:
    scratch_1[0] = word
    return np.float32(scratch_1.view(np.float32)[0])


@numba.njit(cache=True)
def _open_all(
    data: U8s, starts_S: I32s, is_there_N: Bools, number: np.uint64, low: np.uint64, high: np.uint64, task_ids_T: U32s,
    counter_ids_K: U32s, ends_K: I64s, crawl_ids_X: U32s, raw: U8s, states_N: I64s, scores_NT: Float32s,
    values_NC: Float32s, has_NK: Bools, propensity_N: Float32s, parts_NP2: I64s,
) -> None:  # fmt: skip
    scratch_1 = np.zeros(1, np.uint32)
    to = 0
    for n in range(is_there_N.shape[0]):
        if not is_there_N[n]:
            continue
        at = to
        states_N[n] = _UNREADABLE
        end = _bytes(data, starts_S[n], starts_S[n + 1], raw, at)
        if end - at < HEAD_BYTES + SEAL_BYTES:
            continue
        if raw[at] != FORMAT:
            if FORMAT < raw[at] < FORMATS_MAX:
                states_N[n] = _TOO_NEW
            continue
        if np.uint64(_word(raw, at + 1)) != number:
            states_N[n] = _WRONG_KEY
            continue
        to = end
        end -= SEAL_BYTES
        seal = np.uint64(_word(raw, end)) | np.uint64(_word(raw, end + 4)) << np.uint64(32)
        if siphash(raw, at, end, low, high) != seal:
            continue
        if _sections(
            raw, at + HEAD_BYTES, end, n, task_ids_T, counter_ids_K, ends_K, crawl_ids_X, scores_NT, values_NC,
            has_NK, propensity_N, parts_NP2, scratch_1,
        ):  # fmt: skip
            states_N[n] = _GOOD
        else:
            has_NK[n] = False


@numba.njit(cache=True)
def _sections(
    raw: U8s, at: Int, end: Int, n: Int, task_ids_T: U32s, counter_ids_K: U32s, ends_K: I64s, crawl_ids_X: U32s,
    scores_NT: Float32s, values_NC: Float32s, has_NK: Bools, propensity_N: Float32s, parts_NP2: I64s, scratch_1: U32s,
) -> bool:  # fmt: skip
    """Take the sections of row `n`, and say whether all are well-formed."""
    while at < end:
        kind = raw[at]
        size, at = _number(raw, at + 1, end)
        if size < 0 or at + size > end:
            return False
        behind = at + size
        if kind == VERSION or kind == ARM:
            part = 0 if kind == VERSION else 1
            parts_NP2[n, part, 0], parts_NP2[n, part, 1] = at, size
        elif kind == PROPENSITY:
            if size < 4:
                return False
            propensity_N[n] = _real(_word(raw, at), scratch_1)
        elif kind == SCORE:
            if size < 8:
                return False
            t = _place(task_ids_T, _word(raw, at))
            if t >= 0:
                scores_NT[n, t] = _real(_word(raw, at + 4), scratch_1)
        elif kind == ENTITY:
            if size < 4:
                return False
            x = _place(crawl_ids_X, _word(raw, at))
            if x >= 0:
                parts_NP2[n, 2 + x, 0], parts_NP2[n, 2 + x, 1] = at + 4, size - 4
        elif kind == COUNTER:
            if size < 4:
                return False
            k = _place(counter_ids_K, _word(raw, at))
            if k >= 0:
                has_NK[n, k] = True
                at += 4
                for c in range(ends_K[k - 1] if k else 0, ends_K[k]):
                    number, at = _number(raw, at, behind)
                    if number == 1 and at + 4 <= behind:
                        values_NC[n, c] = _real(_word(raw, at), scratch_1)
                        at += 4
                    elif number >= 2 and number % 2 == 0:
                        values_NC[n, c] = (number - 2) // 2
                    else:
                        return False
        at = behind
    return True
