"""Checkpoints: all that resumes a run, in one blob that is replaced atomically or not at all.

Name: `checkpoints/<model>/<run>-<step>.<recipe>.<steps offset>.v<lake version>`: what is needed to choose among
checkpoints without reading them. Release 0.1 wrote `<run>-<step>` alone; of those the content is asked. Content: magic,
SHA-256 of the rest, then an uncompressed .npz of the learner's and the evaluation's arrays and of the `meta` as JSON.

Which is the newest, and which are deleted, says their lineage: runs follow each other along the `steps` topic, and
within a run steps are counted. No clock and no order of names has a say: a recipe may come back after another one.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.contract.formats.positions import Cursor
from headrace.contract.interfaces.blobs import Blobs

logger = logging.getLogger("headrace.train")

_MAGIC = b"HRCKPT1\n"
KEEP = 3
"""How many checkpoints of a run stay: one that is damaged has two before it."""
OTHER_RUNS_KEPT = 3
"""How many other runs of the model stay, the ones that came last: a recipe that is put back goes on from there."""

# A name's parts behind the step are missing in what release 0.1 wrote.
_NAME = re.compile(r"(?P<run>[^.]+)-(?P<step>\d+)(\.(?P<recipe>[^.]*)\.(?P<offset>\d+)\.v(?P<version>-?\d+))?")

Arrays = dict[str, npt.NDArray[np.generic]]


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """Where the run stood."""

    run: str
    step: int
    steps_offset: int
    """The first record of `steps` that this checkpoint does not contain."""
    recipe: str
    """Digest of recipe and spec."""
    cursor: Cursor
    created_ms: int = 0
    samples_id: str = ""
    """The id of the topic that the cursor's offsets are of; "" in what was written before ids were noted."""
    steps_id: str = ""
    """The id of the topic that `steps_offset` is of, likewise."""


class Checkpoint(msgspec.Struct, frozen=True):
    """One checkpoint, in memory."""

    meta: Meta
    learner: Arrays
    evaluation: Arrays


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """Return the blob; `decode_checkpoint` gives back the same bits."""
    arrays: Arrays = {f"learner/{name}": array for name, array in checkpoint.learner.items()}
    arrays |= {f"evaluation/{name}": array for name, array in checkpoint.evaluation.items()}
    arrays["meta"] = np.frombuffer(msgspec.json.encode(checkpoint.meta), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    body = buffer.getvalue()
    return _MAGIC + hashlib.sha256(body).digest() + body


def decode_checkpoint(data: bytes) -> Checkpoint | None:
    """Read what `encode_checkpoint` wrote; None where the bytes are damaged or of another format."""
    head, digest, body = data[:8], data[8:40], data[40:]
    if head != _MAGIC or hashlib.sha256(body).digest() != digest:
        return None
    with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
        return Checkpoint(
            msgspec.json.decode(arrays["meta"].tobytes(), type=Meta),
            {n.removeprefix("learner/"): arrays[n] for n in arrays.files if n.startswith("learner/")},
            {n.removeprefix("evaluation/"): arrays[n] for n in arrays.files if n.startswith("evaluation/")},
        )


def write_checkpoint(blobs: Blobs, model: str, checkpoint: Checkpoint) -> str:
    """Store it, delete what its lineage no longer needs, and return its name. Raises `Unavailable`.

    Of its run the `KEEP` with the highest steps stay; of the model's other runs the `OTHER_RUNS_KEPT` that have got
    furthest along the steps topic stay whole. What cannot be read is left alone: another release may have written it.
    """
    meta = checkpoint.meta
    name = f"{meta.run}-{meta.step:012d}.{meta.recipe}.{meta.steps_offset}.v{meta.cursor.lake_version}"
    blobs.put(f"checkpoints/{model}/{name}", encode_checkpoint(checkpoint))
    by_run: dict[str, list[_Stored]] = {}
    for each in _stored(blobs, model):
        by_run.setdefault(each.run, []).append(each)
    gone = sorted(by_run.pop(meta.run), key=lambda each: each.step)[:-KEEP]
    if len(by_run) > OTHER_RUNS_KEPT:
        furthest = {run: max(map(_place, _known(blobs, model, found)), default=None) for run, found in by_run.items()}
        runs = sorted((place, run) for run, place in furthest.items() if place is not None)
        gone += [each for _, run in runs[:-OTHER_RUNS_KEPT] for each in by_run[run]]
    for old in gone:
        blobs.delete(f"checkpoints/{model}/{old.name}")
    return name


def newest_checkpoint(blobs: Blobs, model: str, *, recipe: str) -> Checkpoint | None:
    """Return the readable checkpoint of this recipe that has got furthest, None without one. Raises `Unavailable`."""
    ours = [each for each in _known(blobs, model, _stored(blobs, model)) if each.recipe == recipe]
    for each in sorted(ours, key=_place, reverse=True):
        checkpoint = _read(blobs, model, each.name)
        if checkpoint is not None:
            return checkpoint
        logger.warning("checkpoint %s is damaged or gone; trying the one before", each.name)
    return None


def stored_versions(blobs: Blobs, model: str) -> set[int]:
    """Return the lake versions that the model's checkpoints are in the middle of. Raises `Unavailable`."""
    known = _known(blobs, model, _stored(blobs, model))
    return {each.lake_version for each in known if each.lake_version >= 0}


def runs_of(blobs: Blobs, model: str) -> set[str]:
    """Return the runs of which checkpoints are stored. Raises `Unavailable`."""
    return {each.run for each in _stored(blobs, model)}


class _Stored(msgspec.Struct, frozen=True):
    """A stored checkpoint as its name tells; a name of release 0.1 has no more than run and step."""

    name: str
    run: str
    step: int
    recipe: str | None = None
    steps_offset: int = -1
    lake_version: int = -1


def _place(each: _Stored) -> tuple[int, int]:
    return each.steps_offset, each.step


def _stored(blobs: Blobs, model: str) -> list[_Stored]:
    names = [name.rpartition("/")[2] for name in blobs.list(f"checkpoints/{model}")]
    found = [(name, match) for name in names if (match := _NAME.fullmatch(name)) is not None]
    return [
        _Stored(name, match["run"], int(match["step"]))
        if match["recipe"] is None
        else _Stored(
            *(name, match["run"], int(match["step"])), match["recipe"], int(match["offset"]), int(match["version"])
        )
        for name, match in found
    ]


def _known(blobs: Blobs, model: str, stored: list[_Stored]) -> list[_Stored]:
    """Return these with all that their names should say; one whose name does not is read, or left out."""
    found = []
    for each in stored:
        if each.recipe is not None:
            found.append(each)
            continue
        checkpoint = _read(blobs, model, each.name)
        if checkpoint is not None:
            meta = checkpoint.meta
            place = meta.recipe, meta.steps_offset, meta.cursor.lake_version
            found.append(_Stored(each.name, each.run, each.step, *place))
    return found


def _read(blobs: Blobs, model: str, name: str) -> Checkpoint | None:
    data = blobs.get(f"checkpoints/{model}/{name}")
    return decode_checkpoint(data) if data is not None else None
