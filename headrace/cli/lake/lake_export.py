"""`headrace lake export`: labelled samples of a time range as Parquet files."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from headrace.cli.progress_bar import duration, show_progress
from headrace.cli.runtime import Runtime
from headrace.contract.errors import ConfigRejected
from headrace.process.call_watch import LAKE_MAX_S

if TYPE_CHECKING:
    from headrace.backends.lake.delta import DeltaLake

SETTLED = "settled"
"""What `--to` says where the range is to end with the last label that is final."""

logger = logging.getLogger("headrace.lake")


def add_export_arguments(export: argparse.ArgumentParser) -> None:
    """Add the flags of `lake export`."""
    export.add_argument(
        "--from", dest="begin", required=True, metavar="TIME", help="first event time, such as 2026-11-25T01:00:00Z"
    )
    export.add_argument(
        "--to",
        dest="end",
        default=SETTLED,
        metavar="TIME",
        help="event time before which the last is; by default `settled`: up to which all labels are final",
    )
    export.add_argument("--to-parquet", required=True, type=Path, metavar="DIR", help="folder to make")
    known = export.add_mutually_exclusive_group()
    known.add_argument("--as-of", metavar="TIME", help="labels as the lake knew them then; now by default")
    known.add_argument("--version", type=int, metavar="N", help="the same by version, as `history` shows it")
    export.add_argument("--tasks", metavar="A,B", help="labels of these tasks only, and rows that have one")
    export.add_argument("--columns", metavar="A,B", help="these only; patterns such as 'feature.*' too")
    export.add_argument("--overwrite", action="store_true", help="replace an older export in DIR")


def export(runtime: Runtime, args: argparse.Namespace) -> int:
    """Do it."""
    from headrace.stream.export.export import ExportRequest, export_samples
    from headrace.stream.export.source import iso

    # What the lake logs is kept quiet, how far it is not.
    logger.setLevel(logging.INFO)
    begin_ms = time_ms("--from", args.begin)
    as_of_ms = None if args.as_of is None else time_ms("--as-of", args.as_of)
    lake, began_s = runtime.lake(), runtime.clock.monotonic()
    version = _version_at(lake, as_of_ms) if args.version is None else args.version
    final_ms = _final_ms(runtime, lake, version, _names(args.tasks))
    end_ms = _end_ms(args.end, begin_ms, final_ms, version)
    request = ExportRequest(
        begin_ms=begin_ms,
        end_ms=end_ms,
        version=version,
        tasks=_names(args.tasks),
        columns=_names(args.columns),
        overwrite=args.overwrite,
    )
    holder = f"export-{socket.gethostname()}-{os.getpid()}"
    with runtime.calls.named("the lake", LAKE_MAX_S), lake.leased(version, holder):
        done = export_samples(
            lake,
            runtime.project,
            args.to_parquet,
            request,
            progress=show_progress(logger),
            beat=_renewing(runtime, lake, version, holder),
        )
    if args.json:
        told = msgspec.to_builtins(done) | {"begin_ms": begin_ms, "end_ms": end_ms, "settled_ms": final_ms}
        print(msgspec.json.encode(told).decode())
        return 0
    size = sum(file.bytes for file in done.files)
    print(
        f"version {done.version}, {iso(begin_ms)} to before {iso(end_ms)}: {done.rows:,} impressions of "
        f"{done.samples:,} samples, {len(done.columns)} columns, {len(done.files)} files, {size:,} bytes in "
        f"{args.to_parquet} ({duration(runtime.clock.monotonic() - began_s)})"
    )
    return 0


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def time_ms(flag: str, text: str) -> int:
    """Read a time; say so where it names no zone."""
    from headrace.backends.lake.export import has_zone, parse_at

    when = parse_at(text)
    if not has_zone(text):
        print(f"{flag} {text} names no time zone: taken as UTC.", file=sys.stderr)
    return round(when.timestamp() * 1_000)


def _final_ms(runtime: Runtime, lake: DeltaLake, version: int, names: tuple[str, ...] | None) -> int | None:
    """Return the event time before which the labels of a version are final; None where that is not known."""
    from headrace.stream.export.settled import settled_ms

    tasks = [task for task in runtime.project.tasks if names is None or task.name in names]
    state = lake.state(version)
    if state is None:
        return None
    partitions = range(runtime.config.log.partitions)
    return settled_ms(runtime.blobs(), runtime.topics.generation, partitions, state.positions, tasks)


def _end_ms(text: str, begin_ms: int, final_ms: int | None, version: int) -> int:
    """Return where the range ends; say so where labels in it are not final. Raises `ConfigRejected`."""
    from headrace.stream.export.source import iso

    if text == SETTLED:
        if final_ms is None:
            raise ConfigRejected(
                f"--to {SETTLED}: up to which time the labels of version {version} of the lake are final is not known: "
                "the join's stored states are ahead of it, or there are none. Say --to TIME, a task's window and its "
                "correct_ms before that version at the latest, or export again in a moment."
            )
        if final_ms <= begin_ms:
            raise ConfigRejected(
                f"--to {SETTLED}: labels are final up to {iso(final_ms)}, which is not after --from {iso(begin_ms)}. "
                "Wait until the longest window has passed, begin earlier, or say --to TIME."
            )
        print(f"--to {SETTLED}: labels are final up to {iso(final_ms)}.", file=sys.stderr)
        return final_ms
    end_ms = time_ms("--to", text)
    if final_ms is None or end_ms > final_ms:
        upto = "not known to be final" if final_ms is None else f"final up to {iso(final_ms)}"
        of_later = "" if final_ms is None else " of later ones"
        print(
            f"warning: labels of version {version} are {upto}:{of_later} positives may have labels and negatives none, "
            f"and the share of positives is too high. --to {SETTLED}, the default, ends where all are final.",
            file=sys.stderr,
        )
    return end_ms


def _version_at(lake: DeltaLake, as_of_ms: int | None) -> int:
    """Return the newest version, of then or of now."""
    at = None if as_of_ms is None else datetime.fromtimestamp(as_of_ms / 1_000, UTC)
    table = lake.opened(at)
    # Of a time before its first one, Delta gives the first version.
    if as_of_ms is not None and (first := table.history(1)) and first[0].get("timestamp", 0) > as_of_ms:
        raise ConfigRejected(
            f"--as-of {at:%Y-%m-%dT%H:%M:%SZ}: the lake has no version of that time; `headrace lake history` shows "
            f"what it has, and version {table.version()} is the oldest that it knows."
        )
    return int(table.version())


def _renewing(runtime: Runtime, lake: DeltaLake, version: int, holder: str) -> Callable[[], None]:
    """Return what takes the lease anew when a quarter of it is over: an export may take longer than one."""
    every_s = runtime.config.lake.lease_ms / 4_000
    taken_s = runtime.clock.monotonic()

    def beat() -> None:
        nonlocal taken_s
        if runtime.clock.monotonic() - taken_s > every_s:
            lake.hold(version, holder)
            taken_s = runtime.clock.monotonic()

    return beat
