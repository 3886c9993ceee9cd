"""Checkpoints: all that resumes a run, in one blob that is replaced atomically or not at all.

Name: `checkpoints/<model>/<run>-<step, 12 digits>`, so that the newest sorts last. Content: magic, SHA-256 of the
rest, then an uncompressed .npz of the learner's and the evaluation's arrays and of the `meta` below as JSON.
"""

from __future__ import annotations

import hashlib
import io
import logging

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.contract.formats.positions import Cursor
from headrace.contract.interfaces.blobs import Blobs

logger = logging.getLogger("headrace.train")

_MAGIC = b"HRCKPT1\n"
KEEP = 3

Arrays = dict[str, npt.NDArray[np.generic]]


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """Where the run stood."""

    run: str
    step: int
    steps_offset: int
    """The first record of `steps` that this checkpoint does not contain."""
    recipe: str
    """Digest of recipe and spec."""
    cursor: Cursor
    created_ms: int = 0


class Checkpoint(msgspec.Struct, frozen=True):
    """One checkpoint, in memory."""

    meta: Meta
    learner: Arrays
    evaluation: Arrays


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """Return the blob; `decode_checkpoint` gives back the same bits."""
    arrays: Arrays = {f"learner/{name}": array for name, array in checkpoint.learner.items()}
    arrays |= {f"evaluation/{name}": array for name, array in checkpoint.evaluation.items()}
    arrays["meta"] = np.frombuffer(msgspec.json.encode(checkpoint.meta), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    body = buffer.getvalue()
    return _MAGIC + hashlib.sha256(body).digest() + body


def decode_checkpoint(data: bytes) -> Checkpoint | None:
    """Read what `encode_checkpoint` wrote; None where the bytes are damaged or of another format."""
    head, digest, body = data[:8], data[8:40], data[40:]
    if head != _MAGIC or hashlib.sha256(body).digest() != digest:
        return None
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        return Checkpoint(
            msgspec.json.decode(arrays["meta"].tobytes(), type=Meta),
            {n.removeprefix("learner/"): arrays[n] for n in arrays.files if n.startswith("learner/")},
            {n.removeprefix("evaluation/"): arrays[n] for n in arrays.files if n.startswith("evaluation/")},
        )


def write_checkpoint(blobs: Blobs, model: str, checkpoint: Checkpoint) -> str:
    """Store it, delete all but the newest `KEEP`, and return its name. Raises `Unavailable`."""
    name = f"{checkpoint.meta.run}-{checkpoint.meta.step:012d}"
    blobs.put(f"checkpoints/{model}/{name}", encode_checkpoint(checkpoint))
    for old in _names(blobs, model)[:-KEEP]:
        blobs.delete(f"checkpoints/{model}/{old}")
    return name


def newest_checkpoint(blobs: Blobs, model: str, *, recipe: str) -> Checkpoint | None:
    """Return the newest readable checkpoint of this recipe, None without one. Raises `Unavailable`."""
    for name in reversed(_names(blobs, model)):
        data = blobs.get(f"checkpoints/{model}/{name}")
        checkpoint = decode_checkpoint(data) if data is not None else None
        if checkpoint is None:
            logger.warning("checkpoint %s is damaged or gone; trying the one before", name)
        elif checkpoint.meta.recipe == recipe:
            return checkpoint
    return None


def stored_versions(blobs: Blobs, model: str) -> set[int]:
    """Return the lake versions that the model's checkpoints are in the middle of. Raises `Unavailable`."""
    found: set[int] = set()
    for name in _names(blobs, model):
        data = blobs.get(f"checkpoints/{model}/{name}")
        checkpoint = decode_checkpoint(data) if data is not None else None
        if checkpoint is not None and checkpoint.meta.cursor.lake_version >= 0:
            found.add(checkpoint.meta.cursor.lake_version)
    return found


def _names(blobs: Blobs, model: str) -> list[str]:
    return sorted(name.rpartition("/")[2] for name in blobs.list(f"checkpoints/{model}"))
