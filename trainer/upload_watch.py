"""Watches the upload of a snapshot and a checkpoint, which runs in a thread of its own: one that hangs must show.

Training and deltas go on beside an upload, however long it takes. But no other begins meanwhile, and what a restart has
to redo grows. So its age is a gauge, an alert looks at it, and one that takes longer than any store needs ends the
process: the next one redoes the steps since the newest checkpoint and uploads anew.
"""

from __future__ import annotations

from headrace.contract.errors import InvariantBroken
from headrace.contract.interfaces.clock import Clock
from headrace.contract.metrics import Metrics

UPLOAD_MAX_S = 3_600.0
"""A checkpoint of 30 GB takes 50 minutes at 10 MB/s; a store's call that hangs takes for ever."""


class UploadWatch:
    """Knows since when an upload is under way. For the training thread."""

    def __init__(self, metrics: Metrics, clock: Clock) -> None:
        self._metrics, self._clock = metrics, clock
        self._since_s: float | None = None

    def began(self) -> None:
        """Note that an upload begins."""
        self._since_s = self._clock.monotonic()

    def look(self, *, is_busy: bool) -> None:
        """Tell how long the upload has taken. Raises `InvariantBroken` when that is too long.

        Args:
            is_busy: whether an upload is under way.
        """
        if not is_busy:
            self._since_s = None
        elif self._since_s is None:
            self.began()
        age_s = 0.0 if self._since_s is None else self._clock.monotonic() - self._since_s
        self._metrics.set("upload_age_seconds", age_s)
        if age_s > UPLOAD_MAX_S:
            raise InvariantBroken(
                f"the upload of a snapshot or a checkpoint has taken {age_s:.0f} s, {UPLOAD_MAX_S:.0f} s are allowed: "
                "a call of the store does not return. This process ends, and the next one goes on from the newest "
                "checkpoint. See whether the store answers: `headrace status`."
            )
