"""Checkpoints: all that resumes a run, in immutable parts and a manifest that is written last.

`checkpoints/<model>/<run>-<step>.<recipe>.<steps offset>.v<lake version>.<digest>.json` is the manifest: its name has
what is needed to choose among checkpoints without reading them, and the beginning of the SHA-256 of its bytes. It names
the parts of `checkpoints/<model>/parts/` with their digests. A checkpoint exists when its manifest does.

A table is cut into pages of rows. A page is stored whole, with the number of the checkpoint that stored it; rows that
changed later lie in parts of their own, by number too. A table is read so: each page, then the rows of each later
number, in order, over it. Whatever a checkpoint shares with the one before it, it names and does not store again.

Which is the newest says its lineage: runs follow each other along the `steps` topic, and within a run steps are
counted. No clock and no order of names has a say: a recipe may come back after another one.

Before, a checkpoint was one blob `<run>-<step>.<recipe>.<steps offset>.v<lake version>`, in release 0.1 `<run>-<step>`:
magic, SHA-256 of the rest, then an .npz of all arrays and of `meta` as JSON. Those are still read.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from headrace.contract.formats.positions import Cursor
from headrace.contract.formats.steps import Branch
from headrace.contract.interfaces.blobs import Blobs
from headrace.trainer.commit.lineage import Leg
from headrace.trainer.commit.parts import Arrays, Part, decode_npz, decode_part
from headrace.trainer.model.tables.columns import StoredRows
from headrace.trainer.model.tables.row_index import Int64s

logger = logging.getLogger("headrace.train")

_MAGIC = b"HRCKPT1\n"
FORMAT = 2

# The parts of a name behind the step are missing in what release 0.1 wrote, the digest in what was one blob.
_NAME = re.compile(
    r"(?P<run>[^.]+)-(?P<step>\d+)(\.(?P<recipe>[^.]*)\.(?P<offset>\d+)\.v(?P<version>-?\d+)"
    r"(\.(?P<digest>[0-9a-f]{16})\.json)?)?"
)


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
    event_ms: int = 0
    """The newest event time that the model has learnt, rounded up to a second less 1 ms; 0 where it is not known."""
    branch: Branch | None = None
    """How the run began, where somebody asked for it."""


class Checkpoint(msgspec.Struct, frozen=True):
    """One checkpoint, in memory."""

    meta: Meta
    learner: Arrays
    """As `TableLearner.state`; among the rows of a table may be free ones, with the key `PAD`. Without those of `rows`.
    """
    evaluation: Arrays
    manifest: CheckpointManifest | None = None
    """None where it was one blob."""
    rows: dict[str, StoredRows] = {}
    """The rows of tables, by what the names of their columns begin with. Each is read once, by `TableLearner.load`, and
    a piece of it is let go of before the next is taken."""


class Page(msgspec.Struct, frozen=True):
    """The rows of one page as they were at one checkpoint."""

    part: Part
    seq: int
    """Of the checkpoint that stored it."""
    rows: int
    changed: bool = False
    """True where rows of it changed later: they lie in `ChangedRows` of a greater number."""


class ChangedRows(msgspec.Struct, frozen=True):
    """Rows that changed between the checkpoint before and the one that stored them, their numbers in `rows`."""

    part: Part
    seq: int


class TableParts(msgspec.Struct, frozen=True):
    """Where the rows of one table lie."""

    high: int
    """Rows, free ones among them."""
    page_rows: int
    pages: tuple[Page, ...]
    changed: tuple[ChangedRows, ...] = ()
    """In the order of their numbers."""
    credit: int = 0
    """Rows of pages that may be stored anew although few of theirs changed; see `checkpoint_plan`."""


class MadeBy(msgspec.Struct, frozen=True, kw_only=True):
    """What made the bits: other bits of the same samples are no fault where this differs."""

    code: str
    torch: str
    numba: str
    numpy: str
    cpu: str
    """What the compiler of the kernels calls the processor."""
    features: str
    """The instruction sets that it uses."""
    threads: int


class CheckpointManifest(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint: where the run stood, and the parts that hold the rest."""

    format: int = FORMAT
    seq: int
    """1, 2, 3 ... along the checkpoints that share parts."""
    meta: Meta
    learner: tuple[Part, ...]
    """Everything of the learner but the rows of tables."""
    evaluation: tuple[Part, ...]
    tables: dict[str, TableParts]
    """By what the names of their columns begin with."""
    positions: dict[str, list[int]]
    """As `Positions.to_json`: what the model contains."""
    spec_json: str
    recipe_json: str
    made_by: MadeBy
    metrics: dict[str, float] = {}
    """Figures of the model, for people."""

    def parts(self) -> set[Part]:
        """Return all parts that it names."""
        tables = self.tables.values()
        pages = {page.part for table in tables for page in table.pages}
        return {*self.learner, *self.evaluation} | pages | {each.part for table in tables for each in table.changed}


class Damaged(Exception):
    """A part of a checkpoint is missing, or is not what its manifest says."""


def folder_of(model: str) -> str:
    """Return the folder of a model's manifests."""
    return f"checkpoints/{model}"


def parts_of(model: str) -> str:
    """Return the folder of a model's parts."""
    return f"{folder_of(model)}/parts"


def encode_manifest(manifest: CheckpointManifest) -> tuple[str, bytes]:
    """Return a manifest's name and its bytes."""
    data, meta = msgspec.json.encode(manifest), manifest.meta
    place = f"{meta.run}-{meta.step:012d}.{meta.recipe}.{meta.steps_offset}.v{meta.cursor.lake_version}"
    return f"{place}.{hashlib.sha256(data).hexdigest()[:16]}.json", data


def newest_checkpoint(blobs: Blobs, model: str, *, recipe: str, path: Sequence[Leg] | None = None) -> Checkpoint | None:
    """Return the readable checkpoint of this recipe that has got furthest, None without one. Raises `Unavailable`.

    Args:
        path: the runs that a run consists of, oldest first: the furthest along them, and no other, is returned.
    """
    ours = [each for each in known(blobs, model, stored_checkpoints(blobs, model)) if each.recipe == recipe]
    for each in on_path(ours, path) if path is not None else sorted(ours, key=place_of, reverse=True):
        try:
            return read_checkpoint(blobs, model, each)
        except Damaged as error:
            logger.warning("checkpoint %s is damaged or gone: %s; trying the one before", each.name, error)
    return None


def on_path(stored: Sequence[Stored], path: Sequence[Leg]) -> list[Stored]:
    """Return the checkpoints that a run can go on from, the furthest first: those of its own, then those of the runs
    that it goes on from, up to where it left them. Those of step 0 say nothing."""
    found: list[Stored] = []
    for leg in reversed(path):
        ours = [each for each in stored if each.run == leg.run and 0 < each.step <= leg.upto]
        found += sorted(ours, key=lambda each: each.step, reverse=True)
    return found


def furthest_meta(blobs: Blobs, model: str, *, recipe: str) -> Meta | None:
    """Return where the checkpoint of this recipe stands that has got furthest, None without one. Its parts are not
    read. Raises `Unavailable`."""
    ours = [each for each in known(blobs, model, stored_checkpoints(blobs, model)) if each.recipe == recipe]
    for each in sorted(ours, key=place_of, reverse=True):
        try:
            return read_meta(blobs, model, each)
        except Damaged as error:
            logger.warning("checkpoint %s is damaged or gone: %s; trying the one before", each.name, error)
    return None


def stored_versions(blobs: Blobs, model: str) -> set[int]:
    """Return the lake versions that the model's checkpoints are in the middle of. Raises `Unavailable`."""
    return {e.lake_version for e in known(blobs, model, stored_checkpoints(blobs, model)) if e.lake_version >= 0}


def runs_of(blobs: Blobs, model: str) -> set[str]:
    """Return the runs of which checkpoints are stored. Raises `Unavailable`."""
    return {each.run for each in stored_checkpoints(blobs, model)}


class Stored(msgspec.Struct, frozen=True):
    """A stored checkpoint as its name tells; a name of release 0.1 has no more than run and step."""

    name: str
    run: str
    step: int
    recipe: str | None = None
    steps_offset: int = -1
    lake_version: int = -1
    digest: str = ""
    """The beginning of its manifest's SHA-256; "" where it is one blob."""


def place_of(each: Stored) -> tuple[int, int]:
    """Return how far a checkpoint has got: along the steps topic, then in its run."""
    return each.steps_offset, each.step


def stored_checkpoints(blobs: Blobs, model: str) -> list[Stored]:
    """Return the stored checkpoints as their names tell. Raises `Unavailable`."""
    names = [name.rpartition("/")[2] for name in blobs.list(folder_of(model))]
    found = [(name, match) for name in names if (match := _NAME.fullmatch(name)) is not None]
    return [
        Stored(name, match["run"], int(match["step"]))
        if match["recipe"] is None
        else Stored(
            *(name, match["run"], int(match["step"]), match["recipe"], int(match["offset"]), int(match["version"])),
            match["digest"] or "",
        )
        for name, match in found
    ]


def known(blobs: Blobs, model: str, stored: list[Stored]) -> list[Stored]:
    """Return these with all that their names should say; one whose name does not is read, or left out."""
    found = []
    for each in stored:
        if each.recipe is not None:
            found.append(each)
            continue
        checkpoint = decode_whole(blobs.get(f"{folder_of(model)}/{each.name}"))
        if checkpoint is not None:
            meta = checkpoint.meta
            place = meta.recipe, meta.steps_offset, meta.cursor.lake_version
            found.append(Stored(each.name, each.run, each.step, *place))
    return found


def read_manifest(blobs: Blobs, model: str, each: Stored) -> CheckpointManifest:
    """Return the manifest of a stored checkpoint. Raises `Damaged` and `Unavailable`."""
    data = blobs.get(f"{folder_of(model)}/{each.name}")
    if data is None:
        raise Damaged("its manifest is gone")
    if not hashlib.sha256(data).hexdigest().startswith(each.digest):
        raise Damaged("its manifest has other bytes than its name says")
    try:
        return msgspec.json.decode(data, type=CheckpointManifest)
    except msgspec.DecodeError as error:
        raise Damaged(f"its manifest: {error}") from error


def read_meta(blobs: Blobs, model: str, each: Stored) -> Meta:
    """Return where a stored checkpoint stands. Raises as `read_manifest`."""
    return read_manifest(blobs, model, each).meta if each.digest else read_checkpoint(blobs, model, each).meta


def read_checkpoint(blobs: Blobs, model: str, each: Stored) -> Checkpoint:
    """Return a stored checkpoint with all it names. Raises `Damaged`, which names the part, and `Unavailable`."""
    if not each.digest:
        checkpoint = decode_whole(blobs.get(f"{folder_of(model)}/{each.name}"))
        if checkpoint is None:
            raise Damaged("its bytes are damaged, of another format or gone")
        return checkpoint
    manifest = read_manifest(blobs, model, each)
    learner, evaluation = Arrays(), Arrays()
    for part in manifest.learner:
        learner |= read_part(blobs, model, part)
    for part in manifest.evaluation:
        evaluation |= read_part(blobs, model, part)
    rows = {prefix: _rows(blobs, model, table) for prefix, table in manifest.tables.items()}
    return Checkpoint(manifest.meta, learner, evaluation, manifest, rows)


def read_part(blobs: Blobs, model: str, part: Part) -> Arrays:
    """Return a part's arrays. Raises `Damaged` and `Unavailable`."""
    data = blobs.get(f"{parts_of(model)}/{part.name}")
    if data is None:
        raise Damaged(f"part {part.name} is missing")
    if len(data) != part.bytes or hashlib.sha256(data).hexdigest() != part.sha256:
        raise Damaged(f"part {part.name} has other bytes than its manifest says")
    try:
        return decode_part(data)
    except ValueError as error:
        raise Damaged(f"part {part.name}: {error}") from error


def decode_whole(data: bytes | None) -> Checkpoint | None:
    """Read a checkpoint that is one blob; None where the bytes are damaged or of another format."""
    if data is None:
        return None
    head, digest, body = data[:8], data[8:40], data[40:]
    if head != _MAGIC or hashlib.sha256(body).digest() != digest:
        return None
    arrays = decode_npz(body)
    return Checkpoint(
        msgspec.json.decode(arrays["meta"].tobytes(), type=Meta),
        {n.removeprefix("learner/"): a for n, a in arrays.items() if n.startswith("learner/")},
        {n.removeprefix("evaluation/"): a for n, a in arrays.items() if n.startswith("evaluation/")},
    )


def _rows(blobs: Blobs, model: str, table: TableParts) -> StoredRows:
    """Return a table's rows: pages, and over them, in order, the rows that changed later. All parts are read, and so
    known to be whole, before the first row is taken."""
    seqs_P = np.array([page.seq for page in table.pages], np.int64)
    changed: list[tuple[slice | Int64s, Arrays]] = []
    for each in table.changed:
        part = read_part(blobs, model, each.part)
        rows_K = part.pop("rows").astype(np.int64)
        later_K = seqs_P[rows_K // table.page_rows] < each.seq
        changed.append((rows_K[later_K], {name: column[later_K] for name, column in part.items()}))
    pages: list[tuple[slice | Int64s, Arrays]] = []
    for number, page in enumerate(table.pages):
        first = number * table.page_rows
        pages.append((slice(first, first + page.rows), read_part(blobs, model, page.part)))
    return StoredRows(table.high, _taken(pages, changed))


def _taken(
    pages: list[tuple[slice | Int64s, Arrays]], changed: list[tuple[slice | Int64s, Arrays]]
) -> Iterator[tuple[slice | Int64s, Arrays]]:
    """Yield pages, the last first: what was allocated last goes back to the machine first. Then what lies over them."""
    while pages:
        yield pages.pop()
    yield from changed
