"""Seals: how many samples a range of positions holds, and the sum of their ids' hashes. Pure.

Two effects that hold the same samples up to the same position have the same seal, and different ones have different
seals but for a chance of 2**-64 a comparison. So the ledger compares two numbers where it would read ids; where they
differ it reads the ids.

| stored with | what it says |
|---|---|
| a record of `samples`, header `sealed` | of each task, the samples beyond `since` up to the record's `last` |
| a commit of the lake | of each partition it moves, the samples beyond `since` up to the committed position |
| a range of a step | the samples of the run's tasks in that range: `StepRange.rows` and `StepRange.sum` |

The hash of a sample's id (impression, task, whether it corrects) is `headrace.kernels.sample_ids`. What was written
before there were seals has none: it is compared by id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from headrace.contract.formats.positions import Position

SUM_MASK = (1 << 64) - 1
HEADER = "sealed"
"""The header of a `samples` record."""


class Seal(msgspec.Struct, frozen=True, array_like=True):
    """So many samples, and the sum of their ids' hashes modulo 2**64."""

    count: int = 0
    sum: int = 0

    def plus(self, other: Seal) -> Seal:
        """Return the seal of both ranges.

        >>> Seal(1, SUM_MASK).plus(Seal(2, 3))
        Seal(count=3, sum=2)
        """
        return Seal(self.count + other.count, (self.sum + other.sum) & SUM_MASK)

    def minus(self, other: Seal) -> Seal:
        """Return the seal of this range without the other one, which lies in it."""
        return Seal(self.count - other.count, (self.sum - other.sum) & SUM_MASK)


TaskSeals = Mapping[str, Seal]


class RecordSeal(msgspec.Struct, frozen=True, kw_only=True):
    """The header `sealed` of a `samples` record."""

    since: tuple[int, int]
    """As [offset, rank]: (-1, -1) where all samples of the partition are counted."""
    watermark_ms: int
    """The partition's watermark when the samples were sent."""
    tasks: dict[str, Seal]


class PartitionSeal(msgspec.Struct, frozen=True):
    """What the lake says of one partition: the samples beyond `since` up to `upto`."""

    since: Position
    upto: Position
    seal: Seal


def with_rows(sealed: TaskSeals, fresh: TaskSeals) -> dict[str, Seal]:
    """Return, by task, the seal of both."""
    return {task: sealed.get(task, Seal()).plus(fresh.get(task, Seal())) for task in [*sealed, *fresh]}


def without_rows(sealed: TaskSeals, gone: TaskSeals) -> dict[str, Seal]:
    """Return, by task, the seal without the other one."""
    return {task: sealed.get(task, Seal()).minus(gone.get(task, Seal())) for task in [*sealed, *gone]}


def whole(sealed: TaskSeals, tasks: Iterable[str] | None = None) -> Seal:
    """Return the seal of all tasks, or of these.

    >>> whole({"click": Seal(2, 5), "order": Seal(1, 1)}), whole({"click": Seal(2, 5)}, ["order"])
    (Seal(count=3, sum=6), Seal(count=0, sum=0))
    """
    total = Seal()
    for task in sealed if tasks is None else tasks:
        total = total.plus(sealed.get(task, Seal()))
    return total


def encode_seal(seal: RecordSeal) -> str:
    """Return the header's text: compact JSON."""
    return msgspec.json.encode(seal).decode()


def decode_seal(text: str | None) -> RecordSeal | None:
    """Read what `encode_seal` wrote; None where there is none, or it is not ours."""
    if not text:
        return None
    try:
        return msgspec.json.decode(text, type=RecordSeal)
    except msgspec.DecodeError:
        return None
