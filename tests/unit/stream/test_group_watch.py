"""Goal: a member of a group whose client has died, or which gets no assignment, does not wait for ever.

Method: what Faust and aiokafka keep, with a task that was planted dead; a virtual clock.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from types import SimpleNamespace

import aiokafka.client
import aiokafka.consumer.fetcher
import aiokafka.consumer.group_coordinator
import pytest

from headrace.backends.clock import VirtualClock
from headrace.contract.errors import Unavailable
from headrace.stream.shell.group_watch import GROUP_MAX_S, GroupWatch


async def _works() -> None:
    await asyncio.sleep(60.0)


async def _dies() -> None:
    raise AssertionError("Did we not perform bootstrap?")


def client(**tasks: asyncio.Task[None] | None) -> SimpleNamespace:
    """Return Faust's thread with a consumer that has these tasks."""
    worker = SimpleNamespace(is_stopped=threading.Event())
    consumer = SimpleNamespace(
        _coordinator=SimpleNamespace(_coordination_task=tasks.get("coordination")),
        _fetcher=SimpleNamespace(_fetch_task=tasks.get("fetch")),
        _client=SimpleNamespace(_sync_task=tasks.get("sync")),
    )
    return SimpleNamespace(_thread=worker, _consumer=consumer)


@pytest.mark.parametrize(
    ("name", "said"), [("coordination", "group coordination"), ("fetch", "fetcher"), ("sync", "look at the cluster")]
)
def test_a_task_of_the_client_that_has_ended_stops_the_stage(name: str, said: str) -> None:
    async def run() -> None:
        watch = GroupWatch(VirtualClock().monotonic)
        watch.assigned()
        tasks = {each: asyncio.ensure_future(_works()) for each in ("coordination", "fetch", "sync")}
        watch.look(client(**tasks))
        dead = asyncio.ensure_future(_dies())
        await asyncio.wait([dead])
        with pytest.raises(Unavailable, match=rf"its {said} has ended \(Did we not perform bootstrap\?\)"):
            watch.look(client(**{**tasks, name: dead}))
        tasks[name].cancel()
        await asyncio.wait([tasks[name]])
        with pytest.raises(Unavailable, match=rf"its {said} has ended"):
            watch.look(client(**tasks))

    asyncio.run(run())


def test_a_thread_that_has_ended_stops_the_stage() -> None:
    watch, thread = GroupWatch(VirtualClock().monotonic), client()
    watch.assigned()
    watch.look(thread)
    thread._thread.is_stopped.set()
    with pytest.raises(Unavailable, match="its thread has ended"):
        watch.look(thread)


def test_a_member_without_an_assignment_stops_after_a_bound() -> None:
    clock = VirtualClock()
    watch, starting = GroupWatch(clock.monotonic), SimpleNamespace(_thread=None, _consumer=None)
    clock.advance(GROUP_MAX_S)
    watch.look(starting)
    clock.advance(0.1)
    with pytest.raises(Unavailable, match=r"no assignment in 120 s, 120 s are allowed"):
        watch.look(starting)
    watch.assigned()
    clock.advance(10 * GROUP_MAX_S)
    watch.look(client())
    watch.revoked()
    assert not watch.has_assignment
    clock.advance(GROUP_MAX_S + 0.1)
    with pytest.raises(Unavailable, match="no assignment"):
        watch.look(client())


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (aiokafka.consumer.group_coordinator, "self._coordination_task = create_task("),
        (aiokafka.consumer.fetcher, "self._fetch_task = create_task("),
        (aiokafka.client, "self._sync_task = create_task("),
    ],
)
def test_aiokafka_keeps_its_tasks_where_we_look(module: object, name: str) -> None:
    assert name in inspect.getsource(module)
