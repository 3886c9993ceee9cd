"""A gate: whether the chunks that one origin sends of one tag are taken, by what became of its events. Pure.

A gate is *open*, *shut*, or *probing*: every `probe_ms` a shut one lets one chunk through, and the share of bad events
in it decides whether the gate opens.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Literal

GOOD = ""
"""Counts what was appended, beside the reasons of dead letters."""
_DEAD = "dead"


class Shares:
    """Counts by name over the last `window_ms`, forgotten slot by slot."""

    __slots__ = ("_slot_ms", "_slots", "_slots_max", "counts")

    def __init__(self, window_ms: int, slots: int) -> None:
        self._slot_ms, self._slots_max = max(1, window_ms // slots), slots
        self._slots: deque[tuple[int, Counter[str]]] = deque()
        self.counts = Counter[str]()

    def add(self, now_ms: int, name: str, events: int) -> None:
        """Count events."""
        self.forget(now_ms)
        start = now_ms // self._slot_ms
        if not self._slots or self._slots[-1][0] < start:
            self._slots.append((start, Counter()))
        self._slots[-1][1][name] += events
        self.counts[name] += events

    def forget(self, now_ms: int) -> None:
        """Forget what is older than the window."""
        oldest = now_ms // self._slot_ms - self._slots_max
        while self._slots and self._slots[0][0] <= oldest:
            self.counts -= self._slots.popleft()[1]

    def clear(self) -> None:
        """Forget everything."""
        self._slots.clear()
        self.counts.clear()

    @property
    def total(self) -> int:
        """All events."""
        return self.counts.total()

    @property
    def dead(self) -> int:
        """Those that are not good."""
        return self.counts.total() - self.counts[GOOD]

    def main_reason(self) -> str:
        """Return the most frequent name of what is not good; there must be one."""
        return max((name for name in self.counts if name != GOOD), key=lambda name: self.counts[name])


class Gate:
    """One origin's gate, or that of all unknown origins of a network."""

    __slots__ = (
        "_dead_max",
        "_judged_from",
        "_probe_bad",
        "_probe_events",
        "_probe_events_max",
        "_probe_good",
        "_probe_ms",
        "_share_max",
        "counts",
        "probe_at_ms",
        "refused_events",
        "seen_ms",
        "state",
    )

    def __init__(
        self, window_ms: int, *, share_max: float, probe_ms: int, judged_from: int, probe_events_max: int, dead_max: int
    ) -> None:
        """Make an open gate.

        Args:
            window_ms: time over which events count.
            share_max: largest share of bad events.
            probe_ms: time between probes.
            judged_from: fewest events within the window from which the share says something.
            probe_events_max: most events of a probe whose outcome is waited for.
            dead_max: where it is not 0, what is refused counts as bad too, and the gate opens at a probe when fewer bad
                events came within the window. For tags that nobody declares: no probe of theirs can be good.
        """
        # Four slots: there are a thousand gates.
        self.counts = Shares(window_ms, 4)
        self._share_max, self._probe_ms, self._judged_from = share_max, probe_ms, judged_from
        self._probe_events_max, self._dead_max = probe_events_max, dead_max
        self.state: Literal["open", "shut", "probing"] = "open"
        self.seen_ms = self.probe_at_ms = self.refused_events = 0
        self._probe_events = self._probe_good = self._probe_bad = 0

    def is_bad(self, now_ms: int) -> bool:
        """Say whether enough events tell that too many are bad."""
        self.counts.forget(now_ms)
        total = self.counts.total
        return total >= self._judged_from and self.counts.dead > total * self._share_max

    def is_good(self) -> bool:
        """Say whether it is open and events were good."""
        counts = self.counts
        return self.state == "open" and counts.counts[GOOD] > 0 and counts.dead <= counts.total * self._share_max

    def shut(self, now_ms: int) -> None:
        """Take nothing until a probe."""
        self.state, self.refused_events = "shut", 0
        self.probe_at_ms = now_ms + self._probe_ms

    def allows(self, events: int, now_ms: int) -> bool:
        """Say whether a chunk of `events` is taken."""
        self.seen_ms = now_ms
        if self.state == "open":
            return True
        if now_ms < self.probe_at_ms:
            self.refused_events += events
            if self._dead_max:
                # What is not taken still counts, else the window would look empty and open at once.
                self.counts.add(now_ms, _DEAD, events)
            return False
        self.counts.forget(now_ms)
        if self._dead_max and self.counts.dead < self._dead_max:
            self._open()
            return True
        self.state = "probing"
        self._probe_events = min(max(1, events), self._probe_events_max)
        self._probe_good = self._probe_bad = 0
        # A probe without an outcome, because its events are repeats, is followed by another.
        self.probe_at_ms = now_ms + self._probe_ms
        return True

    def note(self, now_ms: int, *, good: int = 0, bad: int = 0) -> None:
        """Count what became of events; the last outcome of a probe opens the gate or shuts it again."""
        self.seen_ms = now_ms
        if good:
            self.counts.add(now_ms, GOOD, good)
        if bad:
            self.counts.add(now_ms, _DEAD, bad)
        if self.state != "probing":
            return
        # Declared events of whoever sends undeclared ones too do not make those good.
        self._probe_good += 0 if self._dead_max else good
        self._probe_bad += bad
        probed = self._probe_good + self._probe_bad
        if probed < self._probe_events:
            return
        if self._probe_bad <= probed * self._share_max:
            self._open()
        else:
            self.state, self.probe_at_ms = "shut", now_ms + self._probe_ms

    def _open(self) -> None:
        self.state = "open"
        self.counts.clear()
