"""`headrace lake import`: history that was not logged here, into the lake."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pyarrow as pa

from headrace.cli.lake.lake_export import time_ms
from headrace.cli.progress_bar import LINE_S, duration
from headrace.cli.runtime import Runtime
from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.contract.privacy import KEY_NAME, Privacy

if TYPE_CHECKING:
    from headrace.backends.lake.delta import DeltaLake
    from headrace.backends.lake.imports import Imports
    from headrace.stream.history.importer import Imported, Parts

logger = logging.getLogger("headrace.import")

IMPORT_MAX_S = 86_400.0
"""Longest that anything of it may stand still, between two pieces of work."""
DRY_ROWS = 20_000


def add_import_arguments(importing: argparse.ArgumentParser) -> None:
    """Add the flags of `lake import`."""
    importing.add_argument("mapping", nargs="?", type=Path, metavar="HISTORY.toml", help="which files, which columns")
    importing.add_argument("--from", dest="begin", metavar="TIME", help="leave out what is before it")
    importing.add_argument(
        "--until",
        dest="end",
        metavar="TIME",
        help="leave out impressions from it on; default: the first live event, or now",
    )
    importing.add_argument(
        "--dry-run", action="store_true", help="say what would be imported and refused; write nothing"
    )
    importing.add_argument(
        "--rows", type=int, default=DRY_ROWS, metavar="N", help=f"of each input, in a dry run ({DRY_ROWS:,}; 0: all)"
    )
    importing.add_argument("--commit-rows", type=int, metavar="N", help="samples in one commit (200,000)")
    importing.add_argument("--abandon", action="store_true", help="let a half done import be over as it is")


def import_history(runtime: Runtime, args: argparse.Namespace) -> int:
    """Do it."""
    from headrace.backends.lake.imports import Imports, shown
    from headrace.kernels.sample_ids import seal_of
    from headrace.stream.history.importer import COMMIT_ROWS, Importer, ImportRequest
    from headrace.stream.history.mapping import read_mapping

    logger.setLevel(logging.INFO)
    lake = runtime.lake()
    imports = Imports(lake, seal_of)
    if args.abandon:
        return _abandon(runtime, imports)
    if args.mapping is None:
        raise ConfigRejected("name the TOML file that says which files are the history: `headrace lake import FILE`.")
    request = ImportRequest(
        history=read_mapping(args.mapping, runtime.project),
        folder=args.mapping.resolve().parent,
        work=runtime.home / "import",
        from_ms=None if args.begin is None else time_ms("--from", args.begin),
        until_ms=None if args.end is None else time_ms("--until", args.end),
        commit_rows=args.commit_rows or COMMIT_ROWS,
        dry_run=args.dry_run,
        rows_max=args.rows or None if args.dry_run else None,
    )
    began_s = runtime.clock.monotonic()
    importer = Importer(_parts(runtime, lake, imports), request)
    if (done := imports.done(importer.id)) is not None:
        print(f"import {shown(importer.id)} is done: it gave the lake {done:,} samples. Nothing is to do.")
        return 0
    logger.info("import %s; refused rows are written to %s", shown(importer.id), importer.refused_file)
    try:
        with runtime.calls.named("the import", IMPORT_MAX_S):
            found = importer.run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on.", file=sys.stderr)
        raise
    finally:
        shutil.rmtree(_spills(runtime), ignore_errors=True)
    state = None if args.dry_run else lake.state()
    found.version = None if state is None else state.version
    if args.json:
        print(msgspec.json.encode(found).decode())
    else:
        _show(found, importer.refused_file, runtime.clock.monotonic() - began_s, dry_run=args.dry_run)
    if not args.dry_run and found.samples:
        _tell_trainer(runtime)
    return 0 if found.samples or not any(found.rows.values()) else 1


def _parts(runtime: Runtime, lake: DeltaLake, imports: Imports) -> Parts:
    from headrace.backends.spill_file import FileSpill
    from headrace.stream.history.border import first_live_ms
    from headrace.stream.history.importer import Parts, Steps

    clock, said_s = runtime.clock, 0.0

    def tell(what: str, rows: int) -> None:
        nonlocal said_s
        if clock.monotonic() - said_s >= LINE_S:
            said_s = clock.monotonic()
            logger.info("%s: %s", what, f"{rows:,}")

    def first_live() -> int | None:
        try:
            runtime.require_kafka()
        except Unavailable as error:
            raise Unavailable(
                f"{error} It is asked for the first live event, before which the import ends; with --until TIME it is "
                "not."
            ) from error
        return first_live_ms(lake, runtime.reader(), runtime.topics)

    def held_ids(version: int | None, begin_ms: int, end_ms: int) -> pa.Array:
        if version is None and lake.state() is None:
            return pa.array([], pa.string())
        rows = lake.read(version, ["event_id"], span_ms=(begin_ms, end_ms))
        return rows["event_id"].combine_chunks()

    spills = _spills(runtime)
    return Parts(
        project=runtime.project,
        config=runtime.config,
        privacy=Privacy(runtime.project, os.environ.get(KEY_NAME, "")),
        imports=imports,
        held_ids=held_ids,
        now_ms=clock.now_ms,
        first_live_ms=first_live,
        spill=lambda partition: FileSpill(spills / str(partition)),
        steps=Steps(tell=tell),
    )


def _spills(runtime: Runtime) -> Path:
    return runtime.home / "import" / f"spill-{os.getpid()}"


def _abandon(runtime: Runtime, imports: Imports) -> int:
    from headrace.backends.lake.imports import shown
    from headrace.contract.formats.sample import sample_schema

    begun = imports.open()
    if begun is None:
        print("no import is under way.")
        return 0
    imports.end(begun, sample_schema(runtime.project))
    print(f"import {shown(begun.id)} is over; the {begun.stored.count:,} samples that it stored stay in the lake.")
    return 0


def _iso(time_ms_: int | None) -> str:
    if time_ms_ is None:
        return "nothing"
    return datetime.fromtimestamp(time_ms_ / 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _show(found: Imported, refused_file: Path, seconds: float, *, dry_run: bool) -> None:
    rows = ", ".join(f"{name} {count:,}" for name, count in found.rows.items())
    print(f"rows read: {rows}" + (" (the first ones alone; --rows 0 looks at all)" if found.is_sample else ""))
    for name, columns in found.ignored.items():
        if columns:
            print(f"  {name}: no field takes the columns {', '.join(columns)}")
    events = ", ".join(f"{name} {count:,}" for name, count in found.events.items())
    print(f"events: {events}; impressions from {_iso(found.first_ms)} to {_iso(found.last_ms)}")
    print(f"the import ends before {_iso(found.until_ms)}")
    if found.live_ms is not None:
        print(
            f"warning: live events begin at {_iso(found.live_ms)}, before that end. An impression that is in both is "
            "learnt twice, unless it has the same event_id in both and was in the lake already. Without --until the "
            "import ends where they begin."
        )
    for reason, count in found.refused.items():
        print(f"refused, {reason}: {count:,}")
        for example in found.examples.get(reason, []):
            print(f"    {example}")
    if refused_file.exists():
        print(f"refused rows: {refused_file}")
    tasks = ", ".join(f"{name} {n:,} ({found.positives[name]:,} positive)" for name, n in found.labels.items())
    for task, count in found.unmatched.items():
        print(
            f"feedback of task {task} that meets no impression: {count:,}. Feedback finds its impression by "
            "request_id, place and partition key: see that the mapping takes the same columns for both."
        )
    what = "samples that would be stored" if dry_run else "samples"
    again = f", {found.before:,} of them stored before" if found.before else ""
    print(f"{what}: {found.samples:,}{again}: {tasks or 'none'}")
    if not dry_run:
        print(f"the lake is at version {found.version} ({duration(seconds)}, {found.commits} commits)")


def _tell_trainer(runtime: Runtime) -> None:
    """Say whether a run began before the import, which it will not learn."""
    from headrace.trainer.commit.publish import read_manifests

    try:
        runtime.require_kafka()
        runtime = runtime.of_variant(None)
        manifests = read_manifests(runtime.reader(), runtime.topics, runtime.project.model)
        model = runtime.project.model
    except Unavailable:
        print("Kafka did not answer: whether a run of the model has begun is not known.", file=sys.stderr)
        return
    if not manifests:
        print("no run of the model has begun: the first one begins with the lake.")
        return
    newest = manifests[-1]
    if newest.step == 0:
        print(
            f"run {newest.run} of model {model!r} had learnt nothing yet: `headrace restart train` lets "
            "it begin with the lake."
        )
        return
    print(
        f"run {newest.run} of model {model!r} began before this import and does not know its rows. To "
        "learn them, change recipe.seed in the project's file and start `train` anew (`headrace restart train`): that "
        f"begins a run which learns the lake first, and {newest.run} is served meanwhile."
    )
