"""Where the checkout is; free ports and a layout for a stack of a test's own."""

from __future__ import annotations

import os
from pathlib import Path

from headrace.contract.config import PORTS, port
from headrace.deploy.local.doctor import free_port
from headrace.deploy.local.layout import HOST, Layout

CHECKOUT = Path(__file__).resolve().parents[2]


def free_base() -> int:
    """Return a PORT_BASE of which every port is free; below 32768, where the kernel takes its own from."""
    start = 25_000 + os.getpid() % 100 * 60
    for base in range(start, 32_000, len(PORTS) + 1):
        if all(free_port(number) for number in range(base, base + len(PORTS))):
            return base
    raise RuntimeError(f"no {len(PORTS)} free ports in a row from {start} to 32000")


def own_layout(home: Path) -> Layout:
    """Return the layout of a stack on free ports, with a Kafka and an HDFS of its own, that runs the demo's project."""
    base = free_base()
    return Layout(
        home=home,
        port_base=base,
        brokers=f"{HOST}:{port('kafka', base)}",
        store=f"hdfs://{HOST}:{port('namenode', base)}/headrace",
        webhdfs=f"http://{HOST}:{port('namenode_http', base)}",
        project=CHECKOUT / "examples" / "shop",
        own_kafka=True,
        own_hdfs=True,
    )
