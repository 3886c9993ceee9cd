"""A ceiling on the share of dead letters: a bad deploy is stopped while its shippers still hold its events. Pure.

Every declared tag is counted by itself; tags that nobody declared are counted together, as a share of all events. So a
fault of one service stops no other one. And whoever sends good events of a tag is not stopped by who does not:

1. The tag decides whether: it is *above the ceiling* while more than `dead_letter_share_max` of at least
   `dead_letter_events_min` events within `dead_letter_window_ms` were refused.
2. The origin decides whose: while the tag is above, an origin whose own share is bad is *shut* out. Its chunks whose
   sender waits for an ack are neither taken nor acked, and not lost: their sender has them. What asks for no ack is
   taken all the same: its sender has forgotten it. All others pass.
3. *Probing*, every `dead_letter_probe_ms`: one chunk of each origin that is shut out is taken. If its share is good,
   the origin passes again, else it stays shut out; what the others send opens nothing. Undeclared tags can never be
   good; their origin passes again once they have become few.
4. Origins of which too little is known (`origins`) are judged together by network, from `dead_letter_events_min` of
   their first events on: whoever changes its address does not get round the ceiling.

A restart forgets everything, and so does an origin's silence for a window. With `dead_letter_share_max` 1 none is ever
shut out. Memory is bounded by the declared tags and by `ORIGINS_MAX`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

import msgspec

from headrace.contract.config import IngestConfig
from headrace.ingest.dead_letters.gate import GOOD, Gate, Shares
from headrace.ingest.dead_letters.origins import Origins

UNDECLARED = "undeclared"
"""Names all undeclared tags together in metrics and alerts; a reason of dead letters, too."""
_SLOTS = 12
_NAMED = 3


class Alert(msgspec.Struct, frozen=True):
    """A tag of which some origin is shut out."""

    tag: str
    """The declared tag, or `undeclared`."""
    reason: str
    """The most frequent reason."""
    share: float
    refused_events: int
    """Events of chunks that were not taken since the first origin was shut out, repeats included."""
    text: str
    """What happened and what to do, in one line."""
    origins: int = 1
    """Origins that are shut out; the unknown ones of a network are one."""
    has_good: bool = False
    """Whether somebody else sends good events of the tag."""


class _Tag:
    """What is known of one tag."""

    def __init__(self, config: IngestConfig, *, declared: bool) -> None:
        window_ms, events_min = config.dead_letter_window_ms, config.dead_letter_events_min
        # A fifth: five unknown origins whose events are all bad shut out the unknown ones of their network.
        trial = max(1, events_min // 5)

        def gate(is_network: bool) -> Gate:
            return Gate(
                window_ms,
                share_max=config.dead_letter_share_max,
                probe_ms=config.dead_letter_probe_ms,
                judged_from=events_min if is_network else trial,
                # Of an unknown origin a network counts no more.
                probe_events_max=trial if is_network else 1 << 60,
                dead_max=0 if declared else events_min,
            )

        self.counts = Shares(window_ms, _SLOTS)
        self.origins = Origins(gate, trial=trial, window_ms=window_ms)
        self.share, self.reason, self.refused_events = 0.0, "", 0
        self.tags: deque[str] = deque(maxlen=_NAMED)


class Ceiling:
    """Says whose chunks of which tags are taken. Time comes in as a number."""

    def __init__(self, config: IngestConfig, declared: Collection[str]) -> None:
        self._share_max, self._events_min = config.dead_letter_share_max, config.dead_letter_events_min
        self._declared = frozenset(declared)
        self._tags = {name: _Tag(config, declared=True) for name in declared}
        self._tags[UNDECLARED] = _Tag(config, declared=False)

    def name(self, tag: str) -> str:
        """Return the tag where it is declared, else `undeclared`: a label from a bounded set."""
        return tag if tag in self._declared else UNDECLARED

    def allows(self, tag: str, origin: str, events: int, now_ms: int) -> bool:
        """Say whether a chunk of `events` is taken that its sender keeps until the ack."""
        one = self._tags[self.name(tag)]
        gate = one.origins.gate(origin, now_ms)
        if gate is None:
            return True
        self._judge(one, gate, now_ms)
        if gate.allows(events, now_ms):
            return True
        one.refused_events += events
        self._remember(one, tag)
        return False

    def note(self, tag: str, origin: str, now_ms: int, *, appended: int = 0, dead: int = 0, reason: str = "") -> None:
        """Count what became of events that were taken: appended, or dead letters with a reason."""
        name = self.name(tag)
        if name != UNDECLARED:
            self._note(self._tags[UNDECLARED], origin, now_ms, appended + dead, 0, UNDECLARED)
        else:
            self._remember(self._tags[name], tag)
        self._note(self._tags[name], origin, now_ms, appended, dead, reason)

    def alerts(self, now_ms: int) -> list[Alert]:
        """Return every tag of which an origin is shut out, for readiness, metrics and the log."""
        for one in self._tags.values():
            one.origins.tidy(now_ms)
        return [self._alert(name, one, shut) for name, one in self._tags.items() if (shut := one.origins.shut())]

    @property
    def size(self) -> int:
        """Gates that are held in memory."""
        return sum(one.origins.size for one in self._tags.values())

    def _note(self, one: _Tag, origin: str, now_ms: int, good: int, bad: int, reason: str) -> None:
        if good:
            one.counts.add(now_ms, GOOD, good)
        if bad:
            one.counts.add(now_ms, reason, bad)
        for gate in one.origins.note(origin, now_ms, good=good, bad=bad):
            if bad:
                self._judge(one, gate, now_ms)

    def _judge(self, one: _Tag, gate: Gate, now_ms: int) -> None:
        """Shut an open gate whose share is bad while the tag is above the ceiling."""
        if gate.state != "open" or not gate.is_bad(now_ms):
            return
        one.counts.forget(now_ms)
        total, dead = one.counts.total, one.counts.dead
        if total < self._events_min or dead <= total * self._share_max:
            return
        if not one.origins.shut():
            one.refused_events = 0
        one.share, one.reason = dead / total, one.counts.main_reason()
        gate.shut(now_ms)

    def _remember(self, one: _Tag, tag: str) -> None:
        if tag not in self._declared and tag not in one.tags:
            one.tags.append(tag)

    def _alert(self, name: str, one: _Tag, shut: dict[str, Gate]) -> Alert:
        has_good = one.origins.has_good()
        if name == UNDECLARED:
            shown = ", ".join(_printable(tag) for tag in one.tags)
            what = f"{one.share:.0%} of all events have tags that no event declares, such as {shown}"
        else:
            what = f"{one.share:.0%} of the events of tag {name} are refused, most as {one.reason}"
        most = sorted(shut, key=lambda origin: -shut[origin].refused_events)[:_NAMED]
        who = ", ".join(map(_printable, most)) + (f" and {len(shut) - _NAMED} more" if len(shut) > _NAMED else "")
        text = (
            f"{what}; beyond ingest.dead_letter_share_max {self._share_max:.0%} the chunks of {who} stay unacked with "
            f"their shippers{', others pass' if has_good else ''}. See `headrace dead-letters list --reason "
            f"{one.reason}` and correct the service or the declaration; or raise the share and restart, and retry the "
            "letters later."
        )
        return Alert(name, one.reason, one.share, one.refused_events, text, len(shut), has_good)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:60])
