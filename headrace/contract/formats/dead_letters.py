"""Dead letters: what was refused, why, from where; and the marks that a retry of them leaves.

The `dead-letters` topic has one partition of JSON values, keyed by origin; a letter's id is its offset there. The
`retries` topic has the marks, JSON too, written by one retry at a time. Both grow at the end of their structs, every
new field with a default; what a reader does not know it ignores.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from headrace.contract.formats.json_record import decode_json

Fate = Literal["appended", "repeated", "skipped", "refused", "unknown", "open"]
"""What became of a letter that was offered again: its event is in the log (`appended`), was there already
(`repeated`), is none by the corrected mapping (`skipped`), or was refused again, which a newer letter tells
(`refused`). A retry that finds what a killed one left behind also writes `open`, nothing was appended, and `unknown`,
the log no longer reaches back that far."""


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
    retry_of: int = -1
    """Offset of the letter that was offered again and became this one; -1 where there is none."""
    attempts: int = 0
    """How many times the event was offered again before this letter."""


class RetryMark(msgspec.Struct, frozen=True, kw_only=True):
    """What a retry is about to do (`retrying`: `letters`, `ends`), or what came of it (`retried`: `outcomes`)."""

    step: Literal["retrying", "retried"]
    run: str
    """One run of `headrace dead-letters retry`."""
    at_ms: int
    letters: tuple[int, ...] = ()
    ends: dict[int, int] = {}
    """End offset of each partition of `events` before anything was offered."""
    outcomes: dict[int, Fate] = {}


def encode_dead_letter(letter: DeadLetter) -> bytes:
    """Return the record's value: JSON, `raw` as base64."""
    return msgspec.json.encode(letter)


def decode_dead_letter(data: bytes) -> DeadLetter:
    """Read what `encode_dead_letter` wrote. Raises as `decode_json`."""
    return decode_json(data, DeadLetter)


def encode_retry_mark(mark: RetryMark) -> bytes:
    """Return the record's value: JSON."""
    return msgspec.json.encode(mark)


def decode_retry_mark(data: bytes) -> RetryMark:
    """Read what `encode_retry_mark` wrote. Raises as `decode_json`."""
    return decode_json(data, RetryMark)
