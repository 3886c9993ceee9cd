"""Goal: a server is started only where its disk has room, and becomes the process that was started.

Method: the program itself, with thresholds that the test's own disk has or cannot have.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from headrace.deploy.local.layout import Layout
from headrace.deploy.local.servers import hdfs, kafka, room
from headrace.deploy.local.servers.java import Java


def test_with_room_the_program_becomes_the_server(tmp_path: Path) -> None:
    script = f"from headrace.deploy.local.servers import room; room.main([{str(tmp_path)!r}, 'sh', '-c', 'echo $$'])"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    said, _ = process.communicate(timeout=60)
    assert int(said) == process.pid


def test_without_room_nothing_is_started_and_it_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[object] = []
    monkeypatch.setattr(room.os, "execvp", lambda *words: started.append(words))
    monkeypatch.setattr(room, "PATIENCE_S", 0.0)
    monkeypatch.setattr(room, "LOOK_S", 0.0)
    monkeypatch.setattr(room, "lacking", lambda folder: f"{folder} has 0 MiB free")
    assert room.main([str(tmp_path), "true"]) == 1 and started == []
    assert f"waiting: {tmp_path} has 0 MiB free" in capsys.readouterr().err


def test_what_is_wanted_and_what_there_is_are_told(tmp_path: Path) -> None:
    assert room.lacking(str(tmp_path), 0) == ""
    assert "MiB free and" in room.lacking(str(tmp_path), 1 << 60)


def test_every_server_of_the_stack_waits_for_room(tmp_path: Path) -> None:
    layout = Layout(
        home=tmp_path,
        port_base=None,
        brokers="",
        store="",
        webhdfs=None,
        project=tmp_path,
        own_kafka=True,
        own_hdfs=True,
    )
    java = Java("java", 17, "here")
    commands = [kafka.start_command(layout, java, tmp_path), *hdfs.start_commands(layout, java, tmp_path).values()]
    assert len(commands) == 3
    for command in commands:
        assert command[2:3] == ["headrace.deploy.local.servers.room"] and command[4] == "java"
        assert str(tmp_path) in command[3]
