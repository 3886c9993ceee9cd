"""Look after the lake, and look into it.

  compact   write hours of many small files anew as one file each
  retain    drop hours of event time older than lake.retention_ms
  vacuum    delete files that no version needs that must stay
  upkeep    all three, as the sink does on its schedule
  history   the versions, newest first
  archive   from where to where events are archived, and what waits
  read      rows of a version (--version N), of a time (--at TIME), of a day (--day DATE)
  export    labelled samples for training elsewhere, point-in-time correct: one row an impression, as Parquet
  import    history that was not logged here: Parquet, CSV or Delta, through the same checks, join and features

    headrace lake import history.toml --dry-run
    headrace lake export --from 2026-11-25T01:00Z --to 2026-11-25T09:00Z --to-parquet DIR

All may run beside sinks, trainers and each other; killed, they are run again. `read` shows a few rows as stored, or
writes all of them with --out FILE (.parquet, .arrow, .csv, or .jsonl).
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Iterable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from headrace.cli.lake.lake_archive import show_archive
from headrace.cli.lake.lake_export import add_export_arguments, export
from headrace.cli.lake.lake_import import add_import_arguments, import_history
from headrace.cli.runtime import Runtime, add_common, open_runtime
from headrace.process.call_watch import LAKE_MAX_S

if TYPE_CHECKING:
    from headrace.backends.lake.upkeep import Done, Upkeep

ROWS_SHOWN = 10
# Below everything else on the machine: upkeep has time, the sink's commits have not.
NICENESS = 10
KEEP_MAX_S = 21_600.0
"""Longest upkeep that a person starts; the sink kills the one that it starts after 1,800 s."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    actions = parser.add_subparsers(
        dest="action",
        metavar="compact|retain|vacuum|upkeep|history|archive|read|export|import",
        required=True,
    )
    compact = actions.add_parser("compact", help="small files of an hour into one")
    compact.add_argument("--files", type=int, metavar="N", help="hours of at least N small files (lake.compact_files)")
    retain = actions.add_parser("retain", help="drop hours older than lake.retention_ms")
    vacuum = actions.add_parser("vacuum", help="delete files that no version needs that must stay")
    vacuum.add_argument("--dry-run", action="store_true", help="say which; delete nothing")
    upkeep = actions.add_parser("upkeep", help="compact, retain and vacuum")
    upkeep.add_argument("--no-vacuum", action="store_true", help="leave files where they are")
    upkeep.add_argument("--compact-only", action="store_true", help="neither retention nor vacuum")
    history = actions.add_parser("history", help="the versions, newest first")
    history.add_argument("--limit", type=int, default=20, metavar="N", help="the newest N; 0 shows all")
    archived = actions.add_parser("archive", help="from where to where events are archived")
    read = actions.add_parser("read", help="rows of a version, a time, a day")
    when = read.add_mutually_exclusive_group()
    when.add_argument("--version", type=int, metavar="N", help="as `history` shows it; the newest by default")
    when.add_argument("--at", metavar="TIME", help="the version of that time, such as 2026-11-25T01:00:00Z")
    read.add_argument("--day", type=date.fromisoformat, metavar="DATE", help="event time within this UTC day")
    read.add_argument("--columns", metavar="A,B", help="these only")
    read.add_argument("--limit", type=int, metavar="N", help=f"rows; {ROWS_SHOWN} when shown, all with --out")
    read.add_argument("--out", type=Path, metavar="FILE", help="write .parquet, .arrow, .csv or .jsonl")
    exporting = actions.add_parser("export", help="labelled samples of a time range as Parquet files")
    add_export_arguments(exporting)
    importing = actions.add_parser("import", help="history that was not logged here, into the lake")
    add_import_arguments(importing)
    for each in (compact, retain, vacuum, upkeep, history, archived, read, exporting, importing):
        each.add_argument("--json", action="store_true", help="print JSON, one object a line")
        add_common(each)


def main(args: argparse.Namespace) -> int:
    """Do one of the eight."""
    args.log_level = "WARNING" if args.log_level == "INFO" else args.log_level
    runtime = open_runtime(args)
    if args.action == "history":
        return _history(runtime, args)
    if args.action == "archive":
        return show_archive(runtime, args)
    if args.action == "read":
        return _read(runtime, args)
    if args.action == "export":
        return export(runtime, args)
    if args.action == "import":
        return import_history(runtime, args)
    return _keep(runtime, args)


def pinned_versions(runtime: Runtime) -> set[int]:
    """Return the versions that checkpoints of the project's models, its variants' too, are in the middle of.

    Raises `Unavailable`.
    """
    from headrace.trainer.commit.checkpoint import stored_versions
    from headrace.trainer.commit.claim import models_of

    blobs = runtime.blobs()
    return {v for model in models_of(blobs, runtime.project.name) for v in stored_versions(blobs, model)}


def _keep(runtime: Runtime, args: argparse.Namespace) -> int:
    os.nice(NICENESS)
    with runtime.calls.named("the upkeep of the lake", KEEP_MAX_S):
        return _keep_in_time(runtime, args)


def _keep_in_time(runtime: Runtime, args: argparse.Namespace) -> int:
    from headrace.backends.archive.upkeep import ArchiveUpkeep
    from headrace.backends.lake.upkeep import Done, Upkeep

    lake, archive, now_ms = runtime.lake(), runtime.archive(), runtime.clock.now_ms()
    done = Done()
    if args.action != "upkeep":
        lake.opened()
    if lake.open() is not None:
        _keep_table(Upkeep(lake), done, args, now_ms, pinned_versions(runtime))
    if archive.open() is not None:
        done.archive = Done()
        _keep_table(ArchiveUpkeep(archive, now_ms), done.archive, args, now_ms, ())
    _show(done, args.json)
    return 0


def _keep_table(keeper: Upkeep, done: Done, args: argparse.Namespace, now_ms: int, pinned: Iterable[int]) -> None:
    deletes = not getattr(args, "compact_only", False)
    if args.action == "retain" or (args.action == "upkeep" and deletes):
        keeper.retain(done, now_ms)
    if args.action in ("compact", "upkeep"):
        keeper.compact(done, files_min=getattr(args, "files", None))
    if args.action == "vacuum" or (args.action == "upkeep" and deletes and not args.no_vacuum):
        dry_run = getattr(args, "dry_run", False)
        found = keeper.vacuum(done, pinned, dry_run=dry_run)
        if dry_run:
            print("\n".join(found), file=sys.stderr if args.json else sys.stdout)
    keeper.look(done)


def _show(done: Done, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(done).decode())
        return
    _lines(done)
    if done.archive is not None:
        print("the archive of events:")
        _lines(done.archive)


def _lines(done: Done) -> None:
    print(f"version {done.version}: {done.files:,} files, {done.bytes:,} bytes")
    print(f"{done.files_compacted:,} files of {done.hours_compacted:,} hours compacted")
    print(f"{done.rows_dropped:,} rows of {done.hours_dropped:,} hours dropped")
    kept = f"; versions {done.kept_versions} kept for readers" if done.kept_versions else ""
    print(f"{done.files_vacuumed:,} files deleted{kept}")
    if done.refused:
        print(f"{done.refused} commits were refused, since another was first; run it again")


def _history(runtime: Runtime, args: argparse.Namespace) -> int:
    from headrace.backends.lake.upkeep import Upkeep

    for entry in Upkeep(runtime.lake()).history(args.limit or None):
        at = datetime.fromtimestamp(entry.time_ms / 1000, UTC).isoformat(timespec="milliseconds")
        if args.json:
            counts = {name: getattr(entry, name) for name in ("rows_added", "files_added", "files_removed")}
            row = {"version": entry.version, "time": at, "operation": entry.operation, **counts}
            print(msgspec.json.encode(row).decode())
        else:
            changes = f"{entry.rows_added:>9,} rows  +{entry.files_added} -{entry.files_removed} files"
            print(f"{entry.version:>8}  {at}  {entry.operation:<14}{changes}")
    return 0


def _read(runtime: Runtime, args: argparse.Namespace) -> int:
    from headrace.backends.lake.export import export as write_rows
    from headrace.backends.lake.export import parse_at

    lake = runtime.lake()
    version = args.version
    if args.at is not None or version is None:
        version = int(lake.opened(None if args.at is None else parse_at(args.at)).version())
    columns = args.columns.split(",") if args.columns else None
    with (
        runtime.calls.named("the lake", LAKE_MAX_S),
        lake.leased(version, f"read-{socket.gethostname()}-{os.getpid()}"),
    ):
        rows = lake.read(version, columns, day=args.day)
    total = rows.num_rows
    limit = args.limit if args.limit is not None else None if args.out else ROWS_SHOWN
    rows = rows if limit is None else rows.slice(0, limit)
    if args.out:
        write_rows(rows, args.out)
        print(f"version {version}: {rows.num_rows:,} of {total:,} rows in {args.out}", file=sys.stderr)
        return 0
    if not args.json:
        print(f"version {version}: {total:,} rows, {rows.num_rows} shown", file=sys.stderr)
    for row in rows.to_pylist():
        print(msgspec.json.encode(row).decode())
    return 0
