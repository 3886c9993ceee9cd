"""Loads a stack, kills its processes as planned, waits until every shipper has its acks, and counts the ids."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from headrace.backends.log.kafka import KafkaReader
from headrace.contract.config import Config
from headrace.contract.errors import Unavailable
from headrace.contract.formats.topics import Topics
from headrace.contract.project import Project
from headrace.deploy.local.chaos.account import Account, count
from headrace.deploy.local.chaos.load import Load
from headrace.deploy.local.chaos.own_stack import READY_S, Say, await_ready
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.supervise import Supervisor
from headrace.process.awake import awake_s

QUIET_S = 180.0


def load_and_break(
    layout: Layout,
    project: Project,
    config: Config,
    account: Account,
    say: Say,
    *,
    breaks: Callable[[Load], None],
    ready_s: float = READY_S,
) -> None:
    """Load the stack, break it as `breaks` does, wait for quiet, and count the ids."""
    load = Load(project, layout.port("forward"), layout.home / "spool", account.rate, account.seed)
    begin = awake_s()
    load.start()
    try:
        breaks(load)
        time.sleep(1.0)
    finally:
        load.stop()
    account.seconds, account.held_s = round(awake_s() - begin, 1), round(load.held_s, 1)
    account.rate_held = round(load.count / account.seconds, 1)
    await_ready(layout, ready_s, say)
    if not load.settled(QUIET_S):
        say(f"{load.unacked} events still have no ack after {QUIET_S:.0f} s")
    quiet_s = awake_s() - begin - account.seconds
    say(f"quiet: every shipper has its acks after {quiet_s:.1f} s more")
    reader = KafkaReader(layout.brokers)
    count(reader, Topics(config.log.generation), project, load, account)
    reader.close()


def kill_all(layout: Layout, account: Account, load: Load, say: Say) -> None:
    """Carry out the plan of kills, a line a kill."""
    supervisor, kills = Supervisor(layout), account.kills
    for number, kill in enumerate(kills, 1):
        if kill.when_ready:
            await_ready(layout)
        time.sleep(kill.after_s)
        until = awake_s() + READY_S
        while not kill.pid:
            kill.pid = supervisor.pids().get(kill.process, 0)
            if not kill.pid and awake_s() > until:
                raise Unavailable(f"{kill.process} did not start again in {READY_S:.0f} s; see {layout.logs}.")
            time.sleep(0 if kill.pid else 0.05)
        try:
            os.kill(kill.pid, signal.SIGKILL)
        except ProcessLookupError:
            say(f"kill {number}: {kill.process} {kill.pid} was gone already")
        when = "at work" if kill.when_ready else "as it starts"
        say(
            f"kill {number:>2} of {len(kills)}: {kill.process} (pid {kill.pid}, {when}, after "
            f"{kill.after_s:.1f} s); {load.count:,} emitted, {load.unacked:,} without ack"
        )
