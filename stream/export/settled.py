"""Up to which event time the labels in a version of the lake are final. Pure but for the store that is read.

The join stores how far it is: the watermark, and the last sample that it led to. A version that holds this sample holds
all that was resolved by then. So no label of an impression changes, or is still to come, that is older than the least
such watermark of any partition by more than the longest window, corrections included.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from headrace.contract.formats.positions import Position, Positions
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.project import Task
from headrace.stream.join.state import VERSION, Damaged, read_manifest, rules_kept


def settled_ms(
    blobs: Blobs, generation: int, partitions: Iterable[int], stored: Positions, tasks: Collection[Task]
) -> int | None:
    """Return the event time before which the labels of these tasks are final; None where that is not known.

    It is not where the join has stored no state of a partition, or the stored ones are all ahead of the lake.

    Args:
        stored: what the version of the lake holds.
        tasks: as the project declares them now; what waits under earlier rules has the windows of those.

    Raises `Unavailable`.
    """
    least_ms: int | None = None
    names = {task.name for task in tasks}
    longest_ms = max((task.window_ms + task.correct_ms for task in tasks), default=0)
    for partition in partitions:
        plain = _newest_covered(blobs, generation, partition, stored)
        if plain is None:
            return None
        waited = [task for rules in rules_kept(plain).values() for task in rules.tasks if task.name in names]
        longest_ms = max([longest_ms, *(task.window_ms + task.correct_ms for task in waited)])
        watermark_ms = int(plain["watermark"][0])
        least_ms = watermark_ms if least_ms is None else min(least_ms, watermark_ms)
    return None if least_ms is None else max(0, least_ms - longest_ms)


def _newest_covered(blobs: Blobs, generation: int, partition: int, stored: Positions) -> Mapping[str, Any] | None:
    """Return the newest state of a partition whose samples are all stored; None where there is none."""
    folder = f"state/stream/g{generation}/{partition}"
    for name in sorted((name.rsplit("/", 1)[-1] for name in blobs.list(folder)), key=int, reverse=True):
        data = blobs.get(f"{folder}/{name}")
        with suppress(Damaged):
            plain = None if data is None else read_manifest(data)
            if plain is not None and plain.get("v") == VERSION and stored.covers(partition, Position(*plain["last"])):
                return plain
    return None
