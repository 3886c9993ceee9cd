"""The settings of `[lake]` in the words of a Delta table."""

from __future__ import annotations

import hashlib

from headrace.contract.config import LakeConfig

# Entries of Delta's log that a reader opens at most; the library's default of 100 is slow to read on HDFS.
CHECKPOINT_COMMITS = 20


def number_of(topic_id: str) -> int:
    """Return 63 bits of a hash of a topic's id: application transactions hold numbers alone."""
    return int.from_bytes(hashlib.sha256(topic_id.encode()).digest()[:8], "big") >> 1


def properties(config: LakeConfig) -> dict[str, str]:
    """Return the table's properties in Delta's words."""
    return {
        "delta.deletedFileRetentionDuration": f"interval {max(1, config.vacuum_ms // 1000)} seconds",
        "delta.logRetentionDuration": f"interval {max(1, config.history_ms // 1000)} seconds",
        "delta.checkpointInterval": str(CHECKPOINT_COMMITS),
    }
