"""Goal: no call and no loop that stands still keeps a stage for ever. Method: a virtual clock, and one real process."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from headrace.backends.clock import VirtualClock
from headrace.contract.errors import Unavailable
from headrace.process.awake import Awake
from headrace.process.moved import moved
from headrace.process.waits import Waits
from headrace.process.watchdog import LOOK_S, STILL_MAX_S, Watchdog


def test_a_call_returns_or_raises_what_its_work_does() -> None:
    async def run() -> None:
        waits = Waits(VirtualClock())
        assert await waits.call("sum", lambda: 1 + 1) == 2
        for error in (MemoryError, StopIteration, SystemExit):
            with pytest.raises(RuntimeError if error is StopIteration else error):
                await waits.call("odd", partial(_raise, error))

    asyncio.run(run())


def _raise(error: type[BaseException]) -> None:
    raise error


def test_a_call_beyond_its_bound_is_named_and_its_late_answer_ignored() -> None:
    async def run() -> None:
        clock, go_on = VirtualClock(), threading.Event()
        waits = Waits(clock)
        calling = asyncio.ensure_future(waits.call("write of x", lambda: go_on.wait(10.0), 5.0))
        await asyncio.sleep(0)
        for step_s in (2.5, 2.5, 0.1):
            waits.check()
            clock.advance(step_s)
        with pytest.raises(Unavailable, match=r"write of x: no answer in 5 s, 5 s are allowed"):
            waits.check()
        calling.cancel()
        go_on.set()
        await asyncio.wait([calling])
        waits.check()

    asyncio.run(run())


def test_a_call_that_goes_on_may_be_long_and_one_that_stands_still_may_not() -> None:
    async def run() -> None:
        clock = VirtualClock()
        waits = Waits(clock)
        pieces, read = threading.Semaphore(0), threading.Semaphore(0)

        def load() -> None:
            while True:
                pieces.acquire()
                moved()
                read.release()

        calling = asyncio.ensure_future(waits.call("look for x", load, 5.0))
        await asyncio.sleep(0)
        for _ in range(20):
            for _ in range(2):
                clock.advance(2.0)
                waits.check()
            pieces.release()
            read.acquire()
        for step_s in (2.5, 2.5, 0.1):
            waits.check()
            clock.advance(step_s)
        with pytest.raises(Unavailable, match=r"look for x: no answer in 5 s, 5 s are allowed"):
            waits.check()
        calling.cancel()
        await asyncio.wait([calling])

    asyncio.run(run())


def test_time_in_which_the_whole_process_stood_still_is_no_calls() -> None:
    async def run() -> None:
        clock = VirtualClock()
        waits = Waits(clock)
        with waits.named("write of x", 6.0):
            for step_s in (1.0, 600.0, 1.0, 600.0, 1.0):
                clock.advance(step_s)
                waits.check()
            with waits.named("write of y", 1.0):
                clock.advance(600.0)
                waits.check()
            clock.advance(1.0)
            with pytest.raises(Unavailable, match=r"write of x: no answer in 7 s, 6 s are allowed"):
                waits.check()

    asyncio.run(run())


def test_awake_time_goes_on_and_leaves_out_what_stood_still() -> None:
    clock = VirtualClock()
    awake = Awake(clock.monotonic, LOOK_S)
    seen = []
    for step_s in (1.0, 2.9, 100.0, 0.0, 0.5):
        clock.advance(step_s)
        seen.append(awake.monotonic())
    assert [round(each, 6) for each in seen] == [1.0, 3.9, 4.9, 4.9, 5.4]


STOPPED = """
import os, sys, time
from headrace.process.awake import awake_s
awake_s()
pid = os.fork()
begin, awake = time.monotonic(), awake_s()
os.write(1, b"ready\\n")
sys.stdin.readline() if pid else time.sleep(8.0)
passed, awake = time.monotonic() - begin, awake_s() - awake
ok = passed - awake > 2.0 and awake < 3.5 if pid else passed - awake < 1.0
os.write(1, f"{'parent' if pid else 'child'} {ok}\\n".encode())
os._exit(0) if not pid else os.wait()
"""


def test_a_process_that_was_stopped_by_a_signal_counts_none_of_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        process.send_signal(signal.SIGSTOP)
        time.sleep(4.5)
        process.send_signal(signal.SIGCONT)
        said = process.communicate("go on\n", timeout=30.0)[0]
    assert sorted(said.split()) == ["True", "True", "child", "parent"], "a fork is a process with a clock of its own"


def test_a_loop_that_stands_still_ends_the_process() -> None:
    clock, said = VirtualClock(), list[str]()
    watchdog = Watchdog(clock.monotonic, said.append)
    clock.advance(STILL_MAX_S)
    watchdog.look()
    watchdog.beat()
    clock.advance(STILL_MAX_S)
    watchdog.look()
    assert said == []
    clock.advance(0.1)
    watchdog.look()
    assert "has stood still for 180 s" in said[0]


def test_time_in_which_the_whole_process_stood_still_is_not_the_loops() -> None:
    clock, said = VirtualClock(), list[str]()
    watchdog, awake = Watchdog(clock.monotonic, said.append), Awake(clock.monotonic, LOOK_S)
    for step_s in (LOOK_S, 10 * STILL_MAX_S, 2 * LOOK_S, 10 * STILL_MAX_S):
        clock.advance(step_s)
        watchdog.look(awake.stood_s())
    watchdog.beat()
    clock.advance(10 * STILL_MAX_S)
    watchdog.beat()
    watchdog.look(awake.stood_s())
    for _ in range(int(STILL_MAX_S / LOOK_S)):
        clock.advance(LOOK_S)
        watchdog.look(awake.stood_s())
    assert said == []
    clock.advance(LOOK_S)
    watchdog.look(awake.stood_s())
    assert "has stood still for 181 s" in said[0]


HANGS = """
import asyncio, logging, threading
from headrace.process import watchdog
from headrace.process.waits import in_thread
watchdog.STILL_MAX_S = watchdog.LOOK_S = 0.05
logging.basicConfig()
async def main():
    asyncio.ensure_future(in_thread("never", threading.Event().wait))
    await asyncio.sleep(0.01)
    watchdog.Watchdog().start()
    threading.Event().wait()
"""
ENDS = """
import asyncio, threading
from headrace.process.waits import in_thread
async def main():
    asyncio.ensure_future(in_thread("never", threading.Event().wait))
    await asyncio.sleep(0.01)
"""


@pytest.mark.parametrize(("program", "status", "said"), [(HANGS, 1, "stood still"), (ENDS, 0, "")])
def test_neither_a_hanging_loop_nor_a_hanging_call_keeps_a_process(program: str, status: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program + "asyncio.run(main())"], capture_output=True, text=True, timeout=30.0
    )
    assert (done.returncode, said in done.stderr) == (status, True)
