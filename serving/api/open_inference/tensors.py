"""Tensors of the Open Inference Protocol: their values, from JSON or from bytes, and back. Pure.

A tensor has one element a candidate, shape [N] or [N, 1], or one for all of them, shape [1] or [1, 1].

| field of the project | datatypes |
|---|---|
| int64 | INT8 to INT64, UINT8 to UINT64, or a float that is whole |
| float64 | FP16, FP32, FP64, an integer; NaN is null |
| bool | BOOL |
| string | BYTES, UTF-8 |
| list[string], list[int64] | BYTES, each element a JSON array |
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.contract.errors import BadRequest
from headrace.contract.formats.json_record import decode_json
from headrace.contract.project import LISTS, FieldType

NUMBERS = {
    "BOOL": "?",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
"""Datatype -> NumPy's; BYTES is the other one."""
DATATYPE_OF: dict[FieldType, str] = {
    "int64": "INT64",
    "float64": "FP64",
    "string": "BYTES",
    "bool": "BOOL",
    "list[string]": "BYTES",
    "list[int64]": "BYTES",
}
"""The datatype that the model's metadata names for a field."""
_AS_DECLARED = "see the model's metadata, GET /v2/models/{name}"


class Tensor(msgspec.Struct, kw_only=True):
    """One input: its values as JSON says them, or its bytes."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    raw: bytes | None = None

    def wrong(self, said: str) -> BadRequest:
        """Return the refusal of this tensor."""
        return BadRequest(422, f"input {self.name[:100]!r}: {said}", _AS_DECLARED)

    @property
    def rows(self) -> int:
        """How many candidates it has an element for. Raises `BadRequest` for another shape."""
        is_column = len(self.shape) == 1 or (len(self.shape) == 2 and self.shape[1] == 1)
        if not is_column or self.shape[0] < 1:
            raise self.wrong(f"shape {self.shape[:8]}; [N] is wanted, one element a candidate, or [1] for all")
        return self.shape[0]


def values_of(tensor: Tensor, kind: FieldType | None) -> list[Any]:
    """Return the elements of a tensor, None for null.

    Args:
        kind: the declared type of its field; None where there is no such field.

    Raises `BadRequest` where bytes, shape and datatype do not fit together. Whether the values are of the field's type
    is for `merge` to say.
    """
    rows = tensor.rows
    if tensor.datatype != "BYTES" and tensor.datatype not in NUMBERS:
        raise tensor.wrong(f"datatype {tensor.datatype[:20]!r}; there are BYTES, {', '.join(NUMBERS)}")
    if tensor.raw is not None:
        values = _from_bytes(tensor, rows)
    elif tensor.data is not None:
        values = _from_json(tensor)
    else:
        raise tensor.wrong("it has no data")
    if len(values) != rows:
        raise tensor.wrong(f"shape {tensor.shape} says {rows} elements, and it has {len(values)}")
    if tensor.datatype == "BYTES" and kind in LISTS:
        return [_list_of(tensor, value) for value in values]
    return values


def _from_json(tensor: Tensor) -> list[Any]:
    values = tensor.data or []
    if len(tensor.shape) == 2 and values and all(isinstance(row, list) for row in values):
        values = [value for row in values for value in row]
    if any(isinstance(value, list | dict) for value in values):
        raise tensor.wrong(f"data is nested deeper than shape {tensor.shape}")
    return values


def _from_bytes(tensor: Tensor, rows: int) -> list[Any]:
    raw = tensor.raw or b""
    if tensor.datatype == "BYTES":
        return _texts(tensor, raw, rows)
    number = np.dtype(NUMBERS[tensor.datatype])
    if len(raw) != rows * number.itemsize:
        raise tensor.wrong(f"{len(raw)} bytes; {rows} of {tensor.datatype} take {rows * number.itemsize}")
    found = np.frombuffer(raw, number)
    if number.kind == "b" and np.any(found.view(np.uint8) > 1):
        raise tensor.wrong("a byte of BOOL is neither 0 nor 1")
    values: list[Any] = found.tolist()
    if number.kind != "f":
        return values
    if np.any(np.isinf(found)):
        raise tensor.wrong("a number is infinite")
    return [None if math.isnan(value) else value for value in values]


def _texts(tensor: Tensor, raw: bytes, rows: int) -> list[str]:
    values: list[str] = []
    at = 0
    while at < len(raw) and len(values) <= rows:
        size = int.from_bytes(raw[at : at + 4], "little")
        text = raw[at + 4 : at + 4 + size]
        if at + 4 + size > len(raw):
            raise tensor.wrong(f"element {len(values)} of BYTES says {size} bytes, beyond the end")
        values.append(text_of(tensor, text))
        at += 4 + size
    return values


def text_of(tensor: Tensor, text: bytes) -> str:
    """Return an element of BYTES as text. Raises `BadRequest` where it is no UTF-8."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise tensor.wrong("an element is no UTF-8") from error


def _list_of(tensor: Tensor, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return decode_json(value, list[Any] | None)
    except msgspec.DecodeError as error:
        raise tensor.wrong('an element is no JSON array, such as ["a"]') from error


def numbers_bytes(values: list[float]) -> bytes:
    """Return FP64 elements as bytes."""
    array: npt.NDArray[np.float64] = np.array(values, "<f8")
    return array.tobytes()


def texts_bytes(values: list[str]) -> bytes:
    """Return BYTES elements as bytes: the length of each, four bytes, little-endian, and its text."""
    return b"".join(len(text).to_bytes(4, "little") + text for text in (value.encode() for value in values))
