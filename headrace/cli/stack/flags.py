"""What the verbs of the local stack share: which stack is meant, and how it is shown."""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from headrace.cli.addresses import CEPHFS, find_addresses, find_home
from headrace.cli.project_folder import find_project
from headrace.contract.config import PORTS
from headrace.contract.errors import ConfigRejected
from headrace.deploy.local.layout import Layout, cephfs_store, read_addresses
from headrace.deploy.local.supervise import Process

SHIPPERS = ("", "fluentd", "fluent-bit")


def add_stack_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which stack is meant."""
    parser.add_argument("--home", metavar="DIR", help="local state (HEADRACE_HOME; .headrace)")
    parser.add_argument("--port-base", type=int, metavar="N", help="moves all ports together (PORT_BASE)")


def add_names(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a verb that is about named processes."""
    add_stack_flags(parser)
    parser.add_argument(
        "names", metavar="NAME", nargs="+", help="as `headrace status` shows them, such as ingest, train"
    )


def timed_printer(begin_s: float) -> Callable[[str], None]:
    """Return what prints a line of progress behind the seconds since `begin_s`, a monotonic time."""
    return lambda text: print(f"{time.monotonic() - begin_s:6.1f} s  {text}", flush=True)


def new_layout(args: argparse.Namespace) -> Layout:
    """Return the stack that flags and environment ask for.

    Of what an earlier `up` wrote the project alone counts, where none is asked for: the state in this home is its own.

    Raises `ConfigRejected` for a port, store or shipper that cannot be.
    """
    home = find_home(args.home)
    at = find_addresses(args, home / "no-earlier-stack")
    if at.port_base is not None and not 1_024 < at.port_base <= 65_535 - len(PORTS):
        raise ConfigRejected(f"PORT_BASE={at.port_base}: a number from 1025 to {65_535 - len(PORTS)} is wanted.")
    own_cephfs = at.store == CEPHFS
    if not own_cephfs and not at.store.startswith(("file:/", "hdfs://")):
        raise ConfigRejected(
            f"STORE={at.store!r}: file:/absolute/path, hdfs://host:port/path or {CEPHFS} (one that is started here) "
            "is wanted."
        )
    shipper = getattr(args, "shipper", None) or os.environ.get("SHIPPER") or ""
    if shipper not in SHIPPERS:
        raise ConfigRejected(f"SHIPPER={shipper!r}: fluentd or fluent-bit is wanted, or nothing.")
    if odd := [each for each in at.brokers.split(",") if not re.fullmatch(r"\s*\S+:\d{1,5}\s*", each)]:
        raise ConfigRejected(
            f"BROKERS={at.brokers!r}: {odd[0]!r} has no port; host:port is wanted, such as kafka-1:9092."
        )
    told_brokers = getattr(args, "brokers", None) or os.environ.get("HEADRACE_BROKERS")
    told_store = getattr(args, "store", None) or os.environ.get("HEADRACE_STORE")
    return Layout(
        home=home,
        port_base=at.port_base,
        brokers=at.brokers,
        store=cephfs_store(home) if own_cephfs else at.store,
        webhdfs=at.webhdfs,
        project=find_project(at.project or _earlier_project(home)),
        own_kafka=not told_brokers,
        own_hdfs=not told_store,
        shipper=shipper,
        own_cephfs=own_cephfs,
    )


def _earlier_project(home: Path) -> str:
    saved = read_addresses(home)
    return saved.project if saved is not None and Path(saved.project).is_dir() else ""


def present_layout(args: argparse.Namespace) -> Layout:
    """Return the stack that the last `up` started here, or the one it would start."""
    return Layout.saved(find_home(args.home)) or new_layout(args)


def table(processes: Sequence[Process]) -> str:
    """Return the table of processes for people, and a line for each that has crashed."""
    rows = [("process", "state", "pid", "port", "memory", "up", "crashes", "log file")]
    for p in processes:
        seen = str(p.pid or "-"), str(p.port or "-"), f"{p.memory_mb} MB", f"{p.uptime_s} s", str(p.crashes.total)
        rows.append((p.name, p.state, *seen, p.log))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]) for row in rows
    ]
    return "\n".join([*lines, *(crash_line(p) for p in processes if p.crashes.total)])


def crash_line(process: Process) -> str:
    """Return how a process ended last, how often it has, and when it starts again."""
    c = process.crashes
    if process.state == "backoff":
        now = f"next start in {c.next_start_s:.0f} s"
    else:
        now = f"now {process.state}" + (f" for {process.uptime_s} s (pid {process.pid})" if process.pid else "")
    times = f"{c.total} crash{'es' if c.total > 1 else ''}, {c.in_row} in a row"
    return (
        f"{process.name}: {times}; last: {c.last_exit} after {c.last_ran_s:.0f} s (pid {c.last_pid or '-'}); {now}; "
        f"last words: {c.last_words or '-'}"
    )
