"""Snapshots and deltas: how a model travels from the trainer to serving.

A version is the text "<run>-<step>": the model after that step of that run. A snapshot is a whole model, stored as one
blob and announced by a manifest in the compacted `model` topic (key "<model>/snapshot"). A delta in `deltas` moves a
model from version `base` to `version`: changed rows with absolute values, keys that no longer have a row, dense weights
(`dense_change`). A row that holds the values that its key begins with is in neither: serving needs no place for it.

Format 2: an Arrow IPC stream of a key and its values a row, float32 or float16 as the manifest's `rows` says, with the
manifest's JSON, the dense weights and the removed keys in the schema's metadata. A delta carries the SHA-256 of all
that it says (`content_sha256`); a snapshot's blob has its own in the announced manifest. Both name the digest of what
is then served (`served_digest`), which every server computes for itself.

Format 1 is what earlier releases wrote: columns of other names, float32 alone, all dense weights in each delta, no
removed keys, no digest of what is served. It is read, and no longer written. A later format is refused by its number;
releases that know format 1 alone refuse format 2 by the name of its first column.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.dense_change import PLAIN, DenseChange, change_of
from headrace.contract.formats.json_record import decode_json

FORMAT = 2
"""What is written. All up to it are read."""
RowsAs = Literal["float32", "float16"]
"""How the values of rows travel; serving holds them as float32 either way."""
_FLOAT16_MAX = np.float32(np.finfo(np.float16).max)
_TYPES: dict[str, tuple[pa.DataType, np.dtype[np.floating]]] = {
    "float32": (pa.float32(), np.dtype("<f4")),
    "float16": (pa.float16(), np.dtype("<f2")),
}


class UnknownFormat(InvariantBroken):
    """A later release wrote it: update this process."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot or delta is: identity, content, place in the chain."""

    kind: str
    """`snapshot` or `delta`."""
    model: str
    run: str
    step: int
    version: str
    base: str = ""
    """Delta: the version that it must be applied to. Empty on a snapshot."""
    chain: str = ""
    """Delta: the snapshot version that its chain begins with."""
    seq: int = 0
    """Delta: 1, 2, 3 ... along the chain."""
    positions: dict[str, list[int]] = {}
    """What the model contains; nothing while it learns the lake, see `stored_left`."""
    generation: int = 1
    spec: str = ""
    spec_json: str = ""
    """Snapshot: the FeatureSpec as JSON, so that serving featurizes with the spec the model was trained on."""
    recipe_json: str = ""
    dim: int = 0
    digest: str = ""
    """Snapshot: the model's digest (trainer.model.digest), the one replay must reach."""
    blob: str = ""
    """Snapshot: name in the blob store."""
    sha256: str = ""
    """Of the blob."""
    deltas_offset: int = 0
    """Snapshot: offset in `deltas` from which its chain can be read."""
    created_ms: int = 0
    format: int = 1
    """Of the blob or the delta, see above."""
    rows: str = "float32"
    """How the values of rows travel, see `RowsAs`."""
    served: str = ""
    """Digest of what is served of this version, see `served_digest`; empty in format 1."""
    digest_kind: str = ""
    """Of `digest`: see `trainer.model.digest`; empty in format 1, whose digests are SHA-256."""
    digest_parts: dict[str, str] = {}
    """What `digest` is put together from, by name."""
    stored_left: int = 0
    """How many rows of the lake are not learnt yet, of all tasks."""
    live: dict[str, list[int]] = {}
    """While some are left: up to where the topic was learnt beside the lake, behind what that holds. See `Mixed`."""


class Weights(msgspec.Struct, frozen=True):
    """Rows and dense weights: `keys_K` int64 (slot id bits), `values_KV` float32 [K, 1 + dim] (linear, embedding)."""

    keys_K: npt.NDArray[np.int64]
    values_KV: npt.NDArray[np.float32]
    dense: dict[str, npt.NDArray[np.float32]]
    gone_K: npt.NDArray[np.int64] = msgspec.field(default_factory=lambda: np.empty(0, np.int64))
    """Keys that have no row any more; none of them is in `keys_K`."""


class Update(msgspec.Struct, frozen=True):
    """What a snapshot or a delta says, before its dense weights are put together with those that were there."""

    keys_K: npt.NDArray[np.int64]
    values_KV: npt.NDArray[np.float32]
    gone_K: npt.NDArray[np.int64]
    dense: DenseChange

    def weights(self, base_N: npt.NDArray[np.uint32] | None = None) -> Weights:
        """Return rows and dense weights; `base_N` and what it raises as `DenseChange.bits`."""
        return Weights(self.keys_K, self.values_KV, self.dense.dense(base_N), self.gone_K)


def served_digest(rows: str, dense_sha256: str) -> str:
    """Return the digest of what is served: `RowSum.text` of the rows that have a place, then that of dense weights.

    Rows are summed as serving holds them: a key, and its values as they travelled, as float32.
    """
    return f"{rows}.{dense_sha256[:32]}"


def as_served(values_KV: npt.NDArray[np.float32], rows: str) -> npt.NDArray[np.float32]:
    """Return values as serving holds them when they travel as `rows`: float32 [K, V].

    A value beyond what float16 holds becomes the nearest that it does. Not a number stays that.
    """
    if rows == "float32":
        return values_KV
    return np.clip(values_KV, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16).astype(np.float32)


def encode_weights(weights: Weights, manifest: Manifest, dense: DenseChange | None = None) -> bytes:
    """Return weights and manifest as one Arrow IPC stream of format 2.

    Args:
        weights: with values that `as_served` leaves as they are.
        manifest: says format 2.
        dense: the dense weights as they travel; whole by default.
    """
    if manifest.format != FORMAT:
        raise InvariantBroken(f"{manifest.version} would be written as format {manifest.format}; {FORMAT} is written.")
    dense = change_of(weights.dense)[0] if dense is None else dense
    kind, dtype = _TYPES[manifest.rows]
    width = weights.values_KV.shape[1]
    numbers_N = np.ascontiguousarray(weights.values_KV, dtype).reshape(-1)
    keys_K = np.ascontiguousarray(weights.keys_K, "<i8")
    metadata = {
        b"manifest": msgspec.json.encode(manifest),
        b"shapes": msgspec.json.encode(dense.shapes),
        b"dense_how": dense.how.encode(),
        b"dense": dense.data,
        b"dense_sha256": dense.sha256.encode(),
        b"gone": np.ascontiguousarray(weights.gone_K, "<i8").tobytes(),
    }
    if manifest.kind == "delta":
        metadata[b"content_sha256"] = _content_sha256(metadata, keys_K, numbers_N)
    schema = pa.schema(_fields(FORMAT, width, kind), metadata=metadata)
    values = pa.FixedSizeListArray.from_arrays(pa.array(numbers_N, kind), width)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(keys_K, pa.int64()), values], schema=schema))
    return bytes(sink.getvalue())


def decode_weights(data: bytes, base_N: npt.NDArray[np.uint32] | None = None) -> tuple[Weights, Manifest]:
    """Read what `encode_weights` wrote, and what earlier releases wrote; `base_N` as `DenseChange.bits`.

    Raises as `decode_update` and `DenseChange.bits`.
    """
    update, manifest = decode_update(data)
    return update.weights(base_N), manifest


def decode_update(data: bytes) -> tuple[Update, Manifest]:
    """Read a snapshot or a delta of any format up to this release's.

    Raises `UnknownFormat` for a later one, and `InvariantBroken` for bytes that are anything else, or that do not match
    their digests.
    """
    try:
        return _decoded(data)
    except (pa.ArrowException, msgspec.MsgspecError, LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise InvariantBroken(f"{len(data)} bytes are no weights: {error}") from error
    except (OSError, MemoryError) as error:  # Arrow's words for a length that the stream does not hold.
        raise InvariantBroken(f"{len(data)} bytes of weights name a length that they do not hold: {error}") from error


def _decoded(data: bytes) -> tuple[Update, Manifest]:
    with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
        schema, meta = reader.schema, reader.schema.metadata or {}
        manifest = decode_manifest(meta[b"manifest"])
        check_format(manifest)
        kind, dtype = _TYPES[manifest.rows if manifest.format > 1 else "float32"]
        # Before a row is read: columns of other types have offsets, which damaged bytes could point anywhere.
        width = schema.field("values").type.list_size if pa.types.is_fixed_size_list(schema.field("values").type) else 0
        if not schema.equals(pa.schema(_fields(manifest.format, width, kind))):
            raise InvariantBroken(f"weights have the columns {schema.names} of other types than key and values.")
        table = reader.read_all().combine_chunks()
    table.validate(full=True)
    keys, values = table.column(0).combine_chunks(), table.column(1).combine_chunks()
    numbers = values.flatten()
    if keys.null_count or values.null_count or numbers.null_count:
        nulls = keys.null_count + values.null_count + numbers.null_count
        raise InvariantBroken(f"{manifest.version} has {nulls} nulls among its rows; do not serve it.")
    keys_K, numbers_N = keys.to_numpy(), np.asarray(numbers.to_numpy(zero_copy_only=False), dtype)
    said = meta.get(b"content_sha256", b"")
    is_due = bool(said) or (manifest.format > 1 and manifest.kind == "delta")
    if is_due and said != _content_sha256(meta, keys_K, numbers_N):
        raise InvariantBroken(f"rows or manifest of {manifest.version} do not match their digest; do not serve it.")
    shapes: dict[str, list[int]] = decode_json(meta[b"shapes"], dict[str, list[int]])
    how = meta[b"dense_how"].decode() if manifest.format > 1 else PLAIN
    dense = DenseChange(how, meta[b"dense"], shapes, meta[b"dense_sha256"].decode())
    gone_K = np.frombuffer(meta.get(b"gone", b""), "<i8")
    values_KV = numbers_N.astype(np.float32, copy=False).reshape(len(keys_K), width)
    return Update(keys_K, values_KV, gone_K, dense), manifest


def check_format(manifest: Manifest) -> None:
    """Raise `UnknownFormat` for what a later release wrote."""
    if not 1 <= manifest.format <= FORMAT or manifest.rows not in _TYPES:
        raise UnknownFormat(
            f"{manifest.kind} {manifest.version} is of format {manifest.format} with rows as {manifest.rows!r}, and "
            f"this release reads formats 1 to {FORMAT} with rows as {' or '.join(_TYPES)}: update it, then restart it."
        )


def _fields(number: int, width: int, kind: pa.DataType) -> list[pa.Field]:
    """Return the columns of a format. What knows format 1 alone names the first column when it refuses format 2."""
    key = "key" if number == 1 else f"key.format{number}"
    return [pa.field(key, pa.int64()), pa.field("values", pa.list_(kind, width))]


def _content_sha256(
    metadata: Mapping[bytes, bytes], keys_K: npt.NDArray[np.int64], numbers_N: npt.NDArray[np.floating]
) -> bytes:
    """Return the digest of manifest, shapes, dense weights, removed keys and rows, in this order."""
    found = hashlib.sha256()
    # Format 1 has neither of the last three, and their places are not counted there.
    names = [
        b"manifest",
        b"shapes",
        b"dense_sha256",
        *(n for n in (b"dense_how", b"dense", b"gone") if b"gone" in metadata),
    ]
    for part in (metadata[name] for name in names):
        found.update(len(part).to_bytes(8, "little") + part)
    found.update(np.ascontiguousarray(keys_K, "<i8").data)
    found.update(np.ascontiguousarray(numbers_N).data)
    return found.hexdigest().encode()


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as compact JSON."""
    return msgspec.json.encode(manifest)


def decode_manifest(data: bytes) -> Manifest:
    """Read what `encode_manifest` wrote. Raises as `decode_json`."""
    return decode_json(data, Manifest)
