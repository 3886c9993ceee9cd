"""Controls the supervisord of a local stack: writes its configuration, starts it, asks it, ends what it left behind.

supervisord restarts whatever dies and keeps a rotated log file for each process. It listens on loopback TCP, since
the path of a Unix socket is bound to about 107 bytes; a password in `.headrace` keeps other users out.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shlex
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.deploy.local.layout import HOST, MARK, Layout, is_ours
from headrace.deploy.local.restarts import MAX_S, Crashes
from headrace.process.awake import awake_s
from headrace.serving.renewal import RENEWALS

ANSWER_S = 10.0
"""Longest wait for supervisord's answer, which comes within some ms."""
STOP_S = 6
"""A process that gets SIGTERM has 5 s to stop cleanly; a second more, then SIGKILL."""

RENEWING = ("serve",)
"""Processes that begin anew in their own place when they get SIGHUP."""
RENEWS_S = 10.0
"""Longest wait for it. Serving takes two seconds for its clients, and some more for workers that do not end."""


class Program(msgspec.Struct, frozen=True):
    """One process: its name and its command line."""

    name: str
    command: list[str]


class Process(msgspec.Struct, frozen=True):
    """One row of `status`. `memory_mb` sums the process and its children. `state` is `backoff` between two starts."""

    name: str
    state: str
    pid: int
    memory_mb: int
    port: int
    log: str
    uptime_s: int
    crashes: Crashes = msgspec.field(default_factory=Crashes)
    """Its `next_start_s` is in seconds from now."""


class _Transport(xmlrpc.client.Transport):
    """XML-RPC with a bound on every wait."""

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = super().make_connection(host)
        connection.timeout = ANSWER_S
        return connection


class Supervisor:
    """The supervisord of one layout, by XML-RPC."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._secret = layout.home / "run" / "secret"

    def running(self) -> bool:
        """Say whether this layout's own supervisord answers."""
        try:
            return bool(self._ask("getIdentification") == str(self.layout.home))
        except (OSError, xmlrpc.client.Error, http.client.HTTPException):
            return False

    def start(self, programs: Sequence[Program], *, restart_max_s: float = MAX_S) -> None:
        """Write the configuration and start supervisord, detached; returns when it answers.

        `restart_max_s` is the longest wait before what has ended is started again.
        """
        run = self.layout.home / "run"
        if not self._secret.exists():
            self._secret.touch(mode=0o600)
            self._secret.write_text(secrets.token_hex(16))
        conf = run / "supervisord.conf"
        conf.touch(mode=0o600)
        conf.write_text(configuration(self.layout, programs, self._secret.read_text(), restart_max_s))
        out = self.layout.logs / "supervisord.out"
        # It opens its port, then becomes a daemon: the exit status tells whether the port was free.
        with out.open("wb") as file:
            status = subprocess.run(
                [sys.executable, "-m", "headrace.deploy.local.supervisord", "-c", str(conf)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.layout.environment(),
                timeout=60,
                check=False,
            ).returncode
        deadline = awake_s() + 20
        while status == 0 and not self.running() and awake_s() < deadline:
            time.sleep(0.05)
        if not self.running():
            words = out.read_text(errors="replace").strip()[-500:]
            raise Unavailable(
                f"supervisord did not start (exit {status}): {words or 'no output'}. Is port "
                f"{self.layout.port('supervisor')} taken? `headrace doctor` says by whom."
            )

    def add(self, programs: Sequence[Program]) -> None:
        """Let the running supervisord know further programs; none of them is started yet."""
        conf = self.layout.home / "run" / "supervisord.conf"
        with conf.open("a") as file:
            file.write(f"\n{_text(_of_programs(self.layout, programs))}")
        self._ask("reloadConfig")
        for program in programs:
            self._ask("addProcessGroup", program.name)

    def take_environment(self) -> list[str]:
        """Give the caller's environment to what is started from now on; returns the names of Headrace's variables that
        changed. What is set is taken, what is not set stays; what runs keeps what it was started with."""
        given = xmlrpc.client.Binary(json.dumps(self.layout.environment()).encode())
        try:
            return [str(name) for name in self._ask("setEnvironment", given, space="headrace")]
        except xmlrpc.client.Fault:
            return []  # One of before this method.

    def begin(self, names: Sequence[str]) -> None:
        """Start these processes, those that do not run; one that waits for its next start waits no longer."""
        for row in self._ask("getAllProcessInfo"):
            if row["name"] not in names:
                continue
            if row["statename"] == "BACKOFF":
                with contextlib.suppress(xmlrpc.client.Fault):
                    self._ask("stopProcess", row["name"], False)
                    self._ask("startProcess", row["name"], False)
            elif row["statename"] in ("STOPPED", "EXITED", "FATAL"):
                self._ask("startProcess", row["name"], False)

    def end(self, names: Sequence[str]) -> None:
        """Stop these processes side by side and wait until they are gone."""
        waiting = set()
        for row in self._ask("getAllProcessInfo"):
            if row["name"] in names and row["statename"] in ("RUNNING", "STARTING", "BACKOFF"):
                with contextlib.suppress(xmlrpc.client.Fault):
                    self._ask("stopProcess", row["name"], False)
                    waiting.add(row["name"])
        deadline = awake_s() + STOP_S + 4
        while waiting and awake_s() < deadline:
            states = {row["name"]: row["statename"] for row in self._ask("getAllProcessInfo")}
            waiting = {name for name in waiting if states.get(name) in ("RUNNING", "STARTING", "STOPPING", "BACKOFF")}
            time.sleep(0.05)

    def renew(self, name: str) -> bool:
        """Ask a process of `RENEWING` to begin anew in its own place, which keeps its port; return when it has.

        False where it does not run, would need another environment, or does not do so within `RENEWS_S`: it is to be
        ended and started then.
        """
        pid = self.pids().get(name, 0)
        if name not in RENEWING or not pid:
            return False
        try:
            before = psutil.Process(pid).environ()
            wanted = {n: v for n, v in self.layout.environment().items() if is_ours(n)}
            if any(before.get(n) != value for n, value in wanted.items()):
                return False
            self._ask("signalProcess", name, "HUP")
            deadline = awake_s() + RENEWS_S
            while awake_s() < deadline and self.pids().get(name) == pid:
                if psutil.Process(pid).environ().get(RENEWALS) != before.get(RENEWALS):
                    return True
                time.sleep(0.1)
        except (psutil.Error, OSError, xmlrpc.client.Error, http.client.HTTPException):
            pass
        return False

    def shutdown(self) -> None:
        """Ask supervisord to end with all that it runs; returns when it is gone or after 15 s."""
        with contextlib.suppress(OSError, xmlrpc.client.Error, http.client.HTTPException):
            self._ask("shutdown")
        deadline = awake_s() + 15
        while self.running() and awake_s() < deadline:
            time.sleep(0.05)

    def pids(self) -> dict[str, int]:
        """Return the process id of everything that runs or is starting. Empty when no supervisord answers."""
        try:
            return {row["name"]: int(row["pid"]) for row in self._ask("getAllProcessInfo") if row["pid"]}
        except (OSError, xmlrpc.client.Error, http.client.HTTPException):
            return {}

    def unanswered(self) -> str:
        """Return what is true where no supervisord answers and something of the stack lives; "" where nothing does."""
        left = orphans(self.layout.home)
        if not left:
            return ""
        parents = [(p.pid, _state(p)) for p in left if _is_supervisor(p)]
        said = f"supervisord (pid {parents[0][0]}, {parents[0][1]})" if parents else "no supervisord"
        goes_on = f"`kill -CONT {parents[0][0]}` lets it go on; " if parents and parents[0][1] == "stopped" else ""
        return (
            f"{said} {'does not answer' if parents else 'answers'} for {self.layout.home}, and {len(left)} processes "
            f"of the stack live, with the ids {sorted(p.pid for p in left)}. Whether they work, their logs in "
            f"{self.layout.logs} tell. {goes_on}`headrace down` ends them, `headrace up` ends them and starts anew."
        )

    def processes(self) -> list[Process]:
        """Return what runs and what does not. Empty when no supervisord answers: `unanswered` tells what lives then."""
        try:
            rows = self._ask("getAllProcessInfo")
        except (OSError, xmlrpc.client.Error, http.client.HTTPException):
            return []
        crashes = self.crashes()
        return [
            Process(
                name=row["name"],
                state=row["statename"].lower(),
                pid=int(row["pid"]),
                memory_mb=memory_mb(int(row["pid"])),
                port=port_of(self.layout, row["name"]),
                log=row["stdout_logfile"],
                uptime_s=int(row["now"] - row["start"]) if row["pid"] else 0,
                crashes=crashes.get(row["name"], Crashes()),
            )
            for row in rows
        ]

    def crashes(self) -> dict[str, Crashes]:
        """Return the crashes of each process. Empty when no supervisord answers, or one of before they were counted."""
        try:
            told = self._ask("getCrashes", space="headrace")
        except (OSError, xmlrpc.client.Error, http.client.HTTPException):
            return {}
        return msgspec.convert(told, dict[str, Crashes])

    def kill(self, name: str) -> None:
        """Send SIGKILL to a process and its children: it counts as a crash, and is started again.

        A child that stands still would not end with it, and keep its port.
        """
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pids()[name]) if name in self.pids() else None
            for each in [*process.children(recursive=True), process] if process else ():
                with contextlib.suppress(psutil.Error):
                    each.kill()

    def _ask(self, method: str, *words: object, space: str = "supervisor") -> Any:
        try:
            secret = self._secret.read_text()
        except OSError as error:
            raise OSError("no supervisor was started here") from error
        address = f"http://headrace:{secret}@{HOST}:{self.layout.port('supervisor')}/RPC2"
        with xmlrpc.client.ServerProxy(address, transport=_Transport()) as proxy:
            return getattr(getattr(proxy, space), method)(*words)


def configuration(layout: Layout, programs: Sequence[Program], secret: str, restart_max_s: float = MAX_S) -> str:
    """Return supervisord.conf. Percent signs are doubled: supervisord expands them."""
    supervisord = {
        "logfile": layout.logs / "supervisor.log",
        "logfile_maxbytes": "5MB",
        "logfile_backups": 2,
        "pidfile": layout.home / "run" / "supervisord.pid",
        "identifier": layout.home,
        "directory": layout.home,
        "childlogdir": layout.logs,
        "silent": "true",
    }
    sections: dict[str, Mapping[str, object]] = {
        "supervisord": supervisord,
        "inet_http_server": {
            "port": f"{HOST}:{layout.port('supervisor')}",
            "username": "headrace",
            "password": secret,
        },
        "rpcinterface:supervisor": {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        },
        "rpcinterface:headrace": {
            "supervisor.rpcinterface_factory": "headrace.deploy.local.supervisord:tell_crashes",
            "restart_max_s": restart_max_s,
        },
    }
    return _text(sections | _of_programs(layout, programs))


def _of_programs(layout: Layout, programs: Sequence[Program]) -> dict[str, Mapping[str, object]]:
    return {
        f"program:{program.name}": {
            "command": shlex.join(program.command),
            "autostart": "false",
            "autorestart": "true",
            "startsecs": 1,
            "startretries": 1_000_000,
            "stopsignal": "TERM",
            "stopwaitsecs": STOP_S,
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": layout.logs / f"{program.name}.log",
            "stdout_logfile_maxbytes": "20MB",
            "stdout_logfile_backups": 2,
        }
        for program in programs
    }


def _text(sections: Mapping[str, Mapping[str, object]]) -> str:
    lines = []
    for title, values in sections.items():
        lines += [f"[{title}]", *(f"{name} = {str(value).replace('%', '%%')}" for name, value in values.items()), ""]
    return "\n".join(lines)


def port_of(layout: Layout, name: str) -> int:
    """Return the port that people look for at process `name`, 0 where it has none."""
    table = {"kafka": "kafka", "namenode": "namenode_http", "datanode": "datanode_http", "ingest": "forward"}
    table |= {"serve": "serving", "tensorboard": "tensorboard"}
    if name.startswith("train@"):
        return layout.metrics_port(name)
    table |= {stage: f"metrics_{stage}" for stage in ("stream", "sink", "aggregate", "crawl", "train", "shop", "watch")}
    if name == "shipper":
        return layout.shipper_port
    if name == "ceph-mon":
        return layout.ceph_port
    return layout.port(table[name]) if name in table else 0


def memory_mb(pid: int) -> int:
    """Return the resident memory of a process and its children, 0 where it is gone."""
    if not pid:
        return 0
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += each.memory_info().rss
    return total // 1_000_000


def orphans(home: Path) -> list[psutil.Process]:
    """Return the living processes that a stack of `home` started, but for this process and its ancestors."""
    mine = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if (
                process.pid not in mine
                and process.status() != psutil.STATUS_ZOMBIE
                and process.environ().get(MARK) == str(home)
            ):
                found.append(process)
    return found


def end_orphans(home: Path) -> int:
    """End what a killed supervisord left behind: SIGTERM, after STOP_S SIGKILL. Returns how many there were.

    supervisord is asked first and alone, so that it starts nothing anew. Raises `InvariantBroken` when one stays.
    """
    left = orphans(home)
    count = len(left)
    parents = [p for p in left if _is_supervisor(p)]
    for group in (parents, left):
        for process in group:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(group, timeout=STOP_S)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
    if remaining := orphans(home):
        raise InvariantBroken(f"processes {[p.pid for p in remaining]} of {home} do not end, not even by SIGKILL.")
    return count


def _state(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return str(process.status())
    return "ended"


def _is_supervisor(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "headrace.deploy.local.supervisord" in process.cmdline()
    return False
