"""Every error that Headrace raises on purpose, sorted by what the caller does next.

HeadraceError
├── EventRejected     dead-letter the event, go on with the next one
├── ConfigRejected    refuse to start, tell the user which line to change
├── Overloaded        slow down and offer the same thing again
├── Unavailable       back off, retry, stop after a while: something outside is away
└── InvariantBroken   stop at once and keep the evidence: going on would corrupt data
"""

from __future__ import annotations


class HeadraceError(Exception):
    """Base of all errors below; a message holds values with units, the limit and the next step."""


class EventRejected(HeadraceError):
    """One event cannot be taken; `reason` is the dead letter's stable code, such as `no_partition_key`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ConfigRejected(HeadraceError):
    """The configuration or the user's project is wrong; nothing was started."""


class Overloaded(HeadraceError):
    """A bound is reached; the caller slows down and offers again, nothing was taken."""


class Unavailable(HeadraceError):
    """Kafka, HDFS or another outside part does not answer; retry with back-off."""


class InvariantBroken(HeadraceError):
    """Data contradicts a guarantee; stop and keep the evidence."""
