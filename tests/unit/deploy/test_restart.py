"""Goal: `headrace restart` refuses what it cannot restart, by name, and stops and starts only what was named.

Method: a supervisor in memory; the real one is restarted in tests/backends/test_local_stack.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from headrace.cli.main import main
from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.deploy.local import stack
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.restarts import Crashes
from headrace.deploy.local.supervise import Process


class MemorySupervisor:
    """Knows some processes, and remembers what it was told."""

    def __init__(self, *names: str) -> None:
        self.names, self.told = names, list[tuple[str, list[str]]]()
        self.renewing: tuple[str, ...] = ()
        self.ends: dict[str, list[Crashes]] = {}
        """A process -> what it is said of its ends, look by look."""

    def processes(self) -> list[Process]:
        return [Process(name, "running", 1, 0, 0, "", 0) for name in self.names]

    def crashes(self) -> dict[str, Crashes]:
        return {name: each.pop(0) if len(each) > 1 else each[0] for name, each in self.ends.items()}

    def take_environment(self) -> list[str]:
        return []

    def renew(self, name: str) -> bool:
        if name in self.renewing:
            self.told.append(("renew", [name]))
        return name in self.renewing

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
    with pytest.raises(ConfigRejected, match=r"nothing runs in .*; `headrace up` starts it"):
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


def test_one_that_can_begin_anew_in_its_place_is_not_ended(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = supervised(monkeypatch, "train", "serve")
    monkeypatch.setattr(stack.readiness, "stage_probes", lambda _: {})
    supervisor.renewing = ("serve",)
    said: list[str] = []
    stack.restart(layout, ["serve", "train"], said.append)
    assert supervisor.told == [("renew", ["serve"]), ("end", ["train"]), ("begin", ["serve", "train"])]
    assert said == ["serve begins anew and keeps its port: what asks meanwhile waits until it is ready"]
    supervisor.renewing = ()
    stack.restart(layout, ["serve", "train"], said.append)
    assert said[1:] == ["serve is ended and started: its port refuses connections until it is ready"]


def test_stop_and_start_say_what_they_do(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor = supervised(monkeypatch, "ingest", "train")
    monkeypatch.setattr(stack.readiness, "stage_probes", lambda layout: {"ingest": lambda: ""})
    layout.save()
    assert main(["stop", "ingest", "--home", str(layout.home)]) == 0
    assert "headrace start ingest" in capsys.readouterr().out
    assert main(["start", "ingest", "--home", str(layout.home)]) == 0
    assert "ingest is ready" in capsys.readouterr().out
    assert supervisor.told == [("end", ["ingest"]), ("begin", ["ingest"])]
    assert main(["start", "tain", "--home", str(layout.home)]) == 2
    assert "mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["exit 2", "exit 1", "SIGKILL"])
def test_a_stage_that_died_is_not_waited_for(how: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that refuses its configuration ends the waiting at its first end, any other at its third."""
    supervisor = supervised(monkeypatch, "ingest", "train")
    looks = [Crashes(total=5, last_exit=how, last_words="of before")]
    looks += [Crashes(total=5 + n, last_exit=how, last_words=f"ERROR no {n}") for n in (0, 1, 2, 3)]
    supervisor.ends = {"train": looks}
    monkeypatch.setattr(stack, "LOOK_S", 0.0)
    probes = {"train": lambda: "refused", "ingest": lambda: ""}
    monkeypatch.setattr(stack.readiness, "stage_probes", lambda layout: probes)
    said: list[str] = []
    last = 1 if how == stack.REFUSED else 3
    with pytest.raises(Unavailable, match=rf"train: it ended .*{how}: ERROR no {last}. Mend .*run the same again"):
        stack.restart(layout, ["ingest", "train"], said.append)
