"""What a stage's two probes say, decided when they are asked: a stage that stands still cannot say so itself.

1. *own word*: the stage says with `ready` whether it works, and why not.
2. *signs*: of whatever must go on, the stage's loop, a broker that answers, a sign is expected again and again. One
   that has been missing for longer than its bound makes /readyz red, by name.
3. *restart*: a sign that a new process may bring back has a second, longer bound, after which /healthz is red. A broker
   or store that is away has none: a restart would not bring it back.
4. *asleep*: time in which the whole process stood still, as by SIGSTOP, counts for no sign (`awake.py`).
5. *threads*: one that has ended while the stage works makes both red at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from headrace.process.awake import awake_s

LOOP, READING, RECEIPTS = "loop", "reading", "receipts"
LOOP_READY_S, LOOP_HEALTHY_S = 15.0, 240.0
"""A loop turns within a second, and the longest work between two turns takes some; the stream's own watchdog ends its
process after 180 s. The second bound is above that, so that a stage which writes down where it stands does so first."""


@dataclass
class _Sign:
    seen_s: float
    ready_s: float
    healthy_s: float | None
    why: str = ""
    is_first: bool = False
    """True until the first sign, where the stage is not ready before it."""


class Health:
    """The state behind /readyz and /healthz. Thread-safe: every write is one assignment."""

    def __init__(self, monotonic: Callable[[], float] = awake_s) -> None:
        self._monotonic = monotonic
        self._own = (False, "starting")
        self._signs: dict[str, _Sign] = {}
        self._measured: dict[str, tuple[Callable[[], float], float]] = {}
        self._threads: dict[str, Callable[[], bool]] = {}

    def ready(self, is_ready: bool, reason: str = "") -> None:
        """Say whether the stage does its work, and if not, what it waits for."""
        self._own = (is_ready, reason)

    def expect(self, what: str, *, ready_s: float, healthy_s: float | None = None, from_first: bool = False) -> None:
        """Expect signs of `what` from now on: red without one for `ready_s`, to be restarted after `healthy_s`.

        With `from_first` it is red until the first sign, too: a stage that was started anew knows nothing of before.
        """
        self._signs[what] = _Sign(self._monotonic(), ready_s, healthy_s, is_first=from_first)

    def seen(self, what: str) -> None:
        """Note a sign of `what`."""
        if (sign := self._signs.get(what)) is not None:
            sign.seen_s, sign.why, sign.is_first = self._monotonic(), "", False

    def missed(self, what: str, why: str) -> None:
        """Note why there is no sign of `what`; for the probe's text."""
        if (sign := self._signs.get(what)) is not None:
            sign.why = why

    def forget(self, what: str) -> None:
        """Expect no more signs of `what`: it has ended in good order."""
        for kept in (self._signs, self._measured, self._threads):
            kept.pop(what, None)

    def measure(self, what: str, still_s: Callable[[], float], *, ready_s: float) -> None:
        """Let `still_s` say, when a probe is asked, for how long there has been no sign of `what`."""
        self._measured[what] = (still_s, ready_s)

    def thread(self, what: str, is_alive: Callable[[], bool]) -> None:
        """Expect that a thread lives until it is forgotten."""
        self._threads[what] = is_alive

    def state(self) -> tuple[bool, str]:
        """Return what /readyz says: whether the stage works, and the reason or what else there is to know."""
        is_ready, reason = self._own
        found = self._ended() + self._missing(lambda sign: -1.0 if sign.is_first else sign.ready_s)
        found += [_words(what, still_s()) for what, (still_s, most) in list(self._measured.items()) if still_s() > most]
        if not is_ready:
            found = [reason or "not ready", *found]
        return (not found, "; ".join(found) or reason)

    def trouble(self) -> str:
        """Return what /healthz says: why a restart is due; "" while none is."""
        return "; ".join(self._ended() + self._missing(lambda sign: sign.healthy_s))

    def no_signs(self) -> dict[str, float]:
        """Return, of whatever signs are expected, for how many seconds there has been none."""
        now_s = self._monotonic()
        found = {what: now_s - sign.seen_s for what, sign in list(self._signs.items())}
        return found | {what: still_s() for what, (still_s, _) in list(self._measured.items())}

    def _ended(self) -> list[str]:
        return [f"{what} has ended" for what, is_alive in list(self._threads.items()) if not is_alive()]

    def _missing(self, bound: Callable[[_Sign], float | None]) -> list[str]:
        now_s, found = self._monotonic(), []
        for what, sign in list(self._signs.items()):
            most, still_s = bound(sign), now_s - sign.seen_s
            if most is not None and still_s > most:
                found.append(_words(what, still_s, sign.why))
        return found


def _words(what: str, still_s: float, why: str = "") -> str:
    return f"{what}: no sign for {still_s:.0f} s{f' ({why})' if why else ''}"


class BeatingStop(threading.Event):
    """A stop event whose asking is a sign of the loop: every loop asks before each turn whether it is to stop.

    Only the thread that asks first gives signs, since others that share the event say nothing about the loop.
    """

    def __init__(self) -> None:
        super().__init__()
        self._health: Health | None = None
        self._asker: int | None = None
        self._healthy_s = LOOP_HEALTHY_S

    def attach(self, health: Health, *, healthy_s: float = LOOP_HEALTHY_S) -> None:
        """Give signs to `health` from the next question on; the thread that asks it is the loop's."""
        self._health, self._healthy_s, self._asker = health, healthy_s, None

    def is_set(self) -> bool:
        """Say whether the stage is to stop."""
        if self._health is not None:
            if self._asker is None:
                self._asker = threading.get_ident()
                self._health.expect(LOOP, ready_s=LOOP_READY_S, healthy_s=self._healthy_s)
            elif self._asker == threading.get_ident():
                self._health.seen(LOOP)
        return super().is_set()
