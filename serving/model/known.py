"""What a recent version contains, as the shared region keeps it for who asks later."""

from __future__ import annotations

import msgspec

from headrace.contract.formats.snapshot import Manifest


class Known(msgspec.Struct, frozen=True, array_like=True):
    """What a version contains, as its manifest said."""

    version: str
    positions: dict[str, list[int]]
    stored_left: int = 0
    live: dict[str, list[int]] = {}


def encode_known(manifest: Manifest) -> bytes:
    """Return it as JSON."""
    return msgspec.json.encode(Known(manifest.version, manifest.positions, manifest.stored_left, manifest.live))


def decode_known(data: bytes) -> Known:
    """Read what `encode_known` wrote, and what earlier releases wrote. Raises `msgspec.DecodeError`."""
    return msgspec.json.decode(data, type=Known)
