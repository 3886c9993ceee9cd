"""Who trains a model: several trainers of one model hand it over once, and never take turns.

The fenced writer of the steps keeps two trainers from writing at one time. It does not keep the one that was fenced off
from coming back, for its supervisor starts it anew. The claim does, a small blob `trainers/<model>`:

1. A trainer reads the claim before it becomes the writer. Where the claim says that another trainer took the model over
   from this very one, it refuses to start, and names the other.
2. Else it writes its own name, and after it those that it took the model over from.
3. A trainer that ends in good order lets go: then any trainer may start.

A trainer's name stays the same when it is started anew. Nothing is decided by a clock, and a claim that is lost or
written by two at one time costs one more hand-over.
"""

from __future__ import annotations

import logging

import msgspec

from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.contract.interfaces.blobs import Blobs

logger = logging.getLogger("headrace.train")

SUPERSEDED_MAX = 16
"""How many names are remembered: of more trainers of one model the first ones may come back once more."""


_FOLDER = "trainers"


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """Which trainer has a model."""

    holder: str
    """The trainer's name, as its `Dependencies` say."""
    is_released: bool = False
    """It ended in good order."""
    superseded: tuple[str, ...] = ()
    """The trainers that must not come back while it holds the model, the last one first."""


def read_claim(blobs: Blobs, model: str) -> Claim | None:
    """Return the claim; None where there is none, or one that cannot be read. Raises `Unavailable`."""
    data = blobs.get(_name(model))
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=Claim)
    except msgspec.MsgspecError as error:
        logger.warning("%s is no claim and is written anew: %s", _name(model), error)
        return None


def take_claim(blobs: Blobs, model: str, holder: str, *, by_force: bool = False) -> None:
    """Claim the model for the trainer `holder`, before it becomes the writer.

    Args:
        by_force: also where another trainer took the model over from this one.

    Raises:
        ConfigRejected: another trainer has taken the model over from this one.
        Unavailable: try again.
    """
    now = read_claim(blobs, model)
    superseded: tuple[str, ...] = ()
    if now is not None and not now.is_released:
        if holder in now.superseded and now.holder != holder and not by_force:
            raise ConfigRejected(
                f"trainer {now.holder} took model {model!r} over from this one ({holder}), which does not come back by "
                "itself: they would take turns for ever. Stop this one, or stop the other, which lets go when it ends "
                "in good order. If the other is gone for good: `headrace train --take-over`."
            )
        before = now.superseded if now.holder == holder else (now.holder, *now.superseded)
        superseded = tuple(dict.fromkeys(name for name in before if name != holder))[:SUPERSEDED_MAX]
        if now.holder != holder:
            logger.warning("model %s is taken over from trainer %s", model, now.holder)
    _write(blobs, model, Claim(holder=holder, superseded=superseded))


def other_holder(blobs: Blobs, model: str, holder: str) -> str:
    """Say which other trainer has the model now, after a space; "" where none has, or the store does not tell."""
    try:
        now = read_claim(blobs, model)
    except Unavailable:
        return ""
    return f" Trainer {now.holder} has the model." if now is not None and now.holder != holder else ""


def release_claim(blobs: Blobs, model: str, holder: str) -> None:
    """Let go of the model, unless another trainer has it. Raises `Unavailable`."""
    now = read_claim(blobs, model)
    if now is not None and now.holder == holder:
        _write(blobs, model, msgspec.structs.replace(now, is_released=True))


def models_of(blobs: Blobs, project: str) -> list[str]:
    """Return the names of the project's models that were ever trained, its own first. Raises `Unavailable`."""
    claimed = {name.rpartition("/")[2] for name in blobs.list(_FOLDER)}
    return [project, *sorted(model for model in claimed if model.startswith(f"{project}."))]


def _name(model: str) -> str:
    return f"{_FOLDER}/{model}"


def _write(blobs: Blobs, model: str, claim: Claim) -> None:
    blobs.put(_name(model), msgspec.json.encode(claim))
