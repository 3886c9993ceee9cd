"""What is not served any more: runs that somebody has gone back from, as the decisions in `model` say."""

from __future__ import annotations

import logging

from headrace.contract.formats.decision import Decision

logger = logging.getLogger("headrace.serve")


class Refusals:
    """Of a project's models, none of which has a run of another one. A server that starts anew decides the same: it
    reads the same records."""

    def __init__(self) -> None:
        self._after: dict[str, int] = {}
        """By run, the last step of it that may be served."""

    def note(self, decision: Decision) -> None:
        """Take a decision about the project."""
        if decision.what == "rollback" and decision.refused_run:
            run, after = decision.refused_run, decision.refused_after
            self._after[run] = min(after, self._after.get(run, after))
            logger.info("run %s is served no further than step %d: run %s goes on", run, after, decision.run)

    def refuses(self, run: str, step: int) -> bool:
        """Say whether a version is not to be served."""
        return step > self._after.get(run, step)
