"""Goal: a port that no process holds is no foreign process's. Method: real sockets of this process, on the loopback."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.contract.config import PORTS, port
from headrace.deploy.local import doctor
from headrace.deploy.local.doctor import ephemeral_finding, free_port, port_findings
from headrace.deploy.local.layout import MARK

FIRST = next(iter(PORTS))
SKIPPED = [name for name in PORTS if name != FIRST]
"""So that one port is looked at."""


def base_of(free_from: int) -> int:
    """Return a base whose first port is free."""
    return next(number for number in range(free_from, 24_000) if free_port(port(FIRST, number)))


def test_an_ended_connection_is_no_process() -> None:
    base = base_of(21_000)
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.socket()
        client.bind(("127.0.0.1", base))
        client.connect(server.getsockname())
        taken, _ = server.accept()
        client.close()  # Who closes first waits: TIME_WAIT.
        assert taken.recv(1) == b""
        taken.close()
    found = port_findings(base, skipped=SKIPPED)
    assert [each.level for each in found] == ["note"], found
    assert "TIME_WAIT" in found[0].found and "no process" in found[0].found and "a minute" in found[0].remedy


@pytest.mark.parametrize("listens", [True, False])
def test_what_holds_a_port_is_named(listens: bool) -> None:
    base = base_of(22_000)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as holder:
        holder.bind(("127.0.0.1", base))
        if listens:
            holder.listen()
        else:
            holder.connect(server.getsockname())
        found = port_findings(base, skipped=SKIPPED)
    assert [each.level for each in found] == ["trouble"] and f"pid {os.getpid()}" in found[0].found
    assert ("connection" in found[0].found) != listens and "PORT_BASE" in found[0].remedy


HOLDER = """
import socket, sys
held = [socket.create_server(("127.0.0.1", int(number))) for number in sys.argv[1:]]
print("listens", flush=True)
sys.stdin.read()
"""


def test_another_stack_on_the_same_ports_is_named_once_with_home_project_pid_and_remedy(tmp_path: Path) -> None:
    base = base_of(23_000)
    names = [name for name in PORTS if free_port(port(name, base))][:3]
    numbers = [port(name, base) for name in names]
    environment = {**os.environ, MARK: str(tmp_path), "HEADRACE_PROJECT": "/projects/store"}
    command = [sys.executable, "-c", HOLDER, *map(str, numbers)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"listens\n"
        (found,) = port_findings(base, skipped=[name for name in PORTS if name not in names])
        holder.communicate(b"", timeout=30)
    ports = ", ".join(f"{number} ({name})" for name, number in zip(names, numbers, strict=True))
    assert (found.what, found.level) == ("another stack", "trouble")
    assert found.found == (
        f"the Headrace stack of {tmp_path}, project /projects/store, pid {holder.pid}, has ports {ports}"
    )
    assert re.fullmatch(
        rf"take other ports, which are free: PORT_BASE=\d+; or stop that one: headrace down --home {tmp_path}",
        found.remedy,
    )


def test_a_stack_that_ends_while_it_is_looked_at_is_named_without_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "holders", lambda _: [])
    found = doctor._other_stack(tmp_path, [("serve", 8080)], [], None)
    assert found.found == f"the Headrace stack of {tmp_path}, project not known, pid not known, has port 8080 (serve)"


def test_a_base_among_the_kernels_own_ports_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ephemeral", lambda: (32_768, 60_999))
    near = ephemeral_finding(32_760)
    inside = len(PORTS) - 8
    assert near.level == "note" and re.search(rf"\b{inside} ports from 32768\b", near.found)
    assert f"to {32_768 - len(PORTS)}" in near.remedy
    assert ephemeral_finding(None).level == ephemeral_finding(30_000).level == "ok"
