"""Reads a record whose value is JSON, with one error for all that can be wrong with it. Pure."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def decode_json(data: bytes | str, kind: type[T] | Any) -> T:
    """Return the value as `kind`; unknown fields are ignored (growth rule).

    Raises `msgspec.DecodeError` and nothing else, whatever the bytes are: text that is no UTF-8 and nesting that is too
    deep come from the decoder as errors of other kinds, which no reader of a record expects.
    """
    try:
        found: T = msgspec.json.decode(data, type=kind)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(f"a text in it is no UTF-8: byte {error.start}") from error
    except RecursionError as error:
        raise msgspec.DecodeError("it is nested too deeply") from error
    return found
