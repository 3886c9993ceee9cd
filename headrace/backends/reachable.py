"""Asks a broker or a store again and again whether it answers, in a thread of its own, and tells the stage's health.

A call that never returns, as on a broker that is stopped, gives no sign either: that is what makes the probe red.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from headrace.backends.health import Health

log = logging.getLogger("headrace.health")

KAFKA, STORE = "kafka", "store"
KAFKA_READY_S, STORE_READY_S = 15.0, 30.0
"""Above a broker's restart as its clients see it, and below the 45 s after which a stage gives a call of the store up
and ends: its probe says why before that."""
LOOK_S = 3.0
STORE_LOOK_S = 5.0


class Reachable:
    """One thing that must answer. `ask` raises where it does not."""

    def __init__(
        self, what: str, ask: Callable[[], object], health: Health, *, ready_s: float, look_s: float = LOOK_S
    ) -> None:
        self._what, self._ask, self._health, self._look_s = what, ask, health, look_s
        self._is_away = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"asks {what}", daemon=True)
        health.expect(what, ready_s=ready_s, from_first=True)

    def start(self) -> None:
        """Ask from now on."""
        self._thread.start()
        self._health.thread(f"the thread that asks {self._what}", self._thread.is_alive)

    def stop(self) -> None:
        """Ask no more; an answer that is waited for is not waited for any longer."""
        self._health.forget(self._what)
        self._health.forget(f"the thread that asks {self._what}")
        self._stopped.set()

    def look(self) -> bool:
        """Ask once; say whether it answered. Logs once when it goes away and once when it is back."""
        try:
            self._ask()
        except Exception as error:
            # Whatever it is: an answer is what was asked for, and there is none.
            self._health.missed(self._what, f"{type(error).__name__}: {error}"[:300])
            if not self._is_away:
                log.warning("%s does not answer: %s: %s", self._what, type(error).__name__, error)
            self._is_away = True
            return False
        if self._is_away:
            log.info("%s answers again", self._what)
        self._is_away = False
        self._health.seen(self._what)
        return True

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.look()
            self._stopped.wait(self._look_s)
