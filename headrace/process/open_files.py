"""The process's limit of open files: each connection is one."""

from __future__ import annotations

import logging
import os
import resource

log = logging.getLogger("headrace.files")

SPARE = 64
"""Files that are kept for all else: clients of Kafka, the store, logs."""


def allow_open_files(least: int = 0, *, more: int = 0) -> int:
    """Raise the soft limit to `least`, or by `more`, as far as the hard limit allows; return how many are allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return max(least, more)
    wanted = max(least, soft + more)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(soft, allowed)


def connections_within(wanted: int) -> int:
    """Raise the limit for `wanted` connections; return how many of them the hard limit leaves room for.

    Without a file for it a connection can't even be refused: it waits, and each look at it is a page of the log.
    """
    allowed = allow_open_files(more=wanted)
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = SPARE
    room = max(1, min(wanted, allowed - used - SPARE))
    if room < wanted:
        log.warning("%d connections at most, not %d: this process may open %d files (ulimit -n)", room, wanted, allowed)
    return room
