"""The settings of `[lake]` in the words of a Delta table."""

from __future__ import annotations

from headrace.contract.config import LakeConfig

# Entries of Delta's log that a reader opens at most; the library's default of 100 is slow to read on HDFS.
CHECKPOINT_COMMITS = 20


def properties(config: LakeConfig) -> dict[str, str]:
    """Return the table's properties in Delta's words."""
    return {
        "delta.deletedFileRetentionDuration": f"interval {max(1, config.vacuum_ms // 1000)} seconds",
        "delta.logRetentionDuration": f"interval {max(1, config.history_ms // 1000)} seconds",
        "delta.checkpointInterval": str(CHECKPOINT_COMMITS),
    }
