"""What is not served any more: runs that somebody has gone back from, as the decisions in `model` say."""

from __future__ import annotations

import logging

from headrace.contract.formats.decision import KIND, decode_decision
from headrace.contract.interfaces.log import Record

logger = logging.getLogger("headrace.serve")


class Refusals:
    """Of one model. A server that starts anew decides the same: it reads the same records."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._after: dict[str, int] = {}
        """By run, the last step of it that may be served."""

    def note(self, record: Record) -> bool:
        """Take a record of `model` and say whether it is a decision. Raises `msgspec.MsgspecError` where it says so and
        is none."""
        if record.value is None or record.headers.get("kind") != KIND:
            return False
        decision = decode_decision(record.value)
        if decision.model == self._model and decision.what == "rollback" and decision.refused_run:
            run, after = decision.refused_run, decision.refused_after
            self._after[run] = min(after, self._after.get(run, after))
            logger.info("run %s is served no further than step %d: run %s goes on", run, after, decision.run)
        return True

    def refuses(self, run: str, step: int) -> bool:
        """Say whether a version is not to be served."""
        return step > self._after.get(run, step)
