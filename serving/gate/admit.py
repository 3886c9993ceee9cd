"""The gate: which snapshots and deltas may be served. It refuses the others by a reason; the served model stays.

| reason | refused because |
|---|---|
| `sha256` | the blob is not the one that the manifest announced |
| `format` | a later release wrote it |
| `damaged` | it cannot be read, or its rows, dense weights or manifest do not match their digests |
| `kind`, `model`, `run`, `generation` | it is no snapshot (delta), or of another model, run or generation |
| `version` | it holds another version, one that is not "<run>-<step>", or one that leads back |
| `base` | it is a delta for another version than the one that is served |
| `chain`, `seq` | it is a delta of another or of a refused chain, or not the next one of its chain |
| `recipe`, `spec` | the recipe is unknown here, or the spec needs a field that the project does not declare |
| `spec` | it is a delta of another spec than the one that is served |
| `dim`, `dense` | rows or dense weights have another shape than recipe and spec (a delta: than what is served) |
| `key_zero`, `key_twice` | a row has the key 0, which marks an empty place, or a key has two rows, or one and none |
| `not_finite` | a weight is NaN or infinite |
| `not_scored` | a process cannot score its recent requests with it (the updater asks them) |
| `digest` | what would be served is not what the trainer says: a replica that went wrong, or a delta that lacks rows |

A delta is the next one of a chain when its base is the served version and it is number `seq + 1` of the chain that is
served, or number 1 of the chain that begins with the served version. Refused for `digest`, its whole chain is.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.contract.errors import ConfigRejected, InvariantBroken
from headrace.contract.formats.dense_change import Bits, WrongBase
from headrace.contract.formats.json_record import decode_json
from headrace.contract.formats.snapshot import (
    Manifest,
    UnknownFormat,
    Update,
    Weights,
    check_format,
    decode_update,
    served_digest,
)
from headrace.contract.project import Project, Recipe
from headrace.contract.spec import FeatureSpec
from headrace.serving.model.shared_reader import Meta
from headrace.trainer.model.scoring import shapes_of

logger = logging.getLogger("headrace.serve")

Shapes = Mapping[str, list[int]]


class Refused(InvariantBroken):
    """A snapshot or delta that must not be served; `reason` is a stable code for the metric."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def admit_snapshot(manifest: Manifest, data: bytes, *, project: Project) -> Weights:
    """Return the weights of the snapshot that `manifest` announces, or raise `Refused`."""
    _check_format(manifest)
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.sha256:
        raise Refused("sha256", f"{manifest.blob} has SHA-256 {found}, its manifest says {manifest.sha256}.")
    update, inside = _decoded(data)
    weights = _put_together(update, inside)
    if inside.version != manifest.version or inside.step != manifest.step:
        raise Refused("version", f"the blob holds {inside.version}, its manifest says {manifest.version}.")
    for name in ("kind", "model", "run", "generation", "rows"):
        found, said = getattr(inside, name), getattr(manifest, name)
        if found != said:
            raise Refused(name, f"the blob of {manifest.version} is of {name} {found!r}, its manifest says {said!r}.")
    recipe, shapes = servable(manifest.version, manifest.spec_json, manifest.recipe_json, project)
    _check(weights, manifest.version, recipe.row_dim, shapes)
    return weights


def servable(version: str, spec_json: str, recipe_json: str, project: Project) -> tuple[Recipe, Shapes]:
    """Return the recipe and the shapes of the dense weights of a model that this project can serve.

    Raises `Refused`.
    """
    try:
        recipe: Recipe = decode_json(recipe_json, Recipe)
    except msgspec.MsgspecError as error:
        raise Refused("recipe", f"{version} was trained by a recipe that is not known here: {error}") from error
    try:
        spec: FeatureSpec = decode_json(spec_json, FeatureSpec)
        msgspec.structs.replace(project, features=spec, variants={}).checked()
    except (msgspec.MsgspecError, ConfigRejected) as error:
        raise Refused("spec", f"{version} cannot be served by this project: {error}") from error
    try:
        return recipe, shapes_of(recipe.checked(spec), spec)
    except ConfigRejected as error:
        raise Refused("recipe", f"{version} cannot be scored by this project: {error}") from error


def can_serve(meta: Meta, project: Project) -> bool:
    """Say whether a region that an earlier stage left holds a model of this project, as this process would load it."""
    try:
        _, shapes = servable(meta.manifest.version, meta.spec_json, meta.recipe_json, project)
    except Refused as refused:
        logger.warning("the model of an earlier stage is not served: %s", refused)
        return False
    return meta.manifest.model.partition(".")[0] == project.name and meta.shapes == dict(shapes)


def admit_delta(
    data: bytes,
    *,
    model: str,
    served: Manifest,
    dim: int,
    shapes: Shapes,
    refused: Collection[str] = (),
    dense_N: Bits | None = None,
) -> tuple[Weights, Manifest, str]:
    """Return a delta's weights and manifest, and SHA-256 of its dense weights, or raise `Refused`: it is exactly the
    next one of the chain, or nothing.

    Args:
        model: the name of the model that is served.
        served: the manifest of the version that is served now, of a snapshot or of a delta.
        shapes: of its dense weights.
        refused: snapshot versions that were refused; nothing of their chains is taken.
        dense_N: the bits of the dense weights that are served now: a delta may say what changed in them.
    """
    update, delta = _decoded(data)
    wanted = {"kind": "delta", "model": model, "run": served.run, "generation": served.generation, "spec": served.spec}
    for name, value in wanted.items():
        found = getattr(delta, name)
        if found != value:
            raise Refused(name, f"delta {delta.version} is of {name} {found!r}; served is {value!r}.")
    if delta.base != served.version:
        raise Refused("base", f"delta {delta.version} is for {delta.base}; {served.version} is served.")
    if delta.version != f"{delta.run}-{delta.step}" or delta.step <= served.step:
        raise Refused("version", f"delta {delta.version} of step {delta.step} does not follow {served.version}.")
    _check_place(delta, served, refused)
    if delta.dim != dim:
        raise Refused("dim", f"delta {delta.version} is of {delta.dim} dimensions, not {dim}.")
    if update.dense.shapes != dict(shapes):
        raise Refused("dense", f"{delta.version} has dense weights {update.dense.shapes}; expected are {dict(shapes)}.")
    weights = _put_together(update, delta, dense_N)
    _check(weights, delta.version, dim, shapes)
    return weights, delta, update.dense.sha256


def check_served(manifest: Manifest, rows: str, dense_sha256: str) -> str:
    """Return the digest of what would be served, or raise `Refused` where the trainer says another.

    Args:
        rows: `RowSum.text` of the rows that would have a place.
    """
    found = served_digest(rows, dense_sha256)
    if manifest.served not in ("", found):
        raise Refused(
            "digest",
            f"{manifest.version} would be served with digest {found}, and the trainer says {manifest.served}: this "
            "replica went wrong, or what led here lacks rows. Its chain is refused; the next snapshot is loaded.",
        )
    return found


def _check_place(delta: Manifest, served: Manifest, refused: Collection[str]) -> None:
    if delta.chain in refused:
        raise Refused("chain", f"delta {delta.version} is of the chain of {delta.chain}, which was refused.")
    chain, seq = (served.version, 0) if served.kind == "snapshot" else (served.chain, served.seq)
    if delta.chain == served.version:
        seq = 0
    elif delta.chain != chain:
        raise Refused("chain", f"delta {delta.version} is of the chain of {delta.chain}; served is that of {chain}.")
    if delta.seq != seq + 1:
        raise Refused("seq", f"delta {delta.version} is number {delta.seq} of its chain; {seq + 1} comes next.")


def _decoded(data: bytes) -> tuple[Update, Manifest]:
    try:
        return decode_update(data)
    except UnknownFormat as error:
        raise Refused("format", str(error)) from error
    except InvariantBroken as error:
        raise Refused("damaged", str(error)) from error


def _check_format(manifest: Manifest) -> None:
    try:
        check_format(manifest)
    except UnknownFormat as error:
        raise Refused("format", str(error)) from error


def _put_together(update: Update, manifest: Manifest, dense_N: Bits | None = None) -> Weights:
    try:
        return update.weights(dense_N)
    except WrongBase as error:
        raise Refused("digest", f"{manifest.version}: {error}") from error
    except InvariantBroken as error:
        raise Refused("damaged", f"{manifest.version}: {error}") from error


def _check(weights: Weights, version: str, dim: int, shapes: Shapes) -> None:
    if weights.values_KV.shape[1] != 1 + dim:
        raise Refused("dim", f"{version} has rows of {weights.values_KV.shape[1]} values, not {1 + dim}.")
    found = {name: list(array.shape) for name, array in weights.dense.items()}
    if found != dict(shapes):
        raise Refused("dense", f"{version} has dense weights {found}; expected are {dict(shapes)}.")
    if (weights.keys_K == 0).any():
        raise Refused("key_zero", f"{version} has a row for key 0, which no feature has.")
    named, gone = len(weights.keys_K) + len(weights.gone_K), len(weights.gone_K)
    distinct = _distinct(np.concatenate([weights.keys_K, weights.gone_K]))
    if distinct != named:
        raise Refused("key_twice", f"{version} has {len(weights.keys_K)} rows and removes {gone}, of {distinct} keys.")
    if not np.isfinite(weights.values_KV).all() or not all(np.isfinite(a).all() for a in weights.dense.values()):
        raise Refused("not_finite", f"{version} has weights that are NaN or infinite.")


def _distinct(keys_K: npt.NDArray[np.int64]) -> int:
    """Return how many keys differ. Sorts them in place: of two million keys `np.unique` takes 1.7 s, and keeps the
    interpreter's lock for most of it, in which this process answers nothing; a sort takes 11 ms and lets go of it."""
    keys_K.sort()
    return len(keys_K) - int(np.count_nonzero(keys_K[1:] == keys_K[:-1]))
