"""How a project's models stand: what each has published, stored and learnt, for people and before a promotion."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from headrace.contract.formats.positions import Positions
from headrace.contract.formats.snapshot import Manifest
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.log import Reader
from headrace.contract.project import Project
from headrace.trainer.commit.checkpoint import (
    CheckpointManifest,
    Damaged,
    known,
    place_of,
    read_manifest,
    stored_checkpoints,
)
from headrace.trainer.commit.decisions import is_left, is_of, read_decisions
from headrace.trainer.commit.publish import read_manifests
from headrace.trainer.identity import recipe_digest


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """One model by the recipe that is declared for it now."""

    model: str
    variant: str
    """"" of the project's own recipe."""
    snapshot: Manifest | None = None
    """The newest one of this recipe."""
    checkpoint: CheckpointManifest | None = None
    """The newest whole one of this recipe: its figures, rows and positions are of then."""
    learns_lake: bool = False
    """The newest checkpoint is in the middle of the lake, and nothing is published yet."""
    other_recipe: str = ""
    """The newest version that is published, where it is of another recipe or spec."""

    @property
    def run(self) -> str:
        """Return the run, "" where none is known."""
        return self.checkpoint.meta.run if self.checkpoint is not None else self.snapshot.run if self.snapshot else ""

    @property
    def positions(self) -> dict[str, list[int]]:
        """Return the newest positions that are known, as `Positions.to_json`."""
        told = [each for each in (self._of_checkpoint(), self._of_snapshot()) if each is not None]
        return max(told, key=lambda each: each[0])[1] if told else {}

    @property
    def told_ms(self) -> int:
        """Return when it published or stored last, 0 where it never did."""
        published_ms = self.snapshot.created_ms if self.snapshot is not None else 0
        return max(published_ms, self.checkpoint.meta.created_ms if self.checkpoint is not None else 0)

    @property
    def figures(self) -> dict[str, float]:
        """Return what the checkpoint tells, by name."""
        return dict(self.checkpoint.metrics) if self.checkpoint is not None else {}

    def _of_checkpoint(self) -> tuple[int, dict[str, list[int]]] | None:
        return (self.checkpoint.meta.step, self.checkpoint.positions) if self.checkpoint is not None else None

    def _of_snapshot(self) -> tuple[int, dict[str, list[int]]] | None:
        return (self.snapshot.step, self.snapshot.positions) if self.snapshot is not None else None


def standing_of(view: Project, reader: Reader, topics: Topics, blobs: Blobs) -> Standing:
    """Return how a model stands, without what somebody has gone back from.

    Args:
        view: as `Project.of_variant`, or the project itself.

    Raises `Unavailable`, and as `read_range`.
    """
    digest, model = recipe_digest(view), view.model
    decisions = read_decisions(reader, topics, view.name)
    every = known(blobs, model, stored_checkpoints(blobs, model))
    stored = [each for each in every if each.recipe == digest and not is_left(decisions, each.run, each.step)]
    checkpoint = None
    for each in sorted(stored, key=place_of, reverse=True):
        try:
            checkpoint = read_manifest(blobs, model, each) if each.digest else None
        except Damaged:
            continue
        if checkpoint is not None:
            break
    manifests = [m for m in read_manifests(reader, topics, model) if not is_left(decisions, m.run, m.step)]
    ours = [manifest for manifest in manifests if is_of(manifest, view)]
    is_other = bool(manifests) and (not ours or manifests[-1] is not ours[-1])
    return Standing(
        model=model,
        variant=view.variant,
        snapshot=ours[-1] if ours else None,
        checkpoint=checkpoint,
        learns_lake=not ours and checkpoint is not None and checkpoint.meta.cursor.lake_version >= 0,
        other_recipe=manifests[-1].version if is_other else "",
    )


def behind_records(ahead: Standing, behind: Standing) -> int:
    """Return how many records of `events` lie between the positions of two models, in all partitions."""
    return _between(ahead.positions, behind.positions)


def _between(ahead: dict[str, list[int]], behind: dict[str, list[int]]) -> int:
    positions: Sequence[Positions] = [Positions.from_json(0, each) for each in (ahead, behind)]
    partitions = positions[0].by_partition.keys()
    return sum(max(0, positions[0].at(p).offset - positions[1].at(p).offset) for p in partitions)
