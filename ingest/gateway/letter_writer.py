"""What a dead letter of the gateway holds: what was refused, cut to a bound, without what is private."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import msgspec

from headrace.contract.config import IngestConfig
from headrace.contract.errors import listed, meant
from headrace.contract.formats.dead_letters import DeadLetter
from headrace.contract.privacy import Privacy
from headrace.ingest.decode.message import Entry, chunk_text, encode_record
from headrace.ingest.gateway.batcher import OpenChunk

_LATE_BYTES_MAX = 650_000
"""Most raw bytes of an event that is too late: in base64 they fit the broker's 1 MB."""


_TAGS_SHOWN, _TAG_LETTERS = 20, 200


class TooLate(NamedTuple):
    """What an event that is too late is looked up by, beside its id."""

    event_type: str
    event_time_ms: int
    partition: int


class LetterWriter:
    """Writes the letters of one gateway."""

    def __init__(self, config: IngestConfig, privacy: Privacy, gateway: str, tags: Collection[str]) -> None:
        self._config, self._privacy, self._gateway, self._tags = config, privacy, gateway, tags

    def undeclared(self, tag: str) -> str:
        """Return the detail of events of a tag that no declared event has."""
        more = len(self._tags) - _TAGS_SHOWN
        there = listed(sorted(self._tags)[:_TAGS_SHOWN]) + (f" and {more} more" if more > 0 else "")
        near = meant(chunk_text(tag)[:_TAG_LETTERS], self._tags, 0.8)
        return f"no declared event has this tag; there are {there}.{near}"

    def letter(
        self,
        chunk: OpenChunk,
        reason: str,
        detail: str,
        entry: Entry,
        seen_ms: int,
        *,
        event_id: str = "",
        raw: bytes | None = None,
        late: TooLate | None = None,
    ) -> DeadLetter:
        """Return the letter of an entry, or of `raw` bytes that are none. `event_id` is told where the entry has none.

        An event that is too `late` is kept whole: it is taken once it is found to be new.
        """
        most = self._config.dead_letter_bytes if late is None else _LATE_BYTES_MAX
        record = self._privacy.record(entry.record, chunk.tag)
        # Bytes that nobody can read may hold what is private: where a project has such fields they are not kept.
        hidden = raw is not None and bool(self._privacy.everywhere)
        whole = encode_record(record) if raw is None else b"" if hidden else raw
        own = record.get("event_id") if isinstance(record, dict) else None
        letter = DeadLetter(
            reason=reason,
            detail=detail,
            origin=chunk.origin,
            tag=chunk_text(chunk.tag),
            event_id=chunk_text(own) if isinstance(own, str) and own else event_id,
            time_ns=entry.time_ns or 0,
            raw=whole[:most],
            raw_truncated=hidden or len(whole) > most,
            gateway=self._gateway,
            seen_ms=seen_ms,
        )
        return letter if late is None else msgspec.structs.replace(letter, **late._asdict())
