"""What the ledger found sound, kept in the store: the next drawing begins there. One blob a model and generation.

1. A drawing that found nothing lost or twice puts the blob, whole, in place of the one before; then it answers.
2. A drawing begins with the blob, if it is whole, of this generation, project and topics, and says what the log and the
   lake still say where it ends. Else everything is read again, and the reason is told.

Two drawings at once put a blob each: either is sound. One that died between the blob and its answer leaves a sound
blob.
"""

from __future__ import annotations

import hashlib

import msgspec

from headrace.contract.formats.seals import Seal
from headrace.contract.interfaces.blobs import Blobs
from headrace.replay.ledger.runs import RunTotals
from headrace.replay.ledger.topic_seals import NotSealed

VERSION = 1


class LakeTill(msgspec.Struct, frozen=True):
    """Up to which position a partition of the lake was sound, and the seal there."""

    position: tuple[int, int]
    seal: Seal


class KeptRun(msgspec.Struct, kw_only=True):
    """A run's totals, and what was found of it when it was looked at last."""

    totals: RunTotals
    heads: tuple[str, ...] = ()
    """Its tasks."""


class KeptAccount(msgspec.Struct, kw_only=True):
    """What was sound, and what it was found in."""

    version: int = VERSION
    project: str
    generation: int
    topic_ids: dict[str, str] = {}
    """By topic; "" or absent where the broker tells none."""
    steps_offset: int = 0
    """The next record of `steps` to read, of the model under the project's own name."""
    steps_offsets: dict[str, int] = {}
    """Of each variant's model, likewise."""
    runs: dict[str, KeptRun] = {}
    """The run of the newest step last."""
    lake: dict[int, LakeTill] = {}

    def offsets(self) -> dict[str, int]:
        """Return the next record of its steps to read, by model."""
        return {**self.steps_offsets, self.project: self.steps_offset}


def name_of(project: str, generation: int) -> str:
    """Return the blob's name."""
    return f"ledger/g{generation}/{project}"


def put_account(blobs: Blobs, account: KeptAccount) -> None:
    """Store it in place of the one before. Raises `Unavailable`."""
    body = msgspec.json.encode(account)
    digest = hashlib.sha256(body).hexdigest().encode()
    blobs.put(name_of(account.project, account.generation), digest + b"\n" + body)


def get_account(blobs: Blobs, project: str, generation: int, topic_ids: dict[str, str]) -> KeptAccount | None:
    """Return what was stored; None where nothing is.

    Raises `NotSealed` where it can't be trusted: it is damaged, or of another project, generation or topic.
    """
    name = name_of(project, generation)
    data = blobs.get(name)
    if data is None:
        return None
    digest, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise NotSealed(f"{name} is damaged")
    try:
        account = msgspec.json.decode(body, type=KeptAccount)
    except msgspec.DecodeError as error:
        raise NotSealed(f"{name} is of another format: {error}") from error
    if (account.version, account.project, account.generation) != (VERSION, project, generation):
        raise NotSealed(
            f"{name} is of version {account.version}, project {account.project!r}, generation {account.generation}"
        )
    for topic, known in account.topic_ids.items():
        if known and topic_ids.get(topic) and topic_ids[topic] != known:
            raise NotSealed(f"{name} is of a topic {topic!r} that was made anew since")
    return account
