"""The gate: which snapshots and deltas may be served. It refuses the others by a reason; the served model stays.

| reason | refused because |
|---|---|
| `sha256` | the blob is not the one that the manifest announced |
| `damaged` | it cannot be read, or its dense weights do not match their digest |
| `version`, `base` | it holds another version, or is a delta for another version than the one that is served |
| `recipe`, `spec` | the recipe is unknown here, or the spec needs a field that the project does not declare |
| `dim`, `dense` | rows or dense weights have another shape than recipe and spec (a delta: than what is served) |
| `dim` | rows are wider than the shared region, which is as wide as the project's recipe |
| `not_finite` | a weight is NaN or infinite |
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec
import numpy as np

from headrace.contract.errors import ConfigRejected, InvariantBroken
from headrace.contract.formats.snapshot import Manifest, Weights, decode_weights
from headrace.contract.project import Project, Recipe
from headrace.contract.spec import FeatureSpec
from headrace.trainer.model.scoring import shapes_of

Shapes = Mapping[str, list[int]]


class Refused(InvariantBroken):
    """A snapshot or delta that must not be served; `reason` is a stable code for the metric."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def admit_snapshot(manifest: Manifest, data: bytes, *, project: Project) -> Weights:
    """Return the weights of the snapshot that `manifest` announces, or raise `Refused`."""
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.sha256:
        raise Refused("sha256", f"{manifest.blob} has SHA-256 {found}, its manifest says {manifest.sha256}.")
    weights, inside = _decoded(data)
    if inside.version != manifest.version:
        raise Refused("version", f"the blob holds {inside.version}, its manifest says {manifest.version}.")
    try:
        recipe = msgspec.json.decode(manifest.recipe_json, type=Recipe)
    except msgspec.MsgspecError as error:
        raise Refused(
            "recipe", f"{manifest.version} was trained by a recipe that is not known here: {error}"
        ) from error
    try:
        spec = msgspec.json.decode(manifest.spec_json, type=FeatureSpec)
        msgspec.structs.replace(project, features=spec).checked()
    except (msgspec.MsgspecError, ConfigRejected) as error:
        raise Refused("spec", f"{manifest.version} cannot be served by this project: {error}") from error
    room = project.recipe.row_dim
    if recipe.row_dim > room:
        raise Refused(
            "dim",
            f"{manifest.version} has rows of {1 + recipe.row_dim} values and this process has room for {1 + room}: "
            "restart `serve` with the project that declares the wider recipe.",
        )
    try:
        shapes = shapes_of(recipe.checked(spec), spec)
    except ConfigRejected as error:
        raise Refused("recipe", f"{manifest.version} cannot be scored by this project: {error}") from error
    _check(weights, manifest.version, recipe.row_dim, shapes)
    return weights


def admit_delta(data: bytes, *, base: str, dim: int, shapes: Shapes) -> tuple[Weights, Manifest]:
    """Return a delta's weights and manifest, or raise `Refused`.

    Args:
        base: the version that is served now.
        shapes: of its dense weights.
    """
    weights, manifest = _decoded(data)
    if manifest.base != base:
        raise Refused("base", f"delta {manifest.version} is for {manifest.base}; {base} is served.")
    _check(weights, manifest.version, dim, shapes)
    return weights, manifest


def _decoded(data: bytes) -> tuple[Weights, Manifest]:
    try:
        return decode_weights(data)
    except (InvariantBroken, msgspec.MsgspecError, KeyError, ValueError, TypeError, OSError) as error:
        raise Refused("damaged", f"weights of {len(data)} bytes cannot be read: {error}") from error


def _check(weights: Weights, version: str, dim: int, shapes: Shapes) -> None:
    if weights.values_KV.shape[1] != 1 + dim:
        raise Refused("dim", f"{version} has rows of {weights.values_KV.shape[1]} values, not {1 + dim}.")
    found = {name: list(array.shape) for name, array in weights.dense.items()}
    if found != dict(shapes):
        raise Refused("dense", f"{version} has dense weights {found}; expected are {dict(shapes)}.")
    if not np.isfinite(weights.values_KV).all() or not all(np.isfinite(a).all() for a in weights.dense.values()):
        raise Refused("not_finite", f"{version} has weights that are NaN or infinite.")
