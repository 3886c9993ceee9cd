"""Decodes a Fluent chunk: its entries to Arrow columns, by a compiled decoder that makes no Python object of a field.
Pure.

It decodes ordinary rows and leaves every other to `validate.check`, which alone decides what is refused and why. A row
is left when a value is not of its declared type, or anything else is unusual. A property test compares the two.

Legend: N rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.formats.nesting import LEVELS_MAX
from headrace.contract.formats.served_token import SERVED
from headrace.contract.project import EXTRA
from headrace.ingest.decode.msgpack_scan import (
    ARRAY,
    BIN,
    BOOL,
    EXT,
    FLOAT,
    INT,
    MAP,
    NIL,
    STR,
    Flag,
    I64s,
    U8s,
    Word,
    big,
    head,
    skip,
)
from headrace.ingest.decode.shallow import nested
from headrace.ingest.decode.texts import NUMBER, Flags, gather, gather_ids, valid_utf8
from headrace.ingest.decode.validate import ENVELOPE_NAMES, ID_BYTES_MAX, PLACE_MAX, Declared
from headrace.kernels.served_tokens import Opened

_INT, _FLOAT, _FLOAT32, _TEXT, _BOOL, _ID, _PLACE, _TIME, _OTHER = range(9)
_KINDS = {pa.int64(): _INT, pa.float64(): _FLOAT, pa.float32(): _FLOAT32, pa.string(): _TEXT, pa.bool_(): _BOOL}
_EXACT_FLOAT = 2.0**53
_FLOAT32_MAX = 3.4028234663852886e38
_NS_SECONDS_MAX = 9_223_372_036
_NS = 1_000_000_000


class Layout(msgspec.Struct, frozen=True):
    """What the compiled decoder must know of a declared type."""

    declared: Declared
    names: U8s
    name_at: I64s
    kinds: I64s
    at: dict[str, int]
    """Column number by name."""


def layout(declared: Declared) -> Layout:
    """Return the layout of a declared type."""
    names, kinds = [], []
    for field in declared.schema:
        if field.name in ENVELOPE_NAMES:
            kinds.append({"place": _PLACE, "event_time_ms": _TIME}.get(field.name, _ID))
        elif field.name == "key":
            continue
        elif field.name in declared.hashed:
            kinds.append(_ID)
        else:
            # Lists, and what is kept of unknown fields, are left to `validate.check`.
            extra = field.name == EXTRA and declared.unknown == "keep"
            kinds.append(_OTHER if extra else _KINDS.get(field.type, _OTHER))
        names.append(field.name)
    if declared.served is not None:
        # It is in no column: what it says is.
        names.append(SERVED)
        kinds.append(_TEXT)
    # No record has a key of these bytes: a field `extra` that it brings itself is unknown like any other.
    kept = declared.unknown == "keep"
    blob = [b"\xff" if kept and name == EXTRA else name.encode() for name in names]
    ends = np.cumsum([0, *map(len, blob)]).astype(np.int64)
    data = np.frombuffer(b"".join(blob), np.uint8)
    return Layout(declared, data, ends, np.array(kinds, np.int64), {name: i for i, name in enumerate(names)})


@numba.njit(cache=True)
def _same(data: U8s, at: Word, names: U8s, start: Word, size: Word) -> Flag:
    for i in range(size):
        if data[at + i] != names[start + i]:
            return False
    return True


@numba.njit(cache=True)
def _column_of(data: U8s, at: Word, size: Word, names: U8s, name_at: I64s) -> Word:
    for column in range(len(name_at) - 1):
        start = name_at[column]
        if name_at[column + 1] - start == size and _same(data, at, names, start, size):
            return column
    return -1


@numba.njit(cache=True)
def _time_ns(data: U8s, at: Word) -> tuple[Flag, Word, Word]:
    """Return (whether it is an ordinary time, nanoseconds, what follows)."""
    kind, value, rest = head(data, at)
    if kind == ARRAY:
        if value < 1:
            return False, 0, rest
        kind, _, _ = head(data, rest)
        if kind == ARRAY:
            return False, 0, rest
        ok, time_ns, rest = _plain_time(data, rest)
        return ok, time_ns, skip(data, len(data), rest, value - 1, len(data))[1]
    return _plain_time(data, at)


@numba.njit(cache=True)
def _plain_time(data: U8s, at: Word) -> tuple[Flag, Word, Word]:
    kind, value, rest = head(data, at)
    if kind == INT:
        return -_NS_SECONDS_MAX < value < _NS_SECONDS_MAX, value * _NS, rest
    if kind == EXT and value == 8 and data[rest - 1] == 0:
        return True, big(data, rest, 4) * _NS + big(data, rest + 4, 4), rest + 8
    return False, 0, skip(data, len(data), at, 1, len(data))[1]


@numba.njit(cache=True)
def _real(data: U8s, at: Word, size: Word, scratch: U8s) -> Word:
    """Return the big-endian float of `size` bytes, 4 or 8."""
    for i in range(size):
        scratch[i] = data[at + size - 1 - i]
    if size == 8:
        return scratch.view(np.float64)[0]
    return np.float64(scratch.view(np.float32)[0])


@numba.njit(cache=True)
def _value(
    data: U8s,
    at: Word,
    want: Word,
    column: Word,
    row: Word,
    ints_CN: npt.NDArray[np.int64],
    floats_CN: npt.NDArray[np.float64],
    lens_CN: npt.NDArray[np.int32],
    valid_CN: Flags,
    scratch: U8s,
) -> tuple[Flag, Word]:
    """Put the value at `at` into its column; return (whether it is ordinary there, what follows)."""
    kind, value, at = head(data, at)
    valid_CN[column, row] = 1
    if kind == NIL:
        valid_CN[column, row] = 0
        return True, at
    if kind == STR or kind == BIN:
        if want != _TEXT and (want != _ID or value > ID_BYTES_MAX):
            return False, at
        ints_CN[column, row], lens_CN[column, row] = at, value
        if want == _ID and value == 0:
            valid_CN[column, row] = 0
        return valid_utf8(data, at, value), at + value
    if kind == INT:
        if want == _FLOAT or want == _FLOAT32:
            floats_CN[column, row] = value
            return True, at
        ints_CN[column, row], lens_CN[column, row] = value, NUMBER
        return want == _INT or want == _ID or want == _TIME or (want == _PLACE and 0 <= value <= PLACE_MAX), at
    if kind == FLOAT:
        real = _real(data, at, value, scratch)
        floats_CN[column, row] = real
        if want == _FLOAT:
            return real - real == 0.0, at + value
        if want == _FLOAT32:
            return -_FLOAT32_MAX <= real <= _FLOAT32_MAX, at + value
        if want != _INT or not -_EXACT_FLOAT <= real <= _EXACT_FLOAT:
            return False, at
        ints_CN[column, row] = np.int64(real)
        return real == np.floor(real), at + value
    ints_CN[column, row] = value
    return kind == BOOL and want == _BOOL, at


@numba.njit(cache=True)
def _column_at(data: U8s, at: Word, size: Word, pair: Word, names: U8s, name_at: I64s, hints: I64s) -> Word:
    """Return the column that a key names, or -1. Records of one sender have their keys in one order, which is tried."""
    if pair >= len(hints):
        return _column_of(data, at, size, names, name_at)
    column = hints[pair]
    if column >= 0 and name_at[column + 1] - name_at[column] == size and _same(data, at, names, name_at[column], size):
        return column
    hints[pair] = _column_of(data, at, size, names, name_at)
    return hints[pair]


@numba.njit(cache=True)
def _rows(
    data: U8s,
    starts_N: I64s,
    names: U8s,
    name_at: I64s,
    kinds_C: I64s,
    leave_unknown: Flag,
    ints_CN: npt.NDArray[np.int64],
    floats_CN: npt.NDArray[np.float64],
    lens_CN: npt.NDArray[np.int32],
    valid_CN: Flags,
    times_N: I64s,
    left_N: Flags,
) -> None:
    """Fill the columns; set `left_N` where a row is not ordinary."""
    scratch = np.zeros(8, np.uint8)
    # Of a field's value: the record itself is the first level.
    todo_L = np.zeros(LEVELS_MAX - 1, np.int64)
    hints = np.full(256, -1, np.int64)
    for row in range(len(starts_N)):
        left_N[row] = 1
        kind, count, at = head(data, starts_N[row])
        if kind != ARRAY or count < 2:
            continue
        ok, times_N[row], at = _time_ns(data, at)
        kind, count, at = head(data, at)
        if not ok or kind != MAP:
            continue
        for pair in range(count):
            kind, size, at = head(data, at)
            # A key that is no text names no field, but it may be nested.
            ok = kind == STR
            if not ok:
                break
            column = _column_at(data, at, size, pair, names, name_at, hints)
            at += size
            if column >= 0:
                # Whole arrays: a view of one row of them costs as much as the value.
                ok, at = _value(
                    data, at, kinds_C[column], column, row, ints_CN, floats_CN, lens_CN, valid_CN, scratch
                )  # fmt: skip
            elif leave_unknown:
                ok = False
            else:
                is_deep, at = nested(data, at, todo_L)
                ok = not is_deep
            if not ok:
                break
        left_N[row] = 0 if ok else 1


class Columns(msgspec.Struct, frozen=True):
    """Decoded rows: `batch` has one row an entry, of which those in `left` hold nothing yet."""

    batch: pa.RecordBatch
    left: I64s
    """Rows that are not ordinary, ascending."""
    own: npt.NDArray[np.bool_]
    """bool [N]: the event brings its id itself."""


def decode(
    made: Layout, data: U8s, starts_N: I64s, prefixes: Sequence[str], chunk_N: I64s, nth_N: I64s, taken_ms: range
) -> Columns:
    """Return the columns of the entries that begin at `starts_N`.

    Args:
        made: the type that all entries have by their tag.
        data: bodies, one after the other, uint8.
        starts_N: where each entry begins, as `entry_starts` found it, shifted by its body's place.
        prefixes: one a chunk; how the ids begin of events that bring none.
        chunk_N, nth_N: which chunk a row belongs to, and its number there.
        taken_ms: the event times that are accepted, none below 0.
    """
    rows, columns = len(starts_N), len(made.kinds)
    ints = np.zeros((columns, rows), np.int64)
    floats = np.zeros((columns, rows), np.float64)
    lens = np.zeros((columns, rows), np.int32)
    valid = np.zeros((columns, rows), np.uint8)
    times, left = np.zeros(rows, np.int64), np.zeros(rows, np.uint8)
    leave_unknown = made.declared.unknown != "drop"
    _rows(
        data, starts_N, made.names, made.name_at, made.kinds, leave_unknown, ints, floats, lens, valid, times, left
    )  # fmt: skip
    place_at, time_at = made.at["place"], made.at["event_time_ms"]
    ints[place_at][valid[place_at] == 0] = 0
    event_times = np.where(valid[time_at] == 1, ints[time_at], times // 1_000_000)
    ints[time_at] = event_times
    key_at, request_at = made.at[made.declared.key], made.at["request_id"]
    key_kind = int(made.kinds[key_at])
    if key_kind == _INT:
        lens[key_at] = NUMBER
    # `check` says what is missing, too long or out of time.
    missing = (valid[request_at] == 0) | (valid[key_at] == 0)
    if key_kind in (_TEXT, _ID):
        short = lens[key_at] != NUMBER
        missing |= short & ((lens[key_at] < 1) | (lens[key_at] > ID_BYTES_MAX))
    elif key_kind != _INT:
        missing[:] = True
    served, opened = made.declared.served, _opened(made, data, ints, lens, valid)
    if opened is not None:
        missing[list(opened.reasons)] = True
    missing |= (event_times < taken_ms.start) | (event_times >= taken_ms.stop)
    left |= missing.astype(np.uint8)
    if left.any():
        # What a row left behind must not be read: 1e300 is no float32.
        valid[:, left == 1] = 0
        floats[:, left == 1] = 0.0
    own = valid[made.at["event_id"]] == 1
    found: dict[str, pa.Array] = {}
    for field in made.declared.schema:
        c = key_at if field.name == "key" else made.at[field.name]
        kind = _TEXT if field.name == "key" else int(made.kinds[c])
        if field.name == "event_id":
            blob = [prefix.encode("utf-8", "replace") for prefix in prefixes]
            ends = np.cumsum([0, *map(len, blob)]).astype(np.int64)
            joined = np.frombuffer(b"".join(blob) or b"\0", np.uint8)
            offsets, text = gather_ids(data, ints[c], lens[c], valid[c], joined, ends, chunk_N, nth_N)
            found[field.name] = _text(offsets, text, None, rows)
        elif kind in (_TEXT, _ID):
            offsets, text = gather(data, ints[c], lens[c], valid[c])
            found[field.name] = _text(offsets, text, valid[c] if field.nullable else None, rows)
        elif kind == _OTHER:
            found[field.name] = pa.nulls(rows, field.type)
        else:
            is_valid_N = valid[c] if field.nullable else None
            found[field.name] = _numbers(field.type, kind, ints[c], floats[c], is_valid_N)
    if served is not None and opened is not None:
        served.fill(found, opened, opened.is_open_N & (left == 0))
    batch = pa.RecordBatch.from_arrays(list(found.values()), schema=made.declared.schema)
    return Columns(batch, np.flatnonzero(left), own)


def _opened(
    made: Layout,
    data: U8s,
    ints_CN: npt.NDArray[np.int64],
    lens_CN: npt.NDArray[np.int32],
    valid_CN: Flags,
) -> Opened | None:
    """Return what the tokens of impressions say; None where no row brings one."""
    c = made.at.get(SERVED, -1)
    if made.declared.served is None or not valid_CN[c].any():
        return None
    offsets, text = gather(data, ints_CN[c], lens_CN[c], valid_CN[c])
    return made.declared.served.open(_text(offsets, text, valid_CN[c], len(valid_CN[c])))


def _bitmap(valid_N: Flags | None) -> pa.Buffer | None:
    if valid_N is None or valid_N.all():
        return None
    return pa.py_buffer(np.packbits(valid_N, bitorder="little"))


def _text(offsets: I64s, text: U8s, valid_N: Flags | None, rows: int) -> pa.Array:
    if offsets[-1] >= 2**31:
        raise ValueError(f"{offsets[-1]} bytes of text in one column of a batch; Arrow's offsets hold 2 GiB")
    buffers = [_bitmap(valid_N), pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(text)]
    return pa.Array.from_buffers(pa.string(), rows, buffers)


def _numbers(
    kind: pa.DataType, code: int, ints_N: I64s, floats_N: npt.NDArray[np.float64], valid_N: Flags | None
) -> pa.Array:
    if code in (_FLOAT, _FLOAT32):
        values = floats_N if code == _FLOAT else floats_N.astype(np.float32)
        data = pa.py_buffer(values)
    elif code == _BOOL:
        data = pa.py_buffer(np.packbits(ints_N.astype(np.uint8), bitorder="little"))
    else:
        data = pa.py_buffer(ints_N.astype(np.int32) if code == _PLACE else ints_N)
    return pa.Array.from_buffers(kind, len(ints_N), [_bitmap(valid_N), data])
