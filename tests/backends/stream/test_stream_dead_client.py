"""Goal: a stage whose Kafka client has lost its own task ends, for the supervisor to start it again.

Method: `headrace sink` on a real broker; aiokafka's look for its coordinator fails as it did when a broker came back.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from local_world import free_base

from headrace.deploy.local.layout import Layout

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

PROGRAM = """
import sys
from aiokafka.consumer.group_coordinator import GroupCoordinator
from headrace.cli.main import main

async def fails(self):
    raise AssertionError("Did we not perform bootstrap?")

GroupCoordinator.ensure_coordinator_known = fails
sys.exit(main(sys.argv[1:]))
"""


def test_a_sink_whose_group_coordination_has_ended_ends_with_status_1(stack: Layout, tmp_path: Path):
    words = ["sink", "--project", str(stack.project), "--brokers", stack.brokers, "--store", f"file:{tmp_path}/store"]
    words += ["--home", str(tmp_path / "home"), "--port-base", str(free_base())]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, timeout=120.0, check=False
    )
    assert done.returncode == 1, done.stderr[-2_000:]
    assert "its group coordination has ended (" in done.stderr
