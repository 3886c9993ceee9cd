"""The rows of a model as files, sorted by key: Parquet to look into, safetensors to look ids up in.

The safetensors file has two tensors, `keys` int64 [K] and `values` float32 [K, V], little-endian, so that a process
maps it into its memory and finds an id by halving; whoever else maps the file shares that memory.
Both are written in pieces of rows: nothing is copied whole but the order.

Axes: K keys, V = 1 + dim values of a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import parquet

from headrace.contract.formats.snapshot import Weights
from headrace.contract.recipe import Recipe

PIECE_ROWS = 131_072
KEYS, VALUES = "keys", "values"
"""Names of the tensors."""


def row_bytes(recipe: Recipe) -> int:
    """Return the bytes of a row, its key among them."""
    return 8 + 4 * (1 + recipe.row_dim)


def ascending(weights: Weights) -> npt.NDArray[np.int64]:
    """Return the places of the rows in ascending order of their keys: int64 [K]."""
    return np.argsort(weights.keys_K, kind="stable")


def write_parquet(path: Path, weights: Weights, recipe: Recipe, order_K: npt.NDArray[np.int64]) -> None:
    """Write `key` and what a row weighs: of `logistic` `weight.<task>`, else `weight` and `embedding`, a list."""
    if recipe.model == "logistic":
        fields = [pa.field(f"weight.{task}", pa.float32(), nullable=False) for task in recipe.heads]
    else:
        item = pa.field("item", pa.float32(), nullable=False)
        fields = [
            pa.field("weight", pa.float32(), nullable=False),
            pa.field("embedding", pa.list_(item), nullable=False),
        ]
    schema = pa.schema([pa.field("key", pa.int64(), nullable=False), *fields])
    with (
        path.open("wb") as file,
        parquet.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as writer,
    ):
        for keys_K, values_KV in _pieces(weights, order_K):
            if recipe.model == "logistic":
                columns = [pa.array(column_K) for column_K in values_KV.T.copy()]
            else:
                ends = np.arange(len(keys_K) + 1, dtype=np.int32) * recipe.dim
                flat = pa.array(np.ascontiguousarray(values_KV[:, 1:]).reshape(-1))
                embedding = pa.ListArray.from_arrays(pa.array(ends), flat, type=schema.field("embedding").type)
                columns = [pa.array(values_KV[:, 0].copy()), embedding]
            writer.write_batch(pa.RecordBatch.from_arrays([pa.array(keys_K), *columns], schema=schema))


def write_safetensors(path: Path, weights: Weights, order_K: npt.NDArray[np.int64], about: dict[str, str]) -> None:
    """Write `keys` and `values`, with `about` as the file's metadata."""
    keys, width = len(order_K), weights.values_KV.shape[1]
    cut = 8 * keys
    header = {
        "__metadata__": dict(sorted(about.items())),
        KEYS: {"dtype": "I64", "shape": [keys], "data_offsets": [0, cut]},
        VALUES: {"dtype": "F32", "shape": [keys, width], "data_offsets": [cut, cut + 4 * width * keys]},
    }
    text = msgspec.json.encode(header)
    # Tensors begin at a multiple of 8, so that they can be used where they lie.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for keys_K, _ in _pieces(weights, order_K):
            file.write(keys_K.astype("<i8").tobytes())
        for _, values_KV in _pieces(weights, order_K):
            file.write(values_KV.astype("<f4").tobytes())
        file.flush()
        os.fsync(file.fileno())


def _pieces(
    weights: Weights, order_K: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    for begin in range(0, len(order_K), PIECE_ROWS):
        here_K = order_K[begin : begin + PIECE_ROWS]
        yield weights.keys_K[here_K], weights.values_KV[here_K]
