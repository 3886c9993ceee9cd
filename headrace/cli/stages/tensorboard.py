"""Serve TensorBoard on the scalars that the trainer writes."""

from __future__ import annotations

import argparse
import os
import sys

from headrace.cli.addresses import HOST, find_addresses, find_home
from headrace.cli.runtime import add_common
from headrace.contract.config import port


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Become TensorBoard: the supervisor's signals then reach it directly."""
    home = find_home(args.home)
    folder = home / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    listen = port("tensorboard", find_addresses(args, home).port_base)
    sys.stdout.flush()
    os.execv(
        sys.executable,
        [
            *(sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", HOST),
            *("--port", str(listen), "--reload_interval", "5", "--load_fast", "false"),
        ],
    )
