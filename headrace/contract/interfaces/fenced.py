"""A topic of one partition with one writer at a time. Kafka's transactions and the log in memory implement it.

Protocol: 1. `open` makes this process the writer: appends of an earlier one fail from then on, and what it had begun is
aborted. 2. `append` commits records, all of them or none. 3. `read` sees committed records only.
"""

from __future__ import annotations

from typing import Protocol


class FencedWriter(Protocol):
    """Writes and reads back the topic. For one thread."""

    def open(self) -> None:
        """Become the writer, and fence off the one before. Raises `Unavailable`; call again then."""

    def append(self, *values: bytes) -> None:
        """Commit these records, in order: all of them or none.

        Raises `Unavailable` when it is not known whether they were written: `open` again and `read`. Raises
        `InvariantBroken` when another process became the writer.
        """

    def read(self, offset: int, wait_s: float = 0.0, *, kept_only: bool = False) -> list[tuple[int, bytes]]:
        """Return committed records from `offset` on, with their offsets. Needs no `open`.

        `wait_s` 0 reads to the present end; else it returns what comes first within `wait_s`, perhaps nothing.
        `kept_only` reads on from the first record that the topic still has, where `offset` lies before it or beyond the
        end. Without it that raises `InvariantBroken`: what is not there any more may not be skipped in silence.
        Raises `Unavailable` when the broker stays away.
        """

    def close(self) -> None:
        """Close the clients; the next writer need not wait for it."""
