"""A consumer group in this process: same contract as `group_kafka`, for tests and simulations."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from headrace.backends.log.memory import MemoryLog
from headrace.contract.interfaces.group import Claim, Fetched, MemberStatus


class MemoryGroups:
    """The positions of one group in one topic, and who holds what. Members share partitions in turn."""

    def __init__(self, log: MemoryLog, topic: str) -> None:
        self.log, self.topic = log, topic
        self.committed: dict[int, int] = {}
        self.members: list[MemoryGroup] = []
        self.claimed = 0

    def join(self) -> MemoryGroup:
        """Add a member; the others give partitions away to it."""
        member = MemoryGroup(self)
        self.members.append(member)
        self.share()
        return member

    def crash(self, member: MemoryGroup) -> None:
        """Take a member out that commits nothing any more."""
        self.members.remove(member)
        member.claims.clear()
        member.queue.clear()
        self.share()

    def share(self) -> None:
        """Give partition i to member i modulo their number; who loses one commits what it settled before."""
        for partition in range(len(self.log.partitions(self.topic))):
            holder = self.members[partition % len(self.members)] if self.members else None
            for member in self.members:
                if member is not holder:
                    member.give(partition)
            if holder is not None:
                holder.hold(partition)


class MemoryGroup:
    """One member. What it settles is committed with the next `commit`, at the latest when a partition is given away."""

    def __init__(self, groups: MemoryGroups) -> None:
        self._groups = groups
        self.claims: dict[int, Claim] = {}
        self.queue: deque[Fetched] = deque()
        self._settled: dict[int, int] = {}
        self._next: dict[int, int] = {}
        self._paused: frozenset[Claim] = frozenset()
        self._gap = 0

    def hold(self, partition: int) -> None:
        """Begin a partition at the group's position; nothing where it is held."""
        if partition in self.claims:
            return
        self._groups.claimed += 1
        self.claims[partition] = Claim(self._groups.topic, partition, self._groups.claimed)
        begin = self._groups.log.begins[self._groups.topic, partition]
        at = self._groups.committed.get(partition, begin)
        self._gap += max(0, begin - at)
        self._next[partition] = max(begin, at)

    def give(self, partition: int) -> None:
        """Commit what is settled of a partition and let it go."""
        if partition in self.claims:
            self.commit()
            del self.claims[partition]
            self._settled.pop(partition, None)
            self.queue = deque(one for one in self.queue if one.claim.partition != partition)

    def commit(self) -> None:
        """Make the settled positions the group's."""
        self._groups.committed.update(self._settled)
        self._settled.clear()

    def take(self, records_max: int) -> Sequence[Fetched]:
        """Return up to `records_max` records, in order within a claim."""
        for partition, claim in self.claims.items():
            if claim in self._paused:
                continue
            records = self._groups.log.partitions(self._groups.topic)[partition]
            begin = self._groups.log.begins[self._groups.topic, partition]
            for record in records[self._next[partition] - begin :]:
                self.queue.append(Fetched(claim, record.offset, record.value, record.timestamp_ms))
            self._next[partition] = begin + len(records)
        return [self.queue.popleft() for _ in range(min(records_max, len(self.queue)))]

    def settle(self, claim: Claim, offset: int) -> None:
        """Let the group's position be `offset` with the next commit; nothing for a claim that is not held."""
        if self.held(claim):
            self._settled[claim.partition] = offset

    def pause(self, claims: Collection[Claim]) -> None:
        """Return no more records of these claims; what was read ahead of them is read again."""
        self._paused = frozenset(claims)
        for one in reversed(self.queue):
            if one.claim in self._paused:
                self._next[one.claim.partition] = one.offset
        self.queue = deque(one for one in self.queue if one.claim not in self._paused)

    def held(self, claim: Claim) -> bool:
        """Say whether the claim is still held."""
        return self.claims.get(claim.partition) == claim

    def status(self) -> MemberStatus:
        """Return the member's status."""
        ends = {p: self._groups.log.begins[self._groups.topic, p] for p in self.claims}
        parts = self._groups.log.partitions(self._groups.topic)
        lag = sum(ends[p] + len(parts[p]) - self._next[p] for p in self.claims)
        return MemberStatus(len(self.claims), lag, self._gap, False)

    def close(self, timeout_s: float) -> None:
        """Commit and leave; the others share what it held."""
        if self in self._groups.members:
            for partition in list(self.claims):
                self.give(partition)
            self._groups.members.remove(self)
            self._groups.share()
