"""What the Kafka source needs of a consumer group: records of the partitions held, and a position each to come back to.

Unlike `log.Reader`, whose positions travel with the data, a group keeps its positions in the broker:
the topic belongs to somebody else, and several gateways share its partitions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import msgspec


class Claim(msgspec.Struct, frozen=True):
    """One time that this member held a partition; a later assignment of the same partition is another claim."""

    topic: str
    partition: int
    number: int


class Fetched(msgspec.Struct, frozen=True):
    """One record of a partition that this member held when it was read."""

    claim: Claim
    offset: int
    value: bytes | None
    timestamp_ms: int | None


class MemberStatus(msgspec.Struct, frozen=True):
    """One member now: partitions held, records that wait in them beyond what was read, records deleted unread."""

    partitions: int
    lag_records: int | None
    """None while it is not known of every partition held: what is not known is not nothing."""
    gap_records: int
    """Records that retention deleted before this group read them, since the start."""
    away: bool
    """No broker answers; it goes on by itself when one does."""


class Group(Protocol):
    """One member of a consumer group, for one topic. It reads ahead within a bound; no call but `close` waits."""

    def take(self, records_max: int) -> Sequence[Fetched]:
        """Return up to `records_max` records, in order within a claim; nothing while there is none."""

    def settle(self, claim: Claim, offset: int) -> None:
        """Let the group's position of the claim's partition be `offset`, the first record that is not settled.

        It is committed soon, at the latest when the partition is given away or in `close`. Of a claim that is no
        longer held it does nothing: the next holder reads again from what was committed.
        """

    def pause(self, claims: Collection[Claim]) -> None:
        """Return no more records of these claims, and go on with all others; replaces the former pause.

        What was read ahead of a paused claim takes no room: it is read again when the claim goes on.
        """

    def held(self, claim: Claim) -> bool:
        """Say whether the claim is still held."""

    def status(self) -> MemberStatus:
        """Return the member's status."""

    def close(self, timeout_s: float) -> None:
        """Commit what was settled, leave the group and free what is held, within `timeout_s`."""
