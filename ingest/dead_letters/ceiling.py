"""A ceiling on the share of dead letters: a bad deploy is stopped while its shippers still hold its events. Pure.

Every declared tag has a window of its own; tags that nobody declared share one, and their share is that of all events.
So a fault of one service stops no other one. A window is

- *open*: chunks are taken; whatever is wrong with single events, they become dead letters.
- *shut*, once more than `dead_letter_share_max` of at least `dead_letter_events_min` events within
  `dead_letter_window_ms` were refused: chunks whose sender waits for an ack are neither taken nor acked, and not lost:
  their sender has them. What asks for no ack is taken all the same: its sender has forgotten it.
- *probing*, every `dead_letter_probe_ms`: one chunk is taken. If its share is good, the window opens, else it stays
  shut. Undeclared tags can never be good; their window opens once they have become few.

A restart opens all windows. With `dead_letter_share_max` 1 none ever shuts.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from typing import Literal

import msgspec

from headrace.contract.config import IngestConfig

UNDECLARED = "undeclared"
"""Names the shared window in metrics and alerts; a reason of dead letters, too."""
_SLOTS = 12
_TAGS_NAMED = 3


class Alert(msgspec.Struct, frozen=True):
    """A window that is not open."""

    tag: str
    """The declared tag, or `undeclared`."""
    reason: str
    """The most frequent reason."""
    share: float
    refused_events: int
    """Events of chunks that were not taken since it shut, repeats included."""
    text: str
    """What happened and what to do, in one line."""


class _Window:
    """Counts of one tag over the last `dead_letter_window_ms`, in twelve slots."""

    def __init__(self, slot_ms: int) -> None:
        self._slot_ms = slot_ms
        self._slots: deque[tuple[int, Counter[str]]] = deque()
        self.counts = Counter[str]()
        """By reason; "" counts what was appended."""
        self.state: Literal["open", "shut", "probing"] = "open"
        self.probe_at_ms = 0
        self.probe = Counter[str]()
        self.probe_events = 0
        self.refused_events = 0
        self.share, self.reason = 0.0, ""
        self.tags: deque[str] = deque(maxlen=_TAGS_NAMED)

    def add(self, now_ms: int, reason: str, events: int) -> None:
        self.forget(now_ms)
        start = now_ms // self._slot_ms
        if not self._slots or self._slots[-1][0] < start:
            self._slots.append((start, Counter()))
        self._slots[-1][1][reason] += events
        self.counts[reason] += events

    def forget(self, now_ms: int) -> None:
        oldest = now_ms // self._slot_ms - _SLOTS
        while self._slots and self._slots[0][0] <= oldest:
            self.counts -= self._slots.popleft()[1]

    def clear(self) -> None:
        self._slots.clear()
        self.counts.clear()
        self.tags.clear()


class Ceiling:
    """Says which tags' chunks are taken. Time comes in as a number; memory is bounded by the declared tags."""

    def __init__(self, config: IngestConfig, declared: Collection[str]) -> None:
        self._share_max, self._events_min = config.dead_letter_share_max, config.dead_letter_events_min
        self._probe_ms = config.dead_letter_probe_ms
        slot_ms = max(1, config.dead_letter_window_ms // _SLOTS)
        self._windows = {name: _Window(slot_ms) for name in (*declared, UNDECLARED)}
        self._declared = frozenset(declared)

    def name(self, tag: str) -> str:
        """Return the tag where it is declared, else `undeclared`: a label from a bounded set."""
        return tag if tag in self._declared else UNDECLARED

    def allows(self, tag: str, events: int, now_ms: int) -> bool:
        """Say whether a chunk of `events` is taken that its sender keeps until the ack."""
        name = self.name(tag)
        window = self._windows[name]
        if window.state == "open":
            return True
        if now_ms >= window.probe_at_ms:
            if name == UNDECLARED and self._few(window, now_ms):
                self._open(window)
            else:
                window.state, window.probe_events = "probing", max(1, events)
                window.probe.clear()
                # A probe without an outcome, because its events are repeats, is followed by another.
                window.probe_at_ms = now_ms + self._probe_ms
            return True
        window.refused_events += events
        if name == UNDECLARED:
            # What is not taken still counts, else the window would look empty and open at once.
            self._note(window, tag, now_ms, UNDECLARED, events)
        return False

    def note(self, tag: str, now_ms: int, *, appended: int = 0, dead: int = 0, reason: str = "") -> None:
        """Count what became of events that were taken: appended, or dead letters with a reason."""
        name = self.name(tag)
        window = self._windows[name]
        if appended:
            self._note(window, tag, now_ms, "", appended)
        if dead:
            self._note(window, tag, now_ms, reason, dead)
        if window.state == "open":
            if dead and self._bad(name, window, now_ms):
                window.state, window.refused_events = "shut", 0
                window.probe_at_ms = now_ms + self._probe_ms
        elif window.state == "probing":
            window.probe[""] += appended
            window.probe[reason] += dead
            if window.probe.total() >= window.probe_events:
                self._judge(window, now_ms)

    def alerts(self) -> list[Alert]:
        """Return every window that is not open, for readiness, metrics and the log."""
        return [self._alert(name, window) for name, window in self._windows.items() if window.state != "open"]

    def _note(self, window: _Window, tag: str, now_ms: int, reason: str, events: int) -> None:
        window.add(now_ms, reason, events)
        if reason and tag not in self._declared and tag not in window.tags:
            window.tags.append(tag)

    def _bad(self, name: str, window: _Window, now_ms: int) -> bool:
        dead = window.counts.total() - window.counts[""]
        if name == UNDECLARED:
            for other in self._windows.values():
                other.forget(now_ms)
            events = sum(other.counts.total() for other in self._windows.values())
        else:
            events = window.counts.total()
        if events < self._events_min or dead <= events * self._share_max:
            return False
        window.share = dead / events
        window.reason = max((r for r in window.counts if r), key=lambda r: window.counts[r])
        return True

    def _few(self, window: _Window, now_ms: int) -> bool:
        window.forget(now_ms)
        return window.counts.total() < self._events_min

    def _judge(self, window: _Window, now_ms: int) -> None:
        total = window.probe.total()
        dead = total - window.probe[""]
        if dead <= total * self._share_max:
            self._open(window)
            return
        window.share = dead / total
        window.reason = max((r for r in window.probe if r), key=lambda r: window.probe[r])
        window.state, window.probe_at_ms = "shut", now_ms + self._probe_ms

    @staticmethod
    def _open(window: _Window) -> None:
        window.state = "open"
        window.clear()

    def _alert(self, name: str, window: _Window) -> Alert:
        if name == UNDECLARED:
            shown = ", ".join(_printable(tag) for tag in window.tags)
            what = f"{window.share:.0%} of all events have tags that no event declares, such as {shown}"
        else:
            what = f"{window.share:.0%} of the events of tag {name} are refused, most as {window.reason}"
        text = (
            f"{what}; beyond ingest.dead_letter_share_max {self._share_max:.0%} their chunks stay unacked with their "
            f"shippers. See `headrace dead-letters list --reason {window.reason}` and correct the service or the "
            "declaration; or raise the share and restart, and retry the letters later."
        )
        return Alert(name, window.reason, window.share, window.refused_events, text)


def _printable(tag: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in tag[:40])
