"""The process's limit of open files: each connection is one."""

from __future__ import annotations

import resource


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
