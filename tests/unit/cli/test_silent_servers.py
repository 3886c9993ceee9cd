"""Goal: no verb waits for ever for a broker or a store that never answers: it ends with what it waited for.

Method: a server that takes every connection and says nothing, as a stopped process does. Whatever `Runtime` opens is
watched; the verbs run as real processes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.cli.runtime import Runtime
from headrace.contract.config import Config
from headrace.contract.formats.topics import Topics
from headrace.process.call_watch import _Watched

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "shop"
VERBS = [
    ["ledger"],
    ["replay"],
    ["dead-letters", "list"],
    ["spec", "show"],
    ["lake", "history"],
    ["train"],
    ["train", "--take-over"],
]


@pytest.fixture
def silent() -> Iterator[int]:
    """Return the port of a server that never answers: the kernel takes the connections, nobody reads them."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        yield server.getsockname()[1]


def test_all_that_a_runtime_opens_is_watched(tmp_path: Path) -> None:
    project: Any = None
    runtime = Runtime(
        project=project,
        config=Config(),
        topics=Topics(),
        brokers="127.0.0.1:1",
        store=f"file:{tmp_path}",
        webhdfs=None,
        home=tmp_path,
        port_base=None,
        project_dir=tmp_path,
    )
    opened: list[Any] = [runtime.reader(), runtime.admin(), runtime.blobs(), runtime.lake(), runtime.fenced("t", "w")]
    assert all(isinstance(each, _Watched) for each in opened)
    for each in (opened[0], opened[4]):
        each.close()


@pytest.mark.long
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb))
def test_a_verb_ends_where_broker_and_store_never_answer(verb: list[str], silent: int, tmp_path: Path) -> None:
    at = f"127.0.0.1:{silent}"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "headrace.cli.main", *verb, "--project", str(EXAMPLE), "--brokers", at),
            *("--store", f"hdfs://{at}/headrace", "--webhdfs", f"http://{at}", "--home", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=290.0,
        env={**os.environ, "PORT_BASE": "39000"},
    )
    assert done.returncode == 1, done.stderr[-2_000:]
    assert "Unavailable" in done.stderr or "has not come back" in done.stderr
