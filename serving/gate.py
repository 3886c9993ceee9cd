"""The gate: what may be served. A refusal names its reason, and the model that is served stays."""

from __future__ import annotations

import hashlib

import numpy as np

from headrace.contract.errors import InvariantBroken
from headrace.contract.snapshot import Manifest, Weights, decode_weights


class Refused(InvariantBroken):
    """A snapshot or delta that must not be served; `reason` is a stable code for the metric."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def admit_snapshot(manifest: Manifest, data: bytes, *, dim: int) -> Weights:
    """Return the snapshot's weights, or raise `Refused`: wrong SHA-256, another version, wrong width, not finite."""
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.sha256:
        raise Refused("sha256", f"{manifest.blob} has SHA-256 {found}, its manifest says {manifest.sha256}.")
    return _admit(manifest, data, dim)[0]


def admit_delta(data: bytes, *, base: str, dim: int) -> tuple[Weights, Manifest]:
    """Return a delta's weights and manifest, or raise `Refused`; `base` is the version that is served now."""
    weights, manifest = _admit(None, data, dim)
    if manifest.base != base:
        raise Refused("base", f"delta {manifest.version} is for {manifest.base}; {base} is served.")
    return weights, manifest


def _admit(expected: Manifest | None, data: bytes, dim: int) -> tuple[Weights, Manifest]:
    try:
        weights, manifest = decode_weights(data)
    except (InvariantBroken, KeyError, ValueError, OSError) as error:
        raise Refused("damaged", f"weights of {len(data)} bytes cannot be read: {error}") from error
    if expected is not None and manifest.version != expected.version:
        raise Refused("version", f"the blob holds {manifest.version}, its manifest says {expected.version}.")
    if weights.values_KV.shape[1] != 1 + dim:
        raise Refused("dim", f"{manifest.version} has rows of {weights.values_KV.shape[1]} values, not {1 + dim}.")
    if not np.isfinite(weights.values_KV).all() or not all(np.isfinite(a).all() for a in weights.dense.values()):
        raise Refused("not_finite", f"{manifest.version} has weights that are NaN or infinite.")
    return weights, manifest
