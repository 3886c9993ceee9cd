"""Which requests wait for their turn, how long, and which are refused at once. Pure: time comes in as a parameter.

One process computes one answer after another, so what is offered beyond its capacity waits. The wait is bounded:

1. *offer*: a request's cost is estimated by what requests of its size took. Its wait is the cost of what comes before
   it. Beyond `bound_s` it is refused (429) before its body is decoded; so is one whose time would be over then (504).
2. *take*: short bodies and long ones have a lane each, and both get half of the time while both wait. So no request
   waits for all the long ones, and no long one for all the short ones.
3. What has waited for twice the bound all the same, or has no time left, is refused when its turn comes, and is not
   computed. So an answer waited for twice the bound at most, however wrong the estimates were.
4. *done*: the time to the next turn corrects the estimate, what the sockets took included.
"""

from __future__ import annotations

import math
from collections import deque

import msgspec

from headrace.contract.errors import BadRequest

SHORT_BYTES = 2_048
"""A body up to this has the lane of short ones: some 50 candidates."""
_DOWN, _UP, _JUMP = 0.25, 0.125, 4.0
"""Shares by which an estimate follows a shorter or a longer time, and how far beyond it a longer one counts: a turn
that stood still once, for a compilation or a pause of the machine, is forgotten within some turns."""


class Ticket(msgspec.Struct, eq=False):
    """A request that was taken."""

    size: int
    """Bytes of its body."""
    cost_s: float
    """What it is estimated to take."""
    offered_s: float
    until_s: float
    """When its answer is of no use any more."""
    is_long: bool


class Admission:
    """The requests of one process that wait or are computed."""

    def __init__(self, bound_s: float) -> None:
        self.bound_s = bound_s
        self._lanes: tuple[deque[Ticket], deque[Ticket]] = deque(), deque()
        self._waiting_s = [0.0, 0.0]
        """Cost of what waits, by lane."""
        self._given_s = [0.0, 0.0]
        """Time that each lane was given; the one with less comes next."""
        self._costs: dict[int, float] = {}
        """Seconds a request by the number of bits of its size."""
        self._turn: tuple[Ticket, float] | None = None

    def __len__(self) -> int:
        return sum(map(len, self._lanes))

    def offer(self, size: int, now_s: float, until_s: float = math.inf) -> Ticket:
        """Take a request of `size` bytes. Raises `BadRequest`: 429 the wait is too long, 504 its time would be over."""
        lane = size > SHORT_BYTES
        cost_s, wait_s = self._cost_s(size), self.wait_s(lane, now_s)
        if now_s + wait_s + cost_s > until_s:
            raise too_late(until_s - now_s, wait_s, cost_s)
        if wait_s > self.bound_s:
            raise self._crowded(wait_s)
        ticket = Ticket(size, cost_s, now_s, until_s, lane)
        if not self._lanes[lane]:
            # A lane that was empty has saved nothing up.
            self._given_s[lane] = max(self._given_s[lane], self._given_s[not lane] if self._lanes[not lane] else 0.0)
        self._lanes[lane].append(ticket)
        self._waiting_s[lane] += cost_s
        return ticket

    def wait_s(self, lane: int, now_s: float) -> float:
        """Return the estimated wait of what a lane takes next: the turn that is on, its own lane, and as much of the
        other one as gets its share meanwhile."""
        on_s = 0.0 if self._turn is None else max(0.0, self._turn[0].cost_s - (now_s - self._turn[1]))
        own_s, other_s = self._waiting_s[lane], self._waiting_s[not lane]
        return on_s + own_s + min(own_s, other_s)

    def take(self, now_s: float) -> Ticket | None:
        """Return whose turn it is, None where nobody waits. The turn is on until `done`, or until the next `take`."""
        self._learn(now_s)
        waiting = [lane for lane in (0, 1) if self._lanes[lane]]
        if not waiting:
            return None
        lane = min(waiting, key=lambda each: self._given_s[each])
        ticket = self._lanes[lane].popleft()
        self._waiting_s[lane] = self._waiting_s[lane] - ticket.cost_s if self._lanes[lane] else 0.0
        self._given_s[lane] += ticket.cost_s
        self._turn = ticket, now_s
        return ticket

    def check(self, ticket: Ticket, now_s: float) -> None:
        """Raise `BadRequest` where a request whose turn has come is not worth computing: 429 or 504 as `offer`."""
        if now_s + ticket.cost_s > ticket.until_s:
            raise too_late(ticket.until_s - now_s, 0.0, ticket.cost_s)
        if now_s - ticket.offered_s > 2 * self.bound_s:
            raise self._crowded(now_s - ticket.offered_s)

    def done(self, now_s: float, *, computed: bool = True) -> None:
        """End the turn that is on. While others wait, what it took is measured to the beginning of the next one."""
        if not computed:
            self._turn = None
        elif not len(self):
            self._learn(now_s)

    def _learn(self, now_s: float) -> None:
        if self._turn is None:
            return
        (ticket, begun_s), self._turn = self._turn, None
        took_s, bits = now_s - begun_s, ticket.size.bit_length()
        known_s = self._costs.get(bits)
        if known_s is None:
            self._costs[bits] = took_s
        elif took_s < known_s:
            self._costs[bits] += (took_s - known_s) * _DOWN
        else:
            self._costs[bits] += (min(took_s, _JUMP * known_s) - known_s) * _UP

    def _cost_s(self, size: int) -> float:
        """Return what a request of this size takes, by the nearest size that is known; 0 before the first one."""
        bits = size.bit_length()
        if not self._costs:
            return 0.0
        near = min(self._costs, key=lambda each: abs(each - bits))
        return self._costs[near] * 2.0 ** max(0, bits - near)

    def _crowded(self, wait_s: float) -> BadRequest:
        return BadRequest(
            429,
            f"requests wait for {wait_s * 1_000:.0f} ms, and {self.bound_s * 1_000:.0f} are allowed (serve.queue_ms)",
            "ask again later, or give serving more processes (serve.workers)",
            reason="queue_full",
            retry_ms=max(1, math.ceil(wait_s * 1_000)),
        )


def too_late(left_s: float, wait_s: float, cost_s: float) -> BadRequest:
    """Return the refusal of a request that cannot be answered in the time that it has left."""
    left = f"{left_s * 1_000:.0f} ms of its time are left" if left_s > 0 else "its time is over"
    return BadRequest(
        504,
        f"{left}, and an answer takes {(wait_s + cost_s) * 1_000:.1f} ms, {wait_s * 1_000:.1f} of them waiting",
        "allow more time (timeout_ms), send fewer candidates, or give serving more processes (serve.workers)",
        reason="too_late",
    )
