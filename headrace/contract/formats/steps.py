"""The `steps` topic commits training: nobody applies, checkpoints or publishes a step before reading it back."""

from __future__ import annotations

import msgspec

from headrace.contract.formats.json_record import decode_json


class StepRange(msgspec.Struct, frozen=True):
    """What one worker took in one step.

    `live`: samples of `partition` with position > after and <= upto, as [offset, rank].
    `stored`: rows [start, stop) of the lake at `version`, in total order (event time, partition, offset, rank);
    there `partition` is -1.
    """

    kind: str
    worker: int = 0
    partition: int = -1
    after: tuple[int, int] = (-1, -1)
    upto: tuple[int, int] = (-1, -1)
    version: int = -1
    start: int = 0
    stop: int = 0
    rows: int = 0
    sum: int | None = None
    """Sum of the hashes of these rows' ids modulo 2**64 (`headrace.contract.formats.seals`), and of these rows, how
    many the learner refuses and how many the recipe leaves out. None, and 0, in steps of before."""
    refused: int = 0
    left_out: int = 0


class PassedOver(msgspec.Struct, frozen=True, kw_only=True):
    """Samples that a run leaves out for good: those of `partition` with position > after and <= upto."""

    partition: int
    after: tuple[int, int]
    upto: tuple[int, int]
    following: int = -1
    """The record of `samples` to read on from."""
    why: str = ""
    """`skipped`: somebody chose so; `lost`: the topic does not have them."""


class Branch(msgspec.Struct, frozen=True, kw_only=True):
    """How a run begins that somebody asked for: from another run, as that one stood behind a step of its own.

    What the other run learnt after that step is no part of the new one. A run of before may itself be a branch.
    """

    run: str
    """The run that it goes on from; "" where it begins afresh, at the lake."""
    step: int
    instead_of: str = ""
    """The run that went on until then: nothing of it is served from here on that is not of the new run too."""
    passed_over: tuple[PassedOver, ...] = ()
    reason: str = ""
    by: str = ""
    """User and host."""
    created_ms: int = 0

    @property
    def words(self) -> str:
        """What it says, for people."""
        begins = f"it goes on from run {self.run} behind step {self.step}" if self.run else "it begins afresh"
        return f"{begins}; asked for by {self.by or 'somebody'}: {self.reason or 'no reason given'}"


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One committed training step of one model run; workers learn in order of `worker`, then `ranges`' order.

    Where a step takes both, `stored` comes first, then `live` by partition.
    """

    model: str
    run: str
    """Changes when a run starts afresh; steps of one run are numbered 1, 2, 3 ... without a gap, those of a branch from
    behind the step that it goes on from."""
    step: int
    ranges: tuple[StepRange, ...]
    positions: dict[str, list[int]]
    """Positions contained after this step, as `Positions.to_json`. Nothing while the lake is being learnt, also where
    `live` ranges are learnt beside it."""
    quorum: int = 0
    world: int = 1
    recipe: str = ""
    """Digest of recipe and spec."""
    seed: int = 0
    samples_id: str = ""
    """The id of the `samples` topic; "" in steps that were written before ids were noted."""
    branch: Branch | None = None
    """On the first record of a run that somebody asked for: it takes no rows, and has the number of the step that the
    run goes on behind."""


def encode_step(step: Step) -> bytes:
    """Return the record's value: compact JSON, keys in declared order."""
    return msgspec.json.encode(step)


def decode_step(data: bytes) -> Step:
    """Read what `encode_step` wrote. Raises as `decode_json`."""
    return decode_json(data, Step)
