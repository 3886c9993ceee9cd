"""Dead letters: what was refused, why, from where. JSON values in the `dead-letters` topic, keyed by origin."""

from __future__ import annotations

import msgspec


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """One refused event. `raw` is msgpack of the record, cut to the gateway's bound; `event_id` "" where unknown."""

    reason: str
    """Stable code: `undeclared`, `no_partition_key`, `no_request_id`, `bad_type`, `unknown_field`, `future`, ..."""
    detail: str
    origin: str
    tag: str
    event_id: str = ""
    time_ns: int = 0
    raw: bytes = b""
    raw_truncated: bool = False
    gateway: str = ""
    seen_ms: int = 0


def encode_dead_letter(letter: DeadLetter) -> bytes:
    """Return the record's value: JSON, `raw` as base64."""
    return msgspec.json.encode(letter)


def decode_dead_letter(data: bytes) -> DeadLetter:
    """Read what `encode_dead_letter` wrote."""
    return msgspec.json.decode(data, type=DeadLetter)
