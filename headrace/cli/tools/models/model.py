"""The project's models: which one is served, a variant beside the project's own, and out to elsewhere.

  list      each model, and which is served; the decisions so far
  show      the figures of a variant beside those of the project's own recipe, and how far behind it is
  promote   let a variant be served from now on, or with --main the project's own recipe again. It looks first whether
            serving can; requests go on, each is answered by one model or the other
  export    the newest snapshot as ONNX, as a `torch.export` program and as Parquet, with what the inputs are

    headrace model show deep
    headrace model promote deep --reason "log loss 0.591, was 0.604"
    headrace model export --to DIR

docs/models.md has the way from a declared variant to the project's own recipe. DIR is there whole afterwards, or not at
all. The models take what featurizing gives (ids and numbers), not raw events; docs/export.md shows both halves.
Needs: pip install 'headrace[export]'.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from headrace.cli.progress_bar import duration
from headrace.cli.runtime import Runtime, add_common, add_variant, open_runtime
from headrace.cli.tools.models.promote import add_models
from headrace.cli.tools.models.promote import main as models
from headrace.contract.errors import ConfigRejected, InvariantBroken, Unavailable, listed
from headrace.contract.formats.json_record import decode_json
from headrace.contract.formats.snapshot import Manifest, Weights
from headrace.contract.project import Project
from headrace.contract.recipe import Recipe
from headrace.contract.spec import FeatureSpec

if TYPE_CHECKING:
    from headrace.trainer.export.export import Exported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add_models(actions, add_common)
    export = actions.add_parser("export", help="a snapshot as ONNX, torch.export and Parquet")
    export.add_argument("--to", required=True, type=Path, metavar="DIR", help="folder to make")
    export.add_argument("--version", metavar="RUN-STEP", help="this snapshot; the newest one by default")
    export.add_argument(
        "--inline-bytes",
        type=int,
        metavar="N",
        help="rows of more bytes than this get a file of their own, rows.safetensors (67,108,864)",
    )
    export.add_argument("--json", action="store_true", help="print one JSON object")
    add_variant(export, "export")
    add_common(export)


def main(args: argparse.Namespace) -> int:
    """Do one of the four."""
    return export(args) if args.action == "export" else models(args)


def export(args: argparse.Namespace) -> int:
    """Export once."""
    from headrace.trainer.export.export import INLINE_BYTES, export_model, refuse_there
    from headrace.trainer.export.inputs import declared_types
    from headrace.trainer.export.programs import require_packages

    args.log_level = "WARNING" if args.log_level == "INFO" else args.log_level
    require_packages()
    refuse_there(args.to.resolve())
    runtime = open_runtime(args)
    runtime.require_kafka()
    runtime = runtime.of_variant(args.variant)
    began_s = runtime.clock.monotonic()
    manifest, weights = _snapshot(runtime, args.version)
    done = export_model(
        manifest,
        weights,
        args.to,
        types=declared_types(runtime.project, decode_json(manifest.spec_json, FeatureSpec)),
        inline_bytes=INLINE_BYTES if args.inline_bytes is None else args.inline_bytes,
    )
    if args.json:
        print(msgspec.json.encode(done).decode())
        return 0
    print("\n".join(_told(done, args.to, duration(runtime.clock.monotonic() - began_s))))
    return 0


def _snapshot(runtime: Runtime, version: str | None) -> tuple[Manifest, Weights]:
    """Return the snapshot that is asked for, as serving admits it."""
    from headrace.serving.gate.admit import admit_snapshot
    from headrace.trainer.commit.publish import read_manifests

    project = runtime.project
    manifest = _chosen(read_manifests(runtime.reader(), runtime.topics, project.model), version, project)
    blobs = runtime.blobs()
    data = blobs.get(manifest.blob)
    if data is None:
        raise Unavailable(f"{manifest.blob} is not in the store any more: export again, for a newer snapshot.")
    # The project's own recipe bounds the region that `serve` made, not what is exported.
    try:
        recipe: Recipe = decode_json(manifest.recipe_json, Recipe)
    except msgspec.MsgspecError as error:
        raise InvariantBroken(
            f"{manifest.version} was trained by a recipe that is not known here: {error}. Export with its release."
        ) from error
    return manifest, admit_snapshot(manifest, data, project=msgspec.structs.replace(project, recipe=recipe))


def _chosen(manifests: Sequence[Manifest], version: str | None, project: Project) -> Manifest:
    if not manifests:
        raise ConfigRejected(
            f"no snapshot of {project.model!r} is announced: start `train`, and wait until /v1/model names a version."
        )
    if version is None:
        return manifests[-1]
    found = [each for each in manifests if each.version == version]
    if not found:
        raise ConfigRejected(
            f"--version {version}: no snapshot of it is announced; there are {listed({m.version for m in manifests})}. "
            "What a delta made is in the next snapshot."
        )
    return found[-1]


def _told(done: Exported, target: Path, took: str) -> list[str]:
    """Return what was written, in lines."""
    held = "in the models" if done.inline else "in rows.safetensors, which the models' caller looks ids up in"
    lines = [
        f"{done.model} {done.version}: chain {done.chain}, seq {done.seq}, digest {done.digest}",
        f"{done.rows:,} rows of {done.row_bytes} bytes, {held}; tasks {', '.join(done.tasks)}",
    ]
    lines += [f"  {file.name:<17}{file.bytes:>14,} bytes" for file in done.files]
    return [*lines, f"{sum(file.bytes for file in done.files):,} bytes in {target} ({took})"]
