"""Reads a whole topic of small records, leaving out what is not ours.

A foreign record changes nothing. A damaged one of ours is missing in what is read, which the reader finds by its
contents: a step without a number before it, a sample that nothing took.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from headrace.contract.formats.steps import Step
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Reader, read_range
from headrace.trainer.commit.steps_archive import StepsArchive, read_all_steps

T = TypeVar("T")


def recorded(reader: Reader, topic: str, decode: Callable[[bytes], T]) -> list[tuple[int, T]]:
    """Return each record's offset and content, in order within a partition. Raises as `read_range`."""
    found: list[tuple[int, T]] = []
    for record in read_range(reader, topic):
        if record.value is None:
            continue
        try:
            content = decode(record.value)
        except msgspec.DecodeError:
            continue
        found.append((record.offset, content))
    return found


def recorded_steps(reader: Reader, topics: Topics, archive: StepsArchive | None = None) -> list[Step]:
    """Return the committed steps of all models and runs, in order, of those too that were moved to the store. Raises as
    `read_all_steps`."""
    return [step for _, step in read_all_steps(reader, topics.steps, archive)]
