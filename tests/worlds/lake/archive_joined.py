"""What the join makes of a log, as one digest: for tests that read one log in several ways."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from join_world import LONG, PROJECT

from headrace.contract.interfaces.log import Record
from headrace.stream.join.join import JoinState

PARTITIONS = 2


def digest(found: Iterable[Record]) -> str:
    """Return the SHA-256 of all samples that the join makes of these records."""
    joins = [JoinState(PROJECT, LONG, silent_ms=300, partition=p) for p in range(PARTITIONS)]
    parts = [hashlib.sha256() for _ in joins]
    for record in found:
        emitted = joins[record.partition].take(record)
        if emitted is not None:
            parts[record.partition].update(repr(emitted.batch.to_pydict()).encode())
    return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()
