"""Snapshots and deltas of format 1, as the releases before format 2 wrote them."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import pyarrow as pa

from headrace.contract.formats.snapshot import Manifest, Weights


def encode_format_1(weights: Weights, manifest: Manifest) -> bytes:
    """Return weights and manifest as one Arrow IPC stream; the manifest has no field that format 1 did not have."""
    said = {n: v for n, v in msgspec.to_builtins(manifest).items() if n not in NEWER}
    shapes = {name: list(array.shape) for name, array in weights.dense.items()}
    dense = b"".join(np.ascontiguousarray(a, dtype="<f4").tobytes() for a in weights.dense.values())
    width = weights.values_KV.shape[1]
    metadata = {
        b"manifest": msgspec.json.encode(said),
        b"shapes": msgspec.json.encode(shapes),
        b"dense": dense,
        b"dense_sha256": hashlib.sha256(dense).hexdigest().encode(),
    }
    if manifest.kind == "delta":
        found = hashlib.sha256()
        for part in (metadata[b"manifest"], metadata[b"shapes"], metadata[b"dense_sha256"]):
            found.update(len(part).to_bytes(8, "little") + part)
        found.update(np.ascontiguousarray(weights.keys_K, dtype="<i8").data)
        found.update(np.ascontiguousarray(weights.values_KV, dtype="<f4").data)
        metadata[b"content_sha256"] = found.hexdigest().encode()
    fields = [pa.field("key", pa.int64()), pa.field("values", pa.list_(pa.float32(), width))]
    schema = pa.schema(fields, metadata=metadata)
    values = pa.FixedSizeListArray.from_arrays(pa.array(weights.values_KV.reshape(-1), pa.float32()), width)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(weights.keys_K, pa.int64()), values], schema=schema))
    return bytes(sink.getvalue())


NEWER = {"format", "rows", "served", "digest_kind", "digest_parts"}
