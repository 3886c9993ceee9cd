"""Which checkpoints stay, and which parts: what is deleted, says their lineage, never a clock or a name's order.

1. Of the run that goes on stay the `KEEP` with the highest steps, and of each hour of event time the first one, for 24
   hours before the newest: what a run can be brought back to.
2. Of the model's other runs the `OTHER_RUNS_KEPT` that have got furthest along the steps topic stay as they are.
3. While a run that somebody asked for has fewer than `KEEP` of its own, the `KEEP` stay that it could go on from.
4. A manifest is deleted before its parts, and a part only when no manifest that stays names it.
5. Parts that no manifest names are what crashed writes left. They are swept when a trainer begins, before it stores
   anything itself.

What cannot be read is left alone: another release may have written it. While such a thing lies among the manifests, no
part is deleted, for it may name any.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from headrace.contract.interfaces.blobs import Blobs
from headrace.trainer.commit.checkpoint import (
    CheckpointManifest,
    Damaged,
    Stored,
    folder_of,
    known,
    on_path,
    parts_of,
    place_of,
    read_manifest,
    stored_checkpoints,
)
from headrace.trainer.commit.lineage import Leg

logger = logging.getLogger("headrace.train")

KEEP = 3
"""How many checkpoints of a run stay: one that is damaged has two before it."""
OTHER_RUNS_KEPT = 3
"""How many other runs of the model stay, the ones that came last: a recipe that is put back goes on from there."""
HOURS_KEPT = 24
_HOUR_MS = 3_600_000


class Retention:
    """Deletes what is needed no more of one model. Remembers the manifests that it has read: they never change."""

    def __init__(self, blobs: Blobs, model: str) -> None:
        self._blobs, self._model = blobs, model
        self._read: dict[str, CheckpointManifest | None] = {}
        self._unneeded: set[str] = set()
        """Parts that were, or perhaps were, named by what is gone: deleted unless something names them."""

    def sweep(self) -> None:
        """Delete the parts that no manifest names. For a trainer that has stored nothing yet. Raises `Unavailable`."""
        if not self._all_are_known():
            logger.warning("something unknown lies in %s: no part there is deleted", folder_of(self._model))
            return
        named = self._parts(stored_checkpoints(self._blobs, self._model))
        for name in self._blobs.list(parts_of(self._model)):
            if name.rpartition("/")[2] not in named:
                self._blobs.delete(name)

    def retire(self, run: str, leftovers: Collection[str] = ()) -> None:
        """Delete the manifests that are needed no more, and what they alone name. Raises `Unavailable`.

        Args:
            run: the run that goes on.
            leftovers: names of parts that this trainer stored and may have named in no manifest.
        """
        self._unneeded |= set(leftovers)
        stored = stored_checkpoints(self._blobs, self._model)
        gone = self._gone(stored, run)
        kept = [each for each in stored if each not in gone]
        self._unneeded |= self._parts(gone)
        self._unneeded -= self._parts(kept)
        for each in gone:
            self._blobs.delete(f"{folder_of(self._model)}/{each.name}")
            self._read.pop(each.name, None)
        if self._unneeded and not self._all_are_known():
            return
        for name in sorted(self._unneeded):
            self._blobs.delete(f"{parts_of(self._model)}/{name}")
        self._unneeded.clear()

    def _gone(self, stored: list[Stored], run: str) -> list[Stored]:
        by_run: dict[str, list[Stored]] = {}
        for each in stored:
            by_run.setdefault(each.run, []).append(each)
        own = sorted(by_run.pop(run, []), key=lambda each: each.step)
        kept = {each.name for each in own[-KEEP:]} | self._hourly(own)
        gone = [each for each in own if each.name not in kept]
        if len(by_run) > OTHER_RUNS_KEPT:
            furthest = {
                run: max(map(place_of, known(self._blobs, self._model, found)), default=None)
                for run, found in by_run.items()
            }
            runs = sorted((place, run) for run, place in furthest.items() if place is not None)
            needed = self._needed(own, by_run)
            gone += [each for _, run in runs[:-OTHER_RUNS_KEPT] for each in by_run[run] if each.name not in needed]
        return gone

    def _needed(self, own: list[Stored], by_run: Mapping[str, list[Stored]]) -> set[str]:
        """Return what a run goes on from while it has few checkpoints of its own."""
        newest = self._manifest(own[-1]) if 0 < len(own) < KEEP else None
        branch = newest.meta.branch if newest is not None else None
        if branch is None:
            return set()
        return {each.name for each in on_path(by_run.get(branch.run, []), [Leg(branch.run, branch.step)])[:KEEP]}

    def _hourly(self, own: list[Stored]) -> set[str]:
        """Return the first checkpoint of each hour, 24 hours back from the newest."""
        times = [(m.meta.event_ms, each.name) for each in own if (m := self._manifest(each)) and m.meta.event_ms]
        newest_ms = max((ms for ms, _ in times), default=0)
        first: dict[int, str] = {}
        for ms, name in times:
            if ms > newest_ms - HOURS_KEPT * _HOUR_MS:
                first.setdefault(ms // _HOUR_MS, name)
        return set(first.values())

    def _parts(self, stored: list[Stored]) -> set[str]:
        manifests = [self._manifest(each) for each in stored]
        return {part.name for manifest in manifests if manifest is not None for part in manifest.parts()}

    def _manifest(self, each: Stored) -> CheckpointManifest | None:
        """Return a manifest, None where there is none or it is damaged: then it names nothing that could be read."""
        if not each.digest:
            return None
        if each.name not in self._read:
            try:
                self._read[each.name] = read_manifest(self._blobs, self._model, each)
            except Damaged as error:
                logger.warning("checkpoint %s holds nothing: %s", each.name, error)
                self._read[each.name] = None
        return self._read[each.name]

    def _all_are_known(self) -> bool:
        """Say whether all that lies among the manifests is a checkpoint of a format that names its parts, or none."""
        names = {name.rpartition("/")[2] for name in self._blobs.list(folder_of(self._model))}
        return names == {each.name for each in stored_checkpoints(self._blobs, self._model)}
