"""Goal: a real Kafka that comes back without the end of `samples` costs nothing, and nobody has to do anything.

Method: the shop's traffic on a stack of its own; Kafka is stopped, the file of a partition cut, its index and the mark
of its clean stop taken away, as after a disk that failed; then Kafka comes back. The ledger joins the log once more.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from harness.stack import Stack
from local_world import free_base

pytestmark = [pytest.mark.real, pytest.mark.long, pytest.mark.timeout(900)]

FLOW_S, HEAL_S = 40.0, 420.0


def cut_end(home: Path, partition: str, *, kept: float) -> None:
    """Take the end of a partition's newest file away, as an operator's worst day does."""
    (folder,) = home.glob(f"kafka/**/{partition}")
    newest = max(folder.glob("*.log"))
    size = newest.stat().st_size
    with newest.open("rb+") as file:
        file.truncate(int(size * kept))
    for gone in [*folder.glob("*.index"), *folder.glob("*.timeindex"), *folder.glob("*.snapshot")]:
        gone.unlink()
    (folder.parent / ".kafka_cleanshutdown").unlink()


def test_samples_that_kafka_lost_are_there_again() -> None:
    with Stack.open(own=True, shop_rate=300, port_base=free_base()) as stack:
        home = stack.scratch / "home"
        time.sleep(FLOW_S)
        stack.headrace("stop", "kafka")
        cut_end(home, "samples-0", kept=0.6)
        stack.headrace("start", "kafka")
        time.sleep(FLOW_S)
        stack.headrace("stop", "shop")
        told, deadline = "", time.monotonic() + HEAL_S
        while time.monotonic() < deadline:
            time.sleep(10)
            told = stack.headrace("ledger", "--json", "--full", check=False)
            if told.lstrip().startswith("{") and json.loads(told)["closes"]:
                break
        found = json.loads(told)
        assert found["closes"] and (found["lost"], found["twice"]) == (0, 0), found
        assert "is ahead of the log" in (home / "log" / "stream.log").read_text()
