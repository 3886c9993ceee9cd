"""Parts of topics, read once from one offset to another: dead letters, and events that a retry looks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from headrace.contract.errors import Unavailable
from headrace.contract.formats.dead_letters import decode_dead_letter
from headrace.contract.interfaces.log import Reader, Record
from headrace.ingest.dead_letters.view import Letter

_POLL_RECORDS, _POLL_S, _SILENT_S = 500, 0.2, 10.0


def letters(reader: Reader, topic: str, end: int, *, begin: int = 0) -> Iterator[Letter]:
    """Yield the topic's letters below offset `end`, oldest first."""
    first = max(begin, reader.begin_offsets(topic)[0])
    for record in records(reader, topic, {0: (first, end)}):
        if record.value is not None:
            yield Letter(record.offset, decode_dead_letter(record.value))


def records(
    reader: Reader,
    topic: str,
    spans: Mapping[int, tuple[int, int]],
    *,
    latest_ms: int = 2**62,
) -> Iterator[Record]:
    """Yield records from the first offset of each span to below its second, a partition until one is past `latest_ms`.

    Raises `Unavailable` when none comes for 10 s.
    """
    left = {p for p, (first, end) in spans.items() if first < end}
    if not left:
        return
    reader.assign({(topic, p): spans[p][0] for p in left})
    silent_s = 0.0
    while left:
        found = reader.poll(_POLL_RECORDS, _POLL_S)
        silent_s = 0.0 if found else silent_s + _POLL_S
        if silent_s >= _SILENT_S:
            raise Unavailable(
                f"{topic}: no record for {_SILENT_S:g} s before its end. `headrace status` shows the broker."
            )
        for record in found:
            if record.partition not in left:
                continue
            if record.offset < spans[record.partition][1] and record.timestamp_ms <= latest_ms:
                yield record
            if record.offset >= spans[record.partition][1] - 1 or record.timestamp_ms > latest_ms:
                left.discard(record.partition)
