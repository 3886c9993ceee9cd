"""Goal: a bound passes while the process works, and not while it stands still. Method: a clock that is turned by hand,
in small steps as a process sees it that works, or in one as one sees it that was stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.backends.clock import VirtualClock
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import IngestConfig
from headrace.contract.errors import Unavailable
from headrace.contract.formats.topics import Topics
from headrace.deploy.local import stack
from headrace.deploy.local.chaos import own_stack
from headrace.ingest.crawl.outbox_sender import RECEIPT_MAX_S, OutboxSender, _Sent
from headrace.ingest.forward.endpoint import Endpoint
from headrace.ingest.forward.forward_server import ForwardServer
from headrace.process.awake import Awake, awake_timeout
from headrace.serving.features import FeatureMemory

LONG_S = 10_000.0


def works(clock: VirtualClock, seconds: float, turn: Callable[[], object]) -> None:
    """Let time pass as a process sees it that works: a turn a second."""
    for _ in range(int(seconds)):
        clock.advance(1.0)
        turn()


class Idle:
    """A frontier and a producer with nothing to do."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_: 0 if name == "waiting" else []


def test_a_receipt_is_not_overdue_when_the_crawler_stood_still() -> None:
    clock, idle = VirtualClock(), Idle()
    sender = OutboxSender(idle, idle, Topics(), 1, MemoryMetrics(), 1, clock)  # type: ignore[arg-type]
    sender._unsettled.append(_Sent(1, 1, sender._awake.monotonic(), set()))
    clock.advance(LONG_S)
    sender.turn()
    with pytest.raises(Unavailable, match=r"no receipt of versions up to number 1 in 33\d s, 330 s are allowed"):
        works(clock, RECEIPT_MAX_S + 5, sender.turn)


@pytest.mark.parametrize(
    ("is_handshake", "bound", "reason"),
    [(True, "handshake_ms", "handshake_timeout"), (False, "message_ms", "message_timeout")],
)
def test_a_peer_is_not_too_slow_when_the_gateway_stood_still(is_handshake: bool, bound: str, reason: str) -> None:
    clock, refused = VirtualClock(), list[str]()
    config = IngestConfig()
    server = ForwardServer(config, MemoryMetrics(), clock, Endpoint())
    server._admission = SimpleNamespace(is_open=lambda: True)  # type: ignore[assignment]
    peer = SimpleNamespace(
        since_s=server.awake_s(),
        half_closed=False,
        in_handshake=is_handshake,
        refuse=lambda reason, _why: refused.append(reason),
    )
    server._unfinished = [peer]  # type: ignore[assignment]
    clock.advance(LONG_S)
    server.sweep()
    assert not refused
    works(clock, getattr(config, bound) / 1_000 + 2, server.sweep)
    assert set(refused) == {reason}


def test_a_broker_is_not_away_for_long_when_serving_stood_still() -> None:
    clock, memory = VirtualClock(), FeatureMemory()
    memory._awake = Awake(clock.monotonic)
    memory.is_caught_up, memory.away_since_s = True, memory._awake.monotonic()
    clock.advance(LONG_S)
    assert memory.state(clock.monotonic(), 30.0) == "current"
    works(clock, 31.0, lambda: memory._awake and memory._awake.stood_s())
    assert memory.state(clock.monotonic(), 30.0) == "stale"


@contextmanager
def clock_of(monkeypatch: pytest.MonkeyPatch, module: Any, jumps: bool) -> Iterator[VirtualClock]:
    """Let a module's bounds read a clock that a sleep turns by a second; or, once, by far more: it stood still."""
    clock = VirtualClock()
    awake, left = Awake(clock.monotonic), [jumps]

    def sleep(_: float) -> bool:
        clock.advance(LONG_S if left[0] else 1.0)
        left[0] = False
        return False

    monkeypatch.setattr(module, "awake_s", awake.monotonic)
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))
    event = SimpleNamespace(wait=sleep, set=list)
    monkeypatch.setattr(module, "threading", SimpleNamespace(Event=lambda: event), raising=False)
    yield clock


@pytest.mark.parametrize("jumps", [True, False])
def test_a_stack_is_not_late_when_its_start_stood_still(monkeypatch: pytest.MonkeyPatch, jumps: bool) -> None:
    with clock_of(monkeypatch, stack, jumps):
        left = iter(["starts"] * 8)
        stack.await_all({"train": lambda: next(left, "")}, 10.0, lambda _: None)
    with clock_of(monkeypatch, stack, jumps), pytest.raises(Unavailable, match="not ready after 10 s: train: starts"):
        stack.await_all({"train": lambda: "starts"}, 10.0, lambda _: None)


@pytest.mark.parametrize("jumps", [True, False])
def test_a_stack_that_chaos_broke_is_not_late_when_chaos_stood_still(
    monkeypatch: pytest.MonkeyPatch, jumps: bool
) -> None:
    asked = {"train": iter(["starts"] * 8)}
    layout = SimpleNamespace(own_kafka=False, own_hdfs=False, logs="logs", port_base=1)
    monkeypatch.setattr(own_stack.readiness, "stage_probes", lambda _: {"train": lambda: next(asked["train"], "")})
    monkeypatch.setattr(own_stack, "replace", lambda layout, **_: layout)
    monkeypatch.setattr(own_stack, "_second_base", lambda _: 1)
    process = SimpleNamespace(name="train")
    monkeypatch.setattr(own_stack, "Supervisor", lambda _: SimpleNamespace(processes=lambda: [process]))
    probes = {"train": lambda: next(asked["train"], ""), "ingest": lambda: "", "stream": lambda: ""}
    monkeypatch.setattr(own_stack.readiness, "stage_probes", lambda _: dict(probes))
    with clock_of(monkeypatch, own_stack, jumps):
        own_stack.await_ready(layout, 10.0)  # type: ignore[arg-type]
    asked["train"] = iter(["starts"] * 99)
    with clock_of(monkeypatch, own_stack, jumps), pytest.raises(Unavailable, match="not ready again after 10 s"):
        own_stack.await_ready(layout, 10.0)  # type: ignore[arg-type]


def test_a_block_ends_after_its_time_awake_and_not_after_the_loops() -> None:
    now_s = [0.0]

    async def work() -> None:
        turns = list[float]()

        def monotonic() -> float:
            # The loop's timer comes, and the process stood still the first two times.
            turns.append(now_s[0])
            now_s[0] += 0.02 if len(turns) > 3 else 0.0
            return now_s[0]

        with pytest.raises(TimeoutError):
            async with awake_timeout(0.02, monotonic):
                await asyncio.Event().wait()
        assert len(turns) > 3
        async with awake_timeout(0.02, monotonic):
            pass

    asyncio.run(work())
