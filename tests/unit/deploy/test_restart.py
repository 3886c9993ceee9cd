"""Goal: `headrace restart` refuses what it cannot restart, by name, and stops and starts only what was named.

Method: a supervisor in memory; the real one is restarted in tests/backends/test_local_stack.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from headrace.cli.main import main
from headrace.contract.errors import ConfigRejected
from headrace.deploy.local import stack
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.supervise import Process


class MemorySupervisor:
    """Knows some processes, and remembers what it was told."""

    def __init__(self, *names: str) -> None:
        self.names, self.told = names, list[tuple[str, list[str]]]()

    def processes(self) -> list[Process]:
        return [Process(name, "running", 1, 0, 0, "", 0) for name in self.names]

    def end(self, names: Sequence[str]) -> None:
        self.told.append(("end", list(names)))

    def begin(self, names: Sequence[str]) -> None:
        self.told.append(("begin", list(names)))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(
        home=tmp_path,
        port_base=30_000,
        brokers="127.0.0.1:9",
        store=f"file:{tmp_path}/store",
        webhdfs=None,
        project=Path("/p"),
        own_kafka=False,
        own_hdfs=False,
    )
    made.prepare()
    return made


def supervised(monkeypatch: pytest.MonkeyPatch, *names: str) -> MemorySupervisor:
    supervisor = MemorySupervisor(*names)
    monkeypatch.setattr(stack, "Supervisor", lambda layout: supervisor)
    return supervisor


def test_where_nothing_runs_nothing_is_restarted(layout: Layout) -> None:
    with pytest.raises(ConfigRejected, match=r"nothing runs in .*; `make up` starts it"):
        stack.restart(layout, ["ingest"], print)


def test_the_verb_says_so_and_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["restart", "ingest", "--home", str(tmp_path)]) == 2
    assert "nothing runs in" in capsys.readouterr().err


def test_an_unknown_name_is_refused_and_nothing_is_stopped(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = supervised(monkeypatch, "kafka", "ingest")
    with pytest.raises(ConfigRejected, match="no process millrace here; there are kafka, ingest"):
        stack.restart(layout, ["ingest", "millrace"], print)
    assert supervisor.told == []


def test_only_what_was_named_is_stopped_and_started(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = supervised(monkeypatch, "kafka", "ingest", "train")
    asked: list[str] = []
    monkeypatch.setattr(stack.readiness, "stage_probes", lambda _: {n: lambda n=n: asked.append(n) for n in "ab"})
    stack.restart(layout, ["train"], print)
    assert supervisor.told == [("end", ["train"]), ("begin", ["train"])]
    assert asked == [], "of what was not named, nothing is awaited"
