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
from headrace.stream.shell.group_watch import GROUP_MAX_S, GroupWatch, last_words


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


def test_what_a_dead_client_raises_does_not_hide_why_it_died() -> None:
    """Its thread closes its loop when it ends, and every call of the stage fails of that."""
    closed = RuntimeError("Event loop is closed")
    frozen = TimeoutError("no answer to OffsetCommit in 30 s")
    crash = OSError("the coordinator is gone")
    crash.__cause__ = frozen
    thread = client()
    thread.crash_reason = None
    assert last_words(closed, None, "a:1", 3.0) == "RuntimeError: Event loop is closed"
    assert last_words(closed, thread, "a:1", 3.0) == "RuntimeError: Event loop is closed", "the client works"
    assert last_words(Unavailable("no store"), thread, "a:1", 3.0) == "Unavailable: no store"
    thread.crash_reason = crash
    thread._thread.is_stopped.set()
    said = last_words(closed, thread, "a:1", 21.4)
    for part in (
        "its consumer failed (OSError: the coordinator is gone, which came of TimeoutError: no answer to OffsetCommit",
        "its thread has ended",
        "The brokers a:1 last answered this stage 21 s ago",
        "failed then: RuntimeError: Event loop is closed",
    ):
        assert part in said
    thread.crash_reason = None
    assert "its thread has ended (no cause is known)" in last_words(closed, thread, "a:1", 21.4)
