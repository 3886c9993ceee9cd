"""Where the stack is: Kafka, the store, the ports, the folder of local state.

Addresses come from flags, else from the environment, else from what `headrace up` wrote to `.headrace/stack.json`,
else from the defaults of `headrace.contract.config.PORTS`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from headrace.contract.config import PORTS, port
from headrace.contract.errors import ConfigRejected
from headrace.deploy.local.layout import Addresses, read_addresses

HOST = "127.0.0.1"
CEPHFS = "cephfs"
"""A store by name: a CephFS of the stack's own."""


def find_addresses(args: argparse.Namespace, home: Path) -> Addresses:
    """Return addresses from flags, environment, the last `up`, or defaults, in this order."""
    saved = read_addresses(home)
    told_base = getattr(args, "port_base", None) or _number("PORT_BASE")
    base = told_base if told_base is not None or saved is None else saved.port_base
    if saved is not None and told_base is not None and told_base != saved.port_base:
        saved = None  # its addresses belong to other ports

    def pick(flag: str, variable: str, before: str | None, default: str | None) -> str | None:
        return getattr(args, flag, None) or os.environ.get(variable) or before or default

    store = pick("store", "HEADRACE_STORE", saved.store if saved else None, None)
    store = store or f"hdfs://{HOST}:{port('namenode', base)}/headrace"
    return Addresses(
        brokers=pick("brokers", "HEADRACE_BROKERS", saved.brokers if saved else None, None)
        or f"{HOST}:{port('kafka', base)}",
        store=store,
        webhdfs=pick(
            "webhdfs",
            "HEADRACE_WEBHDFS",
            saved.webhdfs if saved and saved.store == store else None,
            f"http://{HOST}:{port('namenode_http', base)}" if store.startswith(f"hdfs://{HOST}:") else None,
        ),
        port_base=base,
        project=pick("project", "HEADRACE_PROJECT", saved.project if saved else None, "") or "",
    )


def find_home(flag: str | None = None) -> Path:
    """Return the folder of local state: flag, HEADRACE_HOME, or `.headrace` here or in a folder above."""
    told = flag or os.environ.get("HEADRACE_HOME")
    if told:
        return Path(told).absolute()
    here = Path.cwd()
    return next((p / ".headrace" for p in (here, *here.parents) if (p / ".headrace").is_dir()), here / ".headrace")


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or not 1_024 <= int(text) <= 65_535 - len(PORTS):
        raise ConfigRejected(f"{variable}={text!r}: a number from 1024 to {65_535 - len(PORTS)} is wanted.")
    return int(text)
