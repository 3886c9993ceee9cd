"""A snapshot for use without Headrace: an ONNX model, a `torch.export` program, the rows, and what the inputs are.

| file | what |
|---|---|
| `model.onnx` | ids and numbers in, an answer a task out; for onnxruntime |
| `model.pt2` | the same program for `torch.export.load` |
| `rows.parquet` | the rows by key, to look into |
| `rows.safetensors` | the rows by key, to look ids up in: only where they are too large for the models |
| `inputs.json` | every input and output: see `headrace.trainer.export.inputs` |
| `manifest.json` | which snapshot it is, its recipe and specification, sizes and digests of the files |

1. Both programs are made, and asked beside `headrace.trainer.model.scoring` for the same rows. Where one says something
   else nothing is written.
2. All files are written into a hidden folder, the manifest last; see `headrace.stream.export.whole_folder`.

Nothing in a file depends on when or where it is made: equal snapshots give equal bytes with equal versions of torch,
onnx, onnxscript and pyarrow, which the manifest names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.contract.errors import ConfigRejected, InvariantBroken
from headrace.contract.formats.snapshot import Manifest, Weights
from headrace.contract.recipe import Recipe
from headrace.contract.spec import PAD, FeatureSpec
from headrace.stream.export.whole_folder import names_in, store, whole_folder
from headrace.trainer.export.inputs import describe
from headrace.trainer.export.programs import onnx_bytes, require_packages, torch_bytes, torch_program
from headrace.trainer.export.rows import ascending, row_bytes, write_parquet, write_safetensors
from headrace.trainer.export.torch_scorer import SLOTS, TorchScorer
from headrace.trainer.model.scoring import score
from headrace.trainer.model.tables.table import initial_values

FORMAT = 1
INLINE_BYTES = 64 * 2**20
"""Rows of at most so many bytes, keys included, lie in the models; larger ones in a file of their own."""
INLINE_DIM = 32
"""Embedding numbers of rows that lie in the models. What an id without a row gives is about 50 steps of an ONNX model a
number, whose export takes a second for four of them."""
ONNX_FILE, TORCH_FILE, PARQUET_FILE, ROWS_FILE = "model.onnx", "model.pt2", "rows.parquet", "rows.safetensors"
INPUTS_FILE, MANIFEST_FILE = "inputs.json", "manifest.json"
TOLERANCE = 1e-5
"""Of an answer of 1 or less; of larger ones this share of it."""
_ASKED_ROWS = 64
_MADE_WITH = ("torch", "onnx", "onnxscript", "pyarrow")


class File(msgspec.Struct, frozen=True, kw_only=True):
    """One file of an export."""

    name: str
    bytes: int
    sha256: str


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What was written."""

    model: str
    version: str
    """The snapshot's: "<run>-<step>"."""
    chain: str
    """The snapshot that deltas follow on: this one."""
    seq: int
    """How many deltas of the chain are in it: none."""
    digest: str
    """Of the whole model as it was learnt, the one that `headrace replay` reaches."""
    rows: int
    row_bytes: int
    """Of one row with its key."""
    inline: bool
    """Whether the models hold the rows."""
    tasks: tuple[str, ...]
    files: tuple[File, ...]


def export_model(
    manifest: Manifest,
    weights: Weights,
    target: Path,
    *,
    types: Mapping[str, str],
    inline_bytes: int = INLINE_BYTES,
) -> Exported:
    """Write a snapshot to the folder `target`, all or nothing.

    Args:
        weights: the snapshot's, as serving admits them.
        types: see `headrace.trainer.export.inputs.declared_types`.
        inline_bytes: rows of more bytes get a file of their own, and so do those of more than `INLINE_DIM` numbers.

    Raises:
        ConfigRejected: packages are missing, the folder is there, the model cannot be exported.
        InvariantBroken: an exported program answers something else than the model. Nothing is written.
        Unavailable: the folder cannot be written.
    """
    target = target.resolve()
    refuse_there(target)
    require_packages()
    recipe: Recipe = msgspec.json.decode(manifest.recipe_json, type=Recipe)
    features: FeatureSpec = msgspec.json.decode(manifest.spec_json, type=FeatureSpec)
    order_K = ascending(weights)
    keys = len(order_K)
    is_small = keys * row_bytes(recipe) <= inline_bytes or not keys
    is_inline = is_small and (recipe.row_dim <= INLINE_DIM or not recipe.row_scale)
    held = Weights(weights.keys_K[order_K], weights.values_KV[order_K], weights.dense) if is_inline else weights
    scorer = TorchScorer(recipe, features, held, has_rows=is_inline)
    about = {
        "headrace.model": manifest.model,
        "headrace.version": manifest.version,
        "headrace.digest": manifest.digest,
        "headrace.spec": manifest.spec,
    }
    program = torch_program(scorer, held.keys_K)
    models = {ONNX_FILE: onnx_bytes(program, scorer, about), TORCH_FILE: torch_bytes(program, about)}
    _check_answers(program, models[ONNX_FILE], scorer, weights, order_K)
    said = {"format": FORMAT} | describe(recipe, features, types, rows_file="" if is_inline else ROWS_FILE)
    with whole_folder(target) as folder:
        for name, data in models.items():
            store(folder / name, data)
        write_parquet(folder / PARQUET_FILE, weights, recipe, order_K)
        if not is_inline:
            write_safetensors(folder / ROWS_FILE, weights, order_K, about)
        store(folder / INPUTS_FILE, _text(said))
        exported = Exported(
            model=manifest.model,
            version=manifest.version,
            chain=manifest.chain or manifest.version,
            seq=manifest.seq,
            digest=manifest.digest,
            rows=keys,
            row_bytes=row_bytes(recipe),
            inline=is_inline,
            tasks=recipe.heads,
            files=tuple(map(_told, sorted(folder.iterdir()))),
        )
        store(folder / MANIFEST_FILE, _text(_manifest(exported, manifest, recipe, features)))
    return exported


def refuse_there(target: Path) -> None:
    """Raise `ConfigRejected` unless nothing or an empty folder is at `target`."""
    if names := names_in(target):
        raise ConfigRejected(f"{target} is there already ({names[0]} is in it): name a folder that is not there yet.")


def _check_answers(
    program: Any, onnx_model: bytes, scorer: TorchScorer, weights: Weights, order_K: npt.NDArray[np.int64]
) -> None:
    """Raise `InvariantBroken` where a program answers something else than the model does."""
    import onnxruntime
    import torch

    recipe, features = scorer.recipe, scorer.features
    rng = np.random.default_rng(recipe.seed)
    # Known ids, ids that nobody knows, and places without a value.
    slots_NF = rng.integers(-(2**63), 2**63 - 1, (_ASKED_ROWS, features.slots))
    if len(order_K):
        known_NF = rng.random(slots_NF.shape) < 0.7
        slots_NF[known_NF] = rng.choice(weights.keys_K, int(known_NF.sum()))
    slots_NF[rng.random(slots_NF.shape) < 0.1] = PAD
    numeric_ND = rng.normal(size=(_ASKED_ROWS, features.numerics)).astype(np.float32)
    found = Found(recipe, weights, order_K)
    wanted_NT = score(recipe, features, slots_NF, numeric_ND, lookup=found.values, dense=weights.dense)
    first: npt.NDArray[Any] = slots_NF
    if scorer.inputs[0] != SLOTS:
        first = found.values(slots_NF.reshape(-1)).reshape(*slots_NF.shape, -1)
    session = onnxruntime.InferenceSession(onnx_model, providers=["CPUExecutionProvider"])
    by_onnx_NT = np.stack(
        session.run(list(recipe.heads), dict(zip(scorer.inputs, (first, numeric_ND), strict=True))), 1
    )
    said = program.module()(torch.from_numpy(first), torch.from_numpy(numeric_ND))
    by_torch_NT = np.stack([said[name].numpy() for name in recipe.heads], 1)
    for what, answer_NT in ((ONNX_FILE, by_onnx_NT), (TORCH_FILE, by_torch_NT)):
        away_NT = np.abs(answer_NT - wanted_NT) / np.maximum(np.abs(wanted_NT), 1.0)
        if not (away_NT <= TOLERANCE).all():
            raise InvariantBroken(
                f"{what} says {float(away_NT.max()):.3g} another thing than the model, and {TOLERANCE:g} is allowed: "
                "nothing was written. A module of your own must be a pure function of its inputs and parameters, "
                "without branches on them."
            )


class Found:
    """Looks keys up among the rows of a snapshot, as serving does."""

    def __init__(self, recipe: Recipe, weights: Weights, order_K: npt.NDArray[np.int64]) -> None:
        self._recipe, self._weights, self._order_K = recipe, weights, order_K

    def values(self, keys_N: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the values of each key: float32 [N, V]."""
        recipe, keys_K = self._recipe, self._weights.keys_K
        out_NV = initial_values(keys_N, dim=recipe.row_dim, seed=recipe.seed, scale=recipe.row_scale)
        if len(keys_K):
            at_N = np.searchsorted(keys_K, keys_N, sorter=self._order_K)
            row_N = self._order_K[np.minimum(at_N, len(keys_K) - 1)]
            known_N = keys_K[row_N] == keys_N
            out_NV[known_N] = self._weights.values_KV[row_N[known_N]]
        return out_NV


def _told(path: Path) -> File:
    with path.open("rb") as file:
        return File(name=path.name, bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _manifest(exported: Exported, manifest: Manifest, recipe: Recipe, features: FeatureSpec) -> dict[str, Any]:
    return {
        "format": FORMAT,
        **msgspec.to_builtins(exported),
        "run": manifest.run,
        "step": manifest.step,
        "positions": manifest.positions,
        "stored_left": manifest.stored_left,
        "live": manifest.live,
        "generation": manifest.generation,
        "task": recipe.task,
        "tolerance": TOLERANCE,
        "made_with": {name: version(name) for name in _MADE_WITH},
        "spec_digest": manifest.spec,
        "recipe": msgspec.to_builtins(recipe),
        "spec": msgspec.to_builtins(features),
    }


def _text(said: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(said), indent=2) + b"\n"
