"""Where the checkout is, and free ports for a stack of a test's own."""

from __future__ import annotations

import os
from pathlib import Path

from headrace.contract.config import PORTS
from headrace.deploy.local.doctor import free_port

CHECKOUT = Path(__file__).resolve().parents[2]


def free_base() -> int:
    """Return a PORT_BASE of which every port is free; below 32768, where the kernel takes its own from."""
    start = 25_000 + os.getpid() % 100 * 60
    for base in range(start, 32_000, len(PORTS) + 1):
        if all(free_port(number) for number in range(base, base + len(PORTS))):
            return base
    raise RuntimeError(f"no {len(PORTS)} free ports in a row from {start} to 32000")
