"""The dead letters of their topic, read from one offset to another."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.contract.formats.dead_letters import decode_dead_letter
from headrace.contract.interfaces.log import Reader, read_range
from headrace.ingest.dead_letters.view import Letter


def letters(reader: Reader, topic: str, end: int, *, begin: int = 0) -> Iterator[Letter]:
    """Yield the topic's letters below offset `end`, oldest first."""
    first = max(begin, reader.begin_offsets(topic)[0])
    for record in read_range(reader, topic, begins={0: first}, ends={0: end}):
        if record.value is not None:
            yield Letter(record.offset, decode_dead_letter(record.value))
