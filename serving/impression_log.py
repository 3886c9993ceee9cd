"""Logs what was served as the next impressions, for services that leave logging to serving (`"log": true`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.contract.formats.served_token import SERVED
from headrace.contract.project import Project
from headrace.sender import Sender


class ImpressionLog:
    """Logs through `headrace.sender`, which keeps on disk what the gateway has not acknowledged."""

    def __init__(self, project: Project, *, port: int, spool_dir: Path, host: str = "127.0.0.1") -> None:
        prefix, _, self._label = project.impression.tag.rpartition(".")
        self._fields = tuple(project.impression.fields)
        self._sender = Sender(prefix, host=host, port=port, spool_dir=str(spool_dir))

    def log(
        self,
        *,
        request_id: str,
        version: str,
        context: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]],
        served: Sequence[str | Mapping[str, Any]],
        event_time_ms: int,
    ) -> None:
        """Log one impression for each candidate, with the id "<request id>#<place>".

        Raises `Overloaded` when the spool is full.
        """
        for place, (candidate, given) in enumerate(zip(candidates, served, strict=True)):
            lead = {"event_id": f"{request_id}#{place}", "request_id": request_id, "place": place}
            fields = {name: candidate.get(name, context.get(name)) for name in self._fields}
            record = {**fields, **lead, "event_time_ms": event_time_ms, SERVED: given}
            # A fallback is of no version.
            record |= {"version": version} if version else {}
            self._sender.emit(self._label, record)

    def close(self) -> None:
        """Send what is left, for a moment; the rest stays in the spool."""
        self._sender.close(timeout=1.0)
