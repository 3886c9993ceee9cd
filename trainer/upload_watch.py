"""Watches the upload of snapshots or of checkpoints, in a thread of its own each: one that hangs must show.

Training and deltas go on beside an upload, however long it takes. But no other begins meanwhile, and what a restart has
to redo grows. So its age is a gauge, and an alert looks at it. What is bounded is its silence, not its length: stores
take an upload piece by piece, and each piece, and each call that comes back, begins the time anew
(`headrace.process.moved`). One that stands still for longer than any work between two of them ends the process: the
next one redoes the steps since the newest checkpoint and uploads anew.
"""

from __future__ import annotations

from headrace.contract.errors import InvariantBroken
from headrace.contract.interfaces.clock import Clock
from headrace.contract.metrics import Metrics
from headrace.process.awake import Awake

STILL_MAX_S = 1_800.0
"""Longest that an upload may stand still: between two pieces 30 GB are encoded and hashed, which takes minutes. A call
of the store that does not come back is ended by its own bound before (`headrace.process.call_watch`)."""
LOOK_S = 60.0
"""Looks come once a turn of training, and the first turn compiles for a minute."""


class UploadWatch:
    """Knows since when an upload is under way, and when it moved on last. For the training thread, but `moved`."""

    def __init__(self, what: str, metrics: Metrics, clock: Clock) -> None:
        self._what, self._metrics, self._clock = what, metrics, clock
        self._awake = Awake(clock.monotonic, LOOK_S)
        self._since_s: float | None = None
        self._moved_s = 0.0

    def began(self) -> None:
        """Note that an upload begins."""
        self._since_s = self._clock.monotonic()
        self.moved()

    def moved(self) -> None:
        """Note that the upload went on; from any thread."""
        self._moved_s = self._awake.monotonic()

    def look(self, *, is_busy: bool) -> None:
        """Tell how long the upload has taken. Raises `InvariantBroken` when it has stood still for too long.

        Args:
            is_busy: whether an upload is under way.
        """
        now_s = self._awake.monotonic()
        if not is_busy:
            self._since_s = None
        elif self._since_s is None:
            self.began()
        age_s = 0.0 if self._since_s is None else self._clock.monotonic() - self._since_s
        self._metrics.set("upload_age_seconds", age_s, what=self._what)
        still_s = now_s - self._moved_s
        if is_busy and still_s > STILL_MAX_S:
            raise InvariantBroken(
                f"the upload of a {self._what} has stood still for {still_s:.0f} s, {STILL_MAX_S:.0f} s "
                "are allowed: neither the store nor the work before it goes on. This process ends, and the next one "
                "goes on from the newest checkpoint. See whether the store answers: `headrace status`."
            )
