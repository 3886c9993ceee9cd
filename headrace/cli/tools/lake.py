"""Look after the lake, and look into it.

  compact   write hours of many small files anew as one file each
  retain    drop hours of event time older than lake.retention_ms
  vacuum    delete files that no version needs that must stay
  upkeep    all three, as the sink does on its schedule
  history   the versions, newest first
  read      rows of a version (--version N), of a time (--at TIME), of a day (--day DATE)

All but `history` and `read` may run beside sinks, trainers and each other; killed, they are run again. `read` shows a
few rows, or writes all of them with --out FILE (.parquet, .arrow, .csv, or .jsonl).
"""

from __future__ import annotations

import argparse
import itertools
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.cli.runtime import Runtime, add_common, open_runtime
from headrace.contract.errors import ConfigRejected, Unavailable

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.backends.lake.delta import DeltaLake
    from headrace.backends.lake.upkeep import Done

HELP = "compact, vacuum, retain; show history; read a version"
ROWS_SHOWN = 10
# Below everything else on the machine: upkeep has time, the sink's commits have not.
NICENESS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    actions = parser.add_subparsers(dest="action", metavar="compact|retain|vacuum|upkeep|history|read", required=True)
    compact = actions.add_parser("compact", help="small files of an hour into one")
    compact.add_argument("--files", type=int, metavar="N", help="hours of at least N small files (lake.compact_files)")
    retain = actions.add_parser("retain", help="drop hours older than lake.retention_ms")
    vacuum = actions.add_parser("vacuum", help="delete files that no version needs that must stay")
    vacuum.add_argument("--dry-run", action="store_true", help="say which; delete nothing")
    upkeep = actions.add_parser("upkeep", help="compact, retain and vacuum")
    upkeep.add_argument("--no-vacuum", action="store_true", help="leave files where they are")
    history = actions.add_parser("history", help="the versions, newest first")
    history.add_argument("--limit", type=int, default=20, metavar="N", help="the newest N; 0 shows all")
    read = actions.add_parser("read", help="rows of a version, a time, a day")
    when = read.add_mutually_exclusive_group()
    when.add_argument("--version", type=int, metavar="N", help="as `history` shows it; the newest by default")
    when.add_argument("--at", metavar="TIME", help="the version of that time, such as 2026-11-25T01:00:00Z")
    read.add_argument("--day", type=date.fromisoformat, metavar="DATE", help="event time within this UTC day")
    read.add_argument("--columns", metavar="A,B", help="these only")
    read.add_argument("--limit", type=int, metavar="N", help=f"rows; {ROWS_SHOWN} when shown, all with --out")
    read.add_argument("--out", type=Path, metavar="FILE", help="write .parquet, .arrow, .csv or .jsonl")
    for each in (compact, retain, vacuum, upkeep, history, read):
        each.add_argument("--json", action="store_true", help="print JSON, one object a line")
        add_common(each)


def main(args: argparse.Namespace) -> int:
    """Do one of the six."""
    args.log_level = "WARNING" if args.log_level == "INFO" else args.log_level
    runtime = open_runtime(args)
    if args.action == "history":
        return _history(runtime, args)
    if args.action == "read":
        return _read(runtime, args)
    return _keep(runtime, args)


def pinned_versions(runtime: Runtime) -> set[int]:
    """Return the versions that the project's checkpoints are in the middle of. Raises `Unavailable`."""
    from headrace.trainer.commit.checkpoint import stored_versions

    return stored_versions(runtime.blobs(), runtime.project.name)


def _keep(runtime: Runtime, args: argparse.Namespace) -> int:
    from headrace.backends.lake.upkeep import Done, Upkeep

    os.nice(NICENESS)
    lake = runtime.lake()
    keeper, done = Upkeep(lake), Done()
    if lake.open() is None:
        if args.action != "upkeep":
            raise Unavailable(f"there is no lake at {lake.uri} yet; the sink makes it with its first commit.")
        _show(done, args.json)
        return 0
    if args.action in ("retain", "upkeep"):
        keeper.retain(done, runtime.clock.now_ms())
    if args.action in ("compact", "upkeep"):
        keeper.compact(done, files_min=getattr(args, "files", None))
    if args.action == "vacuum" or (args.action == "upkeep" and not args.no_vacuum):
        dry_run = getattr(args, "dry_run", False)
        found = keeper.vacuum(done, pinned_versions(runtime), dry_run=dry_run)
        if dry_run:
            print("\n".join(found), file=sys.stderr if args.json else sys.stdout)
    keeper.look(done)
    _show(done, args.json)
    return 0


def _show(done: Done, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(done).decode())
        return
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
        figures = entry.get("operationMetrics") or {}
        row = {
            "version": entry["version"],
            "time": datetime.fromtimestamp(entry["timestamp"] / 1000, UTC).isoformat(timespec="milliseconds"),
            "operation": entry.get("upkeep") or entry.get("operation", ""),
            "rows_added": int(figures.get("num_added_rows") or 0),
            "files_added": int(entry.get("files_added") or figures.get("num_added_files") or 0),
            "files_removed": int(entry.get("files_removed") or figures.get("num_removed_files") or 0),
        }
        if args.json:
            print(msgspec.json.encode(row).decode())
        else:
            changes = f"{row['rows_added']:>9,} rows  +{row['files_added']} -{row['files_removed']} files"
            print(f"{row['version']:>8}  {row['time']}  {row['operation']:<14}{changes}")
    return 0


def _read(runtime: Runtime, args: argparse.Namespace) -> int:
    from headrace.backends.lake.delta import parse_at

    lake = runtime.lake()
    version = args.version
    if args.at is not None:
        table = lake.open(parse_at(args.at))
        version = None if table is None else int(table.version())
    if version is None:
        table = lake.open()
        version = None if table is None else int(table.version())
    if version is None:
        raise Unavailable(f"there is no lake at {lake.uri} yet; the sink makes it with its first commit.")
    columns = args.columns.split(",") if args.columns else None
    with _leased(lake, version):
        rows = lake.read(version, columns, day=args.day)
    total = rows.num_rows
    limit = args.limit if args.limit is not None else None if args.out else ROWS_SHOWN
    rows = rows if limit is None else rows.slice(0, limit)
    if args.out:
        write(rows, args.out)
        print(f"version {version}: {rows.num_rows:,} of {total:,} rows in {args.out}", file=sys.stderr)
        return 0
    if not args.json:
        print(f"version {version}: {total:,} rows, {rows.num_rows} shown", file=sys.stderr)
    for row in rows.to_pylist():
        print(msgspec.json.encode(row).decode())
    return 0


@contextmanager
def _leased(lake: DeltaLake, version: int) -> Iterator[None]:
    holder = f"read-{socket.gethostname()}-{os.getpid()}"
    lake.hold(version, holder)
    try:
        yield
    finally:
        lake.let_go(holder)


def write(rows: pa.Table, out: Path) -> None:
    """Write rows in the form that the file's name says. Raises `ConfigRejected` for another one."""
    import pyarrow.csv
    import pyarrow.feather
    import pyarrow.parquet

    writers: dict[str, Any] = {
        ".parquet": pyarrow.parquet.write_table,
        ".arrow": pyarrow.feather.write_feather,
        ".csv": lambda table, path: pyarrow.csv.write_csv(_flat(table), path),
        ".jsonl": _write_lines,
    }
    if out.suffix not in writers:
        raise ConfigRejected(f"--out {out}: its name ends in one of {sorted(writers)}.")
    writers[out.suffix](rows, out)


def _flat(rows: pa.Table) -> pa.Table:
    """Return the rows with lists as JSON text, since CSV has none."""
    import pyarrow as pa

    columns = [
        pa.array([None if v is None else msgspec.json.encode(v).decode() for v in rows[f.name].to_pylist()])
        if pa.types.is_nested(f.type)
        else rows[f.name]
        for f in rows.schema
    ]
    return pa.table(dict(zip(rows.schema.names, columns, strict=True)))


def _write_lines(rows: pa.Table, out: Path) -> None:
    with out.open("wb") as file:
        for batch in rows.to_batches(max_chunksize=10_000):
            file.writelines(itertools.chain.from_iterable((msgspec.json.encode(r), b"\n") for r in batch.to_pylist()))
