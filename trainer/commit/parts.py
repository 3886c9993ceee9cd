"""Parts: arrays by name in the safetensors format, whose bytes are written piece by piece from where the arrays lie.

A part is immutable: its name has the SHA-256 of its bytes, so what a name says is what is stored or nothing. Arrays of
texts, which the format does not know, stand in its metadata as JSON. The format has neither code nor pickles in it, and
any safetensors reader opens it.

Source of the format: huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

Arrays = dict[str, npt.NDArray[np.generic]]

PART_BYTES = 16 * 1024 * 1024
"""Small arrays share a part up to here; a larger one has its own."""
_DTYPES = {
    "?": "BOOL",
    "u1": "U8",
    "u2": "U16",
    "u4": "U32",
    "u8": "U64",
    "i1": "I8",
    "i2": "I16",
    "i4": "I32",
    "i8": "I64",
    "f2": "F16",
    "f4": "F32",
    "f8": "F64",
}
_BYTES = 8


class Part(msgspec.Struct, frozen=True):
    """A part that is stored."""

    name: str
    """Below the folder of the model's parts."""
    sha256: str
    """In hex."""
    bytes: int


class Encoded(msgspec.Struct, frozen=True):
    """A part that is not stored yet: its bytes lie where the arrays do."""

    part: Part
    pieces: list[bytes | memoryview]


def encode_part(run: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Encoded:
    """Return the part of these arrays, which must not change until it is stored."""
    texts = {name: array for name, array in arrays.items() if array.dtype.kind == "U"}
    # The widest first: each array begins at a multiple of its width.
    ordered = sorted(arrays.keys() - texts.keys(), key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, object] = {}
    if texts:
        header["__metadata__"] = {n: msgspec.json.encode(texts[n].tolist()).decode() for n in sorted(texts)}
    at, pieces = 0, list[bytes | memoryview]()
    for name in ordered:
        array = np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape)
        dtype = _DTYPES[array.dtype.newbyteorder("<").str.lstrip("<|").replace("b1", "?")]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
        if array.size:
            pieces.append(array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data)
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % _BYTES)
    pieces.insert(0, len(text).to_bytes(_BYTES, "little") + text)
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(piece)
    digest = sha.hexdigest()
    return Encoded(Part(f"{run}-{digest[:32]}.safetensors", digest, _BYTES + len(text) + at), pieces)


def decode_part(data: bytes) -> Arrays:
    """Read what `encode_part` wrote. Raises `ValueError` where it is none."""
    try:
        arrays: Arrays = dict(safetensors.numpy.load(data))
        header = msgspec.json.decode(data[_BYTES : _BYTES + int.from_bytes(data[:_BYTES], "little")])
        texts = header.get("__metadata__", {})
        return arrays | {name: np.array(msgspec.json.decode(text), np.str_) for name, text in texts.items()}
    except (safetensors.SafetensorError, msgspec.DecodeError) as error:
        raise ValueError(f"{error}") from error


def grouped(arrays: Arrays) -> Iterator[Arrays]:
    """Yield the arrays in groups that fit in a part; at least one, which may be empty."""
    group, size = Arrays(), 0
    for name, array in arrays.items():
        if group and size + array.nbytes > PART_BYTES:
            yield group
            group, size = Arrays(), 0
        group[name] = array
        size += array.nbytes
    yield group


def decode_npz(body: bytes) -> Arrays:
    """Read the arrays of a checkpoint that was one .npz. Raises `ValueError` where it is none."""
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
