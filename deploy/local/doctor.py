"""Finds what keeps a stack from running, and says the remedy."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import socket
import urllib.parse
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil

from headrace.contract.config import PORTS, port
from headrace.contract.errors import ConfigRejected
from headrace.deploy.local import readiness
from headrace.deploy.local.layout import HOST, MARK, STATE_VERSION, Layout, variant_port
from headrace.deploy.local.servers import cephfs
from headrace.deploy.local.servers.java import OLDEST, find_java
from headrace.deploy.local.supervise import Supervisor, orphans

DISK_BYTES = 3_000_000_000
"""Logs, lake and snapshots of a few hours of the demo."""
MEMORY_BYTES = 3_000_000_000
"""Three JVMs of 512 MB heap and eight Python processes, the trainer with torch."""
FILES = 4_096

OUTSIDE_ONLY = ("collector", "console", "lighthouse", "metrics_crawl", "serving_grpc")
"""Ports that no process of the local stack opens where nobody asks for it."""


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at. `remedy` is empty where all is well."""

    what: str
    found: str
    level: str
    """`ok`; `note`: it runs, and you should know; `trouble`: it will not run."""
    remedy: str = ""


def examine(layout: Layout) -> list[Finding]:
    """Return what was found, in the order in which things are needed."""
    running = Supervisor(layout).running()
    findings = [*_java(layout), _venv(), _disk(layout.home), _memory(running), _files(), *_paths(layout.home)]
    findings += _state(layout, running)
    findings += list(_ports(layout)) if not running else [Finding("ports", "held by this stack, which runs", "ok")]
    findings += list(_outside(layout, running))
    return findings


def _java(layout: Layout) -> list[Finding]:
    if not layout.own_kafka and not layout.own_hdfs:
        return [Finding("Java", "not needed: Kafka and HDFS are elsewhere", "ok")]
    try:
        java = find_java()
    except ConfigRejected as error:
        return [Finding("Java", "none that is new enough", "trouble", str(error))]
    if "wheel" in java.origin:
        return [
            Finding("Java", f"no Java {OLDEST}+ on this machine; {java.origin} has {java.major}: {java.path}", "ok")
        ]
    return [Finding("Java", f"{java.major} of {java.origin}: {java.path}", "ok")]


def _venv() -> Finding:
    if importlib.util.find_spec("ensurepip") is not None:
        return Finding("python3-venv", "there", "ok")
    return Finding(
        "python3-venv",
        "this Python has no ensurepip, so it cannot make an environment",
        "note",
        "Debian and Ubuntu: apt install python3-venv; elsewhere: `uv venv .venv`, then make up VENV=.venv",
    )


def _disk(home: Path) -> Finding:
    folder = next(p for p in (home, *home.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free for {home}"
    if free < DISK_BYTES:
        remedy = (
            f"{DISK_BYTES / 1e9:.0f} GB are wanted: make room, `headrace clean`, or put HEADRACE_HOME= on another disk"
        )
        return Finding("disk", found, "trouble", remedy)
    return Finding("disk", found, "ok")


def _memory(running: bool) -> Finding:
    free = psutil.virtual_memory().available
    found = f"{free / 1e9:.1f} GB available"
    if free < MEMORY_BYTES and not running:
        remedy = f"{MEMORY_BYTES / 1e9:.0f} GB are wanted: close something, or use an outside Kafka and HDFS"
        return Finding("memory", found, "trouble", f"{remedy} (BROKERS=, STORE=)")
    return Finding("memory", found, "ok")


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    found = f"{soft:,} a process, raised to at most {top} at start"
    if hard != resource.RLIM_INFINITY and hard < FILES:
        remedy = f"{FILES:,} are wanted: `ulimit -Hn`, /etc/security/limits.conf or the unit's LimitNOFILE="
        return Finding("file handles", found, "trouble", remedy)
    return Finding("file handles", found, "ok")


def _paths(home: Path) -> Iterator[Finding]:
    text = str(home)
    for sign in (":", ",", "\n"):
        if sign in text:
            remedy = "move the checkout, or put the state elsewhere with HEADRACE_HOME="
            yield Finding("path", f"{text!r} has {sign!r}, which Java's class path splits at", "trouble", remedy)
            return
    if " " in text or "%" in home.as_uri():
        remedy = "nothing to do: HDFS is reached through a link in the temporary folder; a plain path needs none"
        yield Finding("path", f"{text!r} has a space or a sign that addresses escape", "note", remedy)
    else:
        yield Finding("path", text, "ok")


def _state(layout: Layout, running: bool) -> list[Finding]:
    stamp = layout.home / "VERSION"
    if stamp.exists() and stamp.read_text().strip() != str(STATE_VERSION):
        found = f"{layout.home} is of version {stamp.read_text().strip()}, this build writes {STATE_VERSION}"
        return [
            Finding("state", found, "trouble", "`headrace clean` deletes it; HEADRACE_HOME= puts new state elsewhere")
        ]
    left = [] if running else orphans(layout.home)
    if left:
        found = f"{len(left)} processes of a killed supervisor: {[p.pid for p in left]}"
        return [Finding("state", found, "note", "`headrace up` and `headrace down` end them")]
    return [Finding("state", f"{layout.home}{'' if stamp.exists() else ' (new)'}", "ok")]


def _ports(layout: Layout) -> Iterator[Finding]:
    skipped = set(OUTSIDE_ONLY)
    skipped |= set() if layout.own_kafka else {"kafka", "kafka_controller"}
    skipped |= set() if layout.own_hdfs else {n for n in PORTS if n.startswith(("namenode", "datanode"))}
    used = {variant_port(name, layout.variants) for name in layout.variants}
    skipped |= {name for name in PORTS if name.startswith("metrics_train_")} - used
    more = [("ceph-mon", layout.ceph_port)] if layout.own_cephfs else []
    mine = {p.pid for p in orphans(layout.home)}
    yield from port_findings(layout.port_base, skipped=skipped, more=more, mine=mine)
    if (near := ephemeral_finding(layout.port_base)).level != "ok":
        yield near


def port_findings(
    base: int | None,
    *,
    skipped: Collection[str] = OUTSIDE_ONLY,
    more: Sequence[tuple[str, int]] = (),
    mine: Collection[int] = (),
) -> list[Finding]:
    """Return which ports of a stack at this base are taken, and by whom; those of processes `mine` are not."""
    wanted = [*((n, port(n, base)) for n in PORTS if n not in skipped), *more]
    held = {(name, number): holders(number) for name, number in wanted if not free_port(number)}
    stacks: dict[str, list[tuple[str, int]]] = {}
    for place, pids in held.items():
        if not set(mine) & set(pids):
            stacks.setdefault(next(filter(None, map(_home_of, pids)), ""), []).append(place)
    found = [_taken(name, number) for name, number in stacks.pop("", [])]
    for home, ports in stacks.items():
        found.append(_other_stack(Path(home), ports, {pid for place in ports for pid in held[place]}, base))
    return found or [Finding("ports", "all free", "ok")]


def _home_of(pid: int) -> str:
    """Return the home of the stack that a process is of, "" where it is of none, or another user's."""
    try:
        return str(psutil.Process(pid).environ().get(MARK, ""))
    except (psutil.Error, OSError):
        return ""


def _other_stack(home: Path, ports: Sequence[tuple[str, int]], holding: Collection[int], base: int | None) -> Finding:
    """Return that a Headrace stack of another home, of which processes are `holding`, has these ports."""
    listed = ", ".join(f"{number} ({name})" for name, number in ports)
    project, pid = "", min(holding, default=0)
    for each in sorted(holding):
        with suppress(psutil.Error, OSError):
            project = project or psutil.Process(each).environ().get("HEADRACE_PROJECT", "")
            # supervisord, where it may be seen: by its end all of the stack ends.
            pid = each if "headrace.deploy.local.supervisord" in psutil.Process(each).cmdline() else pid
    plural = "s" * (len(ports) > 1)
    who = f"project {project or 'not known'}, pid {pid or 'not known'}"
    found = f"the Headrace stack of {home}, {who}, has port{plural} {listed}"
    return Finding(
        "another stack", found, "trouble", f"{_other_base(base)}; or stop that one: headrace down --home {home}"
    )


def _other_base(base: int | None) -> str:
    """Return how to take ports that are free."""
    for other in range(25_000, 32_000, 1_000):
        if other != base and all(map(free_port, (port(name, other) for name in PORTS))):
            return f"take other ports, which are free: PORT_BASE={other}"
    return "take other ports with PORT_BASE="


def _taken(name: str, number: int) -> Finding:
    what = f"port {number} ({name})"
    move = f"stop it, or {_other_base(None)}"
    if who := [_describe(pid) for pid in holders(number)]:
        return Finding(what, f"taken by {', '.join(who)}", "trouble", move)
    ends = [c for c in _connections() if c.laddr and c.laddr.port == number and c.status != psutil.CONN_LISTEN]
    if ends and all(c.status in _ENDED for c in ends):
        wait = (
            f"nothing to do: the kernel lets go of it within a minute; `headrace up` then, or now {_other_base(None)}"
        )
        return Finding(what, "held by a connection that has ended (TIME_WAIT), by no process", "note", wait)
    if ends:
        who = sorted({_describe(c.pid) if c.pid else "a process of another user" for c in ends})
        return Finding(what, f"the own end of a connection of {', '.join(who)}", "trouble", move)
    return Finding(what, "taken by a process of another user", "trouble", move)


_ENDED = frozenset({psutil.CONN_TIME_WAIT, psutil.CONN_CLOSE, psutil.CONN_CLOSING, psutil.CONN_LAST_ACK})


def ephemeral_finding(base: int | None, ports: tuple[int, int] | None = None) -> Finding:
    """Return a note where the stack's ports lie among those that the kernel gives to outgoing connections: one of them
    may then have a port when its server wants it.

    >>> ephemeral_finding(43_000, (32_768, 60_999)).level, ephemeral_finding(30_000, (32_768, 60_999)).level
    ('note', 'ok')
    """
    low, high = ports or _ephemeral()
    inside = [port(name, base) for name in PORTS if low <= port(name, base) <= high]
    if not inside:
        return Finding("ephemeral ports", "none of this stack's ports is among them", "ok")
    found = (
        f"{len(inside)} ports from {min(inside)} to {max(inside)} lie in {low} to {high}, of which the kernel gives one"
    )
    remedy = f"choose a PORT_BASE from 1025 to {low - len(PORTS)}" if low > 1_025 + len(PORTS) else "choose another"
    return Finding("ephemeral ports", f"{found} to each outgoing connection", "note", remedy)


def _ephemeral() -> tuple[int, int]:
    try:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return int(low), int(high)
    except (OSError, ValueError):
        return 32_768, 60_999


def free_port(number: int) -> bool:
    """Say whether a server could listen on the loopback port now."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((HOST, number))
        except OSError:
            return False
        return True


def holders(number: int) -> list[int]:
    """Return the processes that listen on a port, as far as this user may see."""
    listening = {c.pid for c in _connections() if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == number}
    return sorted(pid for pid in listening if pid)


def _connections() -> list[Any]:
    try:
        return list(psutil.net_connections("tcp"))
    except psutil.Error:
        return []


def _describe(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        return f"{process.name()} (pid {pid}, user {process.username()})"
    except psutil.Error:
        return f"pid {pid}"


def _outside(layout: Layout, running: bool) -> Iterator[Finding]:
    if running or not layout.own_kafka:
        reason = readiness.kafka_trouble(layout.brokers)
        remedy = (
            "`headrace logs kafka` shows why; the supervisor starts it again"
            if layout.own_kafka
            else ("start it, or correct BROKERS=host:port")
        )
        where = f"at {layout.brokers}"
        yield (
            Finding("broker", f"down {where}: {reason}", "trouble", remedy)
            if reason
            else Finding("broker", f"answers {where}", "ok")
        )
    if layout.store.startswith("hdfs://") and (running or not layout.own_hdfs):
        yield _hdfs(layout)
    if layout.own_cephfs:
        lacking = cephfs.missing()
        yield Finding("store", lacking or "CephFS can run here", "trouble" if lacking else "ok", "name another STORE=")
    elif layout.store.startswith("file:"):
        yield _store_folder(Path(urllib.parse.urlsplit(layout.store).path))


def _hdfs(layout: Layout) -> Finding:
    reason = readiness.hdfs_trouble(layout, patience_s=2.0)
    if not reason:
        return Finding("HDFS", f"takes writes at {layout.webhdfs}", "ok")
    if reason.startswith("HDFS is in safe mode"):
        remedy = (
            "it leaves safe mode by itself when the DataNodes have reported their blocks, and when there is disk again "
            "(Hadoop before 3.4, or entered by hand: `hdfs dfsadmin -safemode leave`)"
        )
        return Finding("HDFS", reason, "trouble", remedy)
    remedy = (
        "`headrace logs namenode` and `headrace logs datanode` show why"
        if layout.own_hdfs
        else ("start it, or correct STORE=hdfs://host:port/path and WEBHDFS=http://host:port")
    )
    return Finding("HDFS", reason, "trouble", remedy)


def _store_folder(folder: Path) -> Finding:
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(nearest, os.W_OK):
        return Finding(
            "store", f"{folder} cannot be written", "trouble", "give this user the right, or name another STORE="
        )
    return Finding("store", f"{folder}", "ok")
