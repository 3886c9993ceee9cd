"""Real Kafka and two real gateway processes on one port, all killed with -9 under load.

Goal: every event that was emitted is in the log at least once, and once after ids are dropped; nothing is restarted by
hand. Method: a stack of its own; senders with acks (`headrace.sender` and raw forward chunks, half of them without
event ids) at 1,000 events/s; SIGKILL to the broker twice and to each gateway; then the log is read from its beginning.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import pytest
from harness.stack import SHOP

from headrace.cli.project_folder import load_project
from headrace.deploy.local.chaos.account import Account
from headrace.deploy.local.chaos.kills import kill_all, load_and_break
from headrace.deploy.local.chaos.own_stack import own_stack
from headrace.deploy.local.chaos.plan import Kill
from headrace.deploy.local.supervise import Supervisor

pytestmark = [pytest.mark.real, pytest.mark.timeout(280)]

RATE = 1_000
KILLS = (
    Kill("kafka", 3.0, when_ready=True),
    Kill("ingest", 2.0, when_ready=True),
    # While the broker is still coming back, the other gateway goes too.
    Kill("kafka", 2.0, when_ready=True),
    Kill("ingest-2", 1.0, when_ready=False),
)


@pytest.fixture(scope="module")
def outcome() -> Iterator[tuple[Account, dict[str, int], dict[str, int]]]:
    config, project = load_project(SHOP)
    account = Account(seed=5, stages=["kafka", "ingest"], kills=list(KILLS), rate=RATE, seconds=0.0, rate_held=0.0)
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} s  {text}")

    with own_stack(SHOP, config, ("kafka", "ingest"), say, gateways=2) as layout:
        before = Supervisor(layout).pids()
        breaks = partial(kill_all, layout, account, say=say)
        load_and_break(layout, project, config, account, say, breaks=breaks)
        yield account, before, Supervisor(layout).pids()


def test_all_were_killed_and_are_back_by_themselves(outcome: tuple[Account, dict[str, int], dict[str, int]]) -> None:
    account, before, after = outcome
    assert {"kafka", "ingest", "ingest-2"} <= after.keys()
    # `watch` is not killed: it looks on, and had nothing to restart.
    assert {name for name in before if before[name] == after.get(name)} == {"watch"}
    assert all(kill.pid for kill in account.kills)


def test_every_event_is_in_the_log_and_once_after_ids_are_dropped(
    outcome: tuple[Account, dict[str, int], dict[str, int]],
) -> None:
    account, _, _ = outcome
    assert account.emitted > 5 * RATE
    assert (account.lost, account.twice, account.made_up, account.bad_lost) == (0, 0, 0, 0)
    assert account.closes
    assert account.appended == account.emitted + account.repeated_in_log
    assert account.repeated + account.repeated_in_log > 0, "kills made shippers send again, and that was seen"
