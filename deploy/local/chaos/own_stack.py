"""A stack for one run of chaos, in a folder and on ports of its own; the running one is never touched."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from headrace.contract.config import PORTS, Config, port
from headrace.contract.errors import Unavailable
from headrace.contract.formats.topics import Topics
from headrace.deploy.local import readiness
from headrace.deploy.local.chaos.plan import ALL, ON_HDFS, SECOND, SECOND_WORKER, needed
from headrace.deploy.local.doctor import free_port
from headrace.deploy.local.layout import HOST, Layout
from headrace.deploy.local.stack import ALSO, STAGES, start, stop
from headrace.deploy.local.supervise import Program, Supervisor
from headrace.process.awake import awake_s

RESTART_MAX_S = 5.0
"""What is killed every few seconds by a plan is started again soon, not as late as what crashes by itself."""
READY_S = 120.0
TELL_S = 15.0

Say = Callable[[str], None]


@contextmanager
def own_stack(
    project: Path,
    config: Config,
    stages: Sequence[str],
    say: Say,
    *,
    gateways: int = 1,
    base: int | None = None,
    more: Sequence[Program] = (),
    home: Path | None = None,
) -> Iterator[Layout]:
    """Yield a fresh stack that runs what `stages` need; its folder goes with it, unless an error leaves the block.

    `more` are programs that take the place of the stages whose names they have. `home` is where all is kept; by default
    a temporary folder.
    """
    home = home or Path(tempfile.mkdtemp(prefix="headrace-chaos-")) / "home"
    base, on_hdfs = free_base() if base is None else base, bool(ON_HDFS & set(stages))
    layout = Layout(
        home=home,
        port_base=base,
        brokers=f"{HOST}:{port('kafka', base)}",
        store=f"hdfs://{HOST}:{port('namenode', base)}/headrace" if on_hdfs else f"file:{home / 'store'}",
        webhdfs=f"http://{HOST}:{port('namenode_http', base)}" if on_hdfs else None,
        project=project,
        own_kafka=True,
        own_hdfs=on_hdfs,
    )
    running = sorted(needed(stages), key=(*STAGES, *ALSO).index)
    gates = _two_gateways(layout) if gateways > 1 else []
    gates += [_second_worker(layout)] if {"stream", ALL} & set(stages) else []
    gates += [_two_processes_of_serve()] if ALL in stages else []
    try:
        specs = Topics(config.log.generation).specs(config.log.partitions)
        start(layout, specs, say, stages=running, more=[*gates, *more], restart_max_s=RESTART_MAX_S)
        yield layout
    except BaseException:
        say(f"logs and data stay in {home}")
        raise
    else:
        stop(layout, lambda _: None)
        _remove(home)
        with contextlib.suppress(OSError):
            home.parent.rmdir()
    finally:
        stop(layout, lambda _: None)


def _two_gateways(layout: Layout) -> list[Program]:
    """Return the programs of two gateways that share the forward port. The second's metrics are on another base."""
    command = [sys.executable, "-m", "headrace.cli.main", "ingest", "--share-port", "--port"]
    command.append(str(layout.port("forward")))
    second = ["--name", SECOND, "--port-base", str(_second_base(layout))]
    return [Program("ingest", [*command, "--name", "ingest-1"]), Program(SECOND, [*command, *second])]


def _second_worker(layout: Layout) -> Program:
    """Return a second stream worker of the same group, with local state and metrics of its own."""
    own = ["--home", str(layout.home / SECOND_WORKER), "--port-base", str(_second_base(layout))]
    return Program(SECOND_WORKER, [sys.executable, "-m", "headrace.cli.main", "stream", *own])


def _two_processes_of_serve() -> Program:
    """Return serving with a worker beside its first process, so that each of both can be killed."""
    return Program("serve", [sys.executable, "-m", "headrace.cli.main", "serve", "--workers", "2"])


def _second_base(layout: Layout) -> int:
    return (layout.port_base or 0) + len(PORTS)


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    folder.rmdir()


def free_base() -> int:
    """Return a PORT_BASE with twice as many free ports as a stack has; below 32768, where the kernel takes its own."""
    span = 2 * len(PORTS)
    for base in range(26_000 + os.getpid() % 50 * span, 32_700 - span, span):
        if all(free_port(number) for number in range(base, base + span)):
            return base
    raise Unavailable(f"no {span} free ports in a row below 32700; give PORT_BASE=.")


def await_ready(layout: Layout, ready_s: float = READY_S, say: Say | None = None) -> None:
    """Return when the broker and all stages that run here say that they are ready; `say` what it waits for meanwhile.

    Raises `Unavailable` with the reasons of those that are not after `ready_s`.
    """
    probes = readiness.stage_probes(layout)
    others = readiness.stage_probes(replace(layout, port_base=_second_base(layout)))
    probes |= {SECOND: others["ingest"], SECOND_WORKER: others["stream"]}
    asked = {p.name: probes[p.name] for p in Supervisor(layout).processes() if p.name in probes}
    until, told_s = awake_s() + ready_s, awake_s()
    while reasons := [f"{name}: {reason}" for name, ask in asked.items() if (reason := ask())]:
        if awake_s() > until:
            raise Unavailable(f"not ready again after {ready_s:.0f} s: {'; '.join(reasons)}; see {layout.logs}.")
        if say and awake_s() - told_s > TELL_S:
            say(f"not ready yet: {'; '.join(reasons)}")
            told_s = awake_s()
        time.sleep(0.05)
    if layout.own_kafka and (trouble := readiness.kafka_trouble(layout.brokers, ready_s)):
        raise Unavailable(trouble)
    while layout.own_hdfs and (trouble := readiness.hdfs_trouble(layout)):
        if awake_s() > until:
            raise Unavailable(f"not ready again after {ready_s:.0f} s: {trouble}; see {layout.logs}.")
