"""Snapshots and deltas: how a model travels from the trainer to serving.

A version is the text "<run>-<step>": the model after that step of that run. A snapshot is a whole model, stored as one
blob and announced by a manifest in the compacted `model` topic (key "<model>/snapshot"). A delta in `deltas` moves a
model from version `base` to `version`: touched rows with absolute values, all dense weights. Both are Arrow IPC
streams of `ROWS` with the dense weights and the manifest's JSON in the schema's metadata.
"""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.errors import InvariantBroken


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
    schema = pa.schema(
        [pa.field("key", pa.int64()), pa.field("values", pa.list_(pa.float32(), width))],
        metadata={
            b"manifest": msgspec.json.encode(manifest),
            b"shapes": msgspec.json.encode(shapes),
            b"dense": dense,
            b"dense_sha256": hashlib.sha256(dense).hexdigest().encode(),
        },
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(weights.keys_K, pa.int64()), values], schema=schema))
    return bytes(sink.getvalue())


def decode_weights(data: bytes) -> tuple[Weights, Manifest]:
    """Read what `encode_weights` wrote. Raises `InvariantBroken` when the dense part does not match its digest."""
    with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
        table = reader.read_all()
        meta = reader.schema.metadata
    manifest = msgspec.json.decode(meta[b"manifest"], type=Manifest)
    raw = meta[b"dense"]
    if hashlib.sha256(raw).hexdigest().encode() != meta[b"dense_sha256"]:
        raise InvariantBroken(f"dense weights of {manifest.version} do not match their digest; do not serve them.")
    dense: dict[str, npt.NDArray[np.float32]] = {}
    flat, at = np.frombuffer(raw, dtype="<f4"), 0
    for name, shape in msgspec.json.decode(meta[b"shapes"], type=dict[str, list[int]]).items():
        count = int(np.prod(shape, dtype=np.int64))
        dense[name] = flat[at : at + count].reshape(shape)
        at += count
    table = table.combine_chunks()
    values = table.column("values").combine_chunks()
    width = values.type.list_size
    return (
        Weights(
            table.column("key").to_numpy(),
            values.flatten().to_numpy(zero_copy_only=False).reshape(-1, width),
            dense,
        ),
        manifest,
    )


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as compact JSON."""
    return msgspec.json.encode(manifest)


def decode_manifest(data: bytes) -> Manifest:
    """Read what `encode_manifest` wrote; unknown fields are ignored (growth rule)."""
    return msgspec.json.decode(data, type=Manifest)
