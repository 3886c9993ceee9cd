"""Snapshots and deltas: how a model travels from the trainer to serving.

A version is the text "<run>-<step>": the model after that step of that run. A snapshot is a whole model, stored as one
blob and announced by a manifest in the compacted `model` topic (key "<model>/snapshot"). A delta in `deltas` moves a
model from version `base` to `version`: touched rows with absolute values, all dense weights. Both are Arrow IPC
streams of a key and its values a row, with the dense weights and the manifest's JSON in the schema's metadata. A
delta carries the SHA-256 of all that it says (`content_sha256`, absent in what release 0.1 stored); a snapshot's blob
has its own in the announced manifest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.json_record import decode_json


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


class Weights(msgspec.Struct, frozen=True):
    """Rows and dense weights: `keys_K` int64 (slot id bits), `values_KV` float32 [K, 1 + dim] (linear, embedding)."""

    keys_K: npt.NDArray[np.int64]
    values_KV: npt.NDArray[np.float32]
    dense: dict[str, npt.NDArray[np.float32]]


def encode_weights(weights: Weights, manifest: Manifest) -> bytes:
    """Return weights and manifest as one Arrow IPC stream."""
    shapes = {name: list(array.shape) for name, array in weights.dense.items()}
    dense = b"".join(np.ascontiguousarray(a, dtype="<f4").tobytes() for a in weights.dense.values())
    width = weights.values_KV.shape[1]
    values = pa.FixedSizeListArray.from_arrays(pa.array(weights.values_KV.reshape(-1), pa.float32()), width)
    metadata = {
        b"manifest": msgspec.json.encode(manifest),
        b"shapes": msgspec.json.encode(shapes),
        b"dense": dense,
        b"dense_sha256": hashlib.sha256(dense).hexdigest().encode(),
    }
    if manifest.kind == "delta":
        metadata[b"content_sha256"] = _content_sha256(metadata, weights)
    schema = pa.schema(_fields(width), metadata=metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(weights.keys_K, pa.int64()), values], schema=schema))
    return bytes(sink.getvalue())


def decode_weights(data: bytes) -> tuple[Weights, Manifest]:
    """Read what `encode_weights` wrote.

    Raises `InvariantBroken` for bytes that are anything else, or that do not match their digests.
    """
    try:
        return _decoded(data)
    except (pa.ArrowException, msgspec.MsgspecError, LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise InvariantBroken(f"{len(data)} bytes are no weights: {error}") from error
    except (OSError, MemoryError) as error:  # Arrow's words for a length that the stream does not hold.
        raise InvariantBroken(f"{len(data)} bytes of weights name a length that they do not hold: {error}") from error


def _decoded(data: bytes) -> tuple[Weights, Manifest]:
    with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
        schema, meta = reader.schema, reader.schema.metadata or {}
        # Before a row is read: columns of other types have offsets, which damaged bytes could point anywhere.
        width = schema.field("values").type.list_size if pa.types.is_fixed_size_list(schema.field("values").type) else 0
        if not schema.equals(pa.schema(_fields(width))):
            raise InvariantBroken(f"weights have the columns {schema.names} of other types than key and values.")
        table = reader.read_all().combine_chunks()
    table.validate(full=True)
    manifest = decode_manifest(meta[b"manifest"])
    raw = meta[b"dense"]
    if hashlib.sha256(raw).hexdigest().encode() != meta[b"dense_sha256"]:
        raise InvariantBroken(f"dense weights of {manifest.version} do not match their digest; do not serve them.")
    shapes: dict[str, list[int]] = decode_json(meta[b"shapes"], dict[str, list[int]])
    dense: dict[str, npt.NDArray[np.float32]] = {}
    flat, at = np.frombuffer(raw, dtype="<f4"), 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        dense[name] = flat[at : at + count].reshape(shape)
        at += count
    keys, values = table.column("key").combine_chunks(), table.column("values").combine_chunks()
    numbers = values.flatten()
    if keys.null_count or values.null_count or numbers.null_count or at != len(flat):
        raise InvariantBroken(
            f"{manifest.version} has {keys.null_count + values.null_count + numbers.null_count} nulls among its rows "
            f"and {len(flat)} dense weights for shapes of {at}; do not serve it."
        )
    weights = Weights(keys.to_numpy(), numbers.to_numpy(zero_copy_only=False).reshape(len(keys), width), dense)
    if meta.get(b"content_sha256", b"") not in (b"", _content_sha256(meta, weights)):
        raise InvariantBroken(f"rows or manifest of {manifest.version} do not match their digest; do not serve it.")
    return weights, manifest


def _fields(width: int) -> list[pa.Field]:
    return [pa.field("key", pa.int64()), pa.field("values", pa.list_(pa.float32(), width))]


def _content_sha256(metadata: Mapping[bytes, bytes], weights: Weights) -> bytes:
    """Return the digest of manifest, shapes, dense weights and rows, in this order."""
    found = hashlib.sha256()
    for part in (metadata[b"manifest"], metadata[b"shapes"], metadata[b"dense_sha256"]):
        found.update(len(part).to_bytes(8, "little") + part)
    found.update(np.ascontiguousarray(weights.keys_K, dtype="<i8").data)
    found.update(np.ascontiguousarray(weights.values_KV, dtype="<f4").data)
    return found.hexdigest().encode()


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as compact JSON."""
    return msgspec.json.encode(manifest)


def decode_manifest(data: bytes) -> Manifest:
    """Read what `encode_manifest` wrote. Raises as `decode_json`."""
    return decode_json(data, Manifest)
