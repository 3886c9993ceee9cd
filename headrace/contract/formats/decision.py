"""Decisions of people and of rules about a model: records of the `model` topic, in the order of the log.

A decision is a fact with its reason. The key of each is its own, so that compaction keeps them all.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from headrace.contract.formats.json_record import decode_json

KIND = "decision"
"""The value of the header `kind`."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided about one project's model."""

    model: str
    """The project's name."""
    what: Literal["promote", "rollback"]
    variant: str = ""
    """`promote`: the variant that is served from here on. `rollback`: the variant whose run is left. "" is the model
    under the project's own name."""
    run: str = ""
    """`rollback`: the run that goes on."""
    refused_run: str = ""
    """`rollback`: nothing of this run is served from here on, from the step behind `refused_after` on."""
    refused_after: int = 0
    reason: str = ""
    by: str = ""
    """Who decided: user and host, or the rule's name."""
    created_ms: int = 0


def key_of(decision: Decision) -> str:
    """Return the record's key."""
    return f"{decision.model}/decision/{decision.created_ms:013d}"


def encode_decision(decision: Decision) -> bytes:
    """Return the record's value: compact JSON, keys in declared order."""
    return msgspec.json.encode(decision)


def decode_decision(data: bytes) -> Decision:
    """Read what `encode_decision` wrote. Raises as `decode_json`."""
    return decode_json(data, Decision)
