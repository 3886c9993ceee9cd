"""Goal: a process that was forked from one with a sender loses nothing and sends nothing twice. Method: real processes,
as gunicorn --preload makes them, against the real gateway."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_world import Running, eventually

from headrace.sender import Sender

_HEAD = """
import os, sys, threading, time
import headrace.sender.sender as module
from headrace.sender import Sender
module._ADOPT_S = 0.05
def record(name): return {"request_id": name, "user_id": 1, "item_id": 1}
sender = Sender("shop", port=int(sys.argv[1]), spool_dir=sys.argv[2])
"""

_PRELOAD = """
stop, told = threading.Event(), []
def serve():
    while not stop.is_set():
        name = f"parent{len(told)}"
        if sender.emit("impression", record(name)): told.append(name)
        time.sleep(0.002)
thread = threading.Thread(target=serve)
thread.start()
children = []
for child in range(3):
    time.sleep(0.05)
    pid = os.fork()
    if pid == 0:
        # A child of a child too: a worker that starts a process for a task.
        grandchild = os.fork() if child == 0 else -1
        name = f"child{child}" if grandchild else "grandchild"
        for number in range(20):
            sender.emit("impression", record(f"{name}-{number}"))
        ok = sender.flush(60)
        if grandchild > 0:
            ok = ok and os.waitpid(grandchild, 0)[1] == 0
        if not ok or sender.last_error: print(name, ok, sender.unacked, repr(sender.last_error), file=sys.stderr)
        os._exit(0 if ok and not sender.last_error else 1)
    children.append(pid)
codes = [os.waitpid(pid, 0)[1] for pid in children]
stop.set()
thread.join()
assert sender.flush(60) and not sender.last_error, sender.last_error
sender.close()
print(len(told), *codes)
"""


@pytest.fixture
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway that has taken an event already: on a machine's first run that is when it has compiled everything."""
    with Running() as running:
        with Sender("shop", port=running.port, spool_dir=tmp_path_factory.mktemp("warm")) as sender:
            sender.emit("click", {"request_id": "warm", "user_id": 1, "event_id": "warm"})
            sender.emit("impression", {"request_id": "warm", "user_id": 1, "item_id": 1, "event_id": "warm"})
            assert sender.flush(200)
        yield running


def _run(gateway: Running, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _HEAD + code, str(gateway.port), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def _requests(gateway: Running) -> Counter[str]:
    return Counter(row["request_id"] for row in gateway.log.rows() if row["request_id"] != "warm")


def test_children_of_a_process_with_a_sender_have_their_own(gateway: Running, tmp_path: Path) -> None:
    done = _run(gateway, tmp_path, _PRELOAD)
    assert done.returncode == 0, done.stderr
    told, *codes = map(int, done.stdout.split())
    assert codes == [0, 0, 0], done.stderr
    names = ["child0", "child1", "child2", "grandchild"]
    wanted = [f"{name}-{number}" for name in names for number in range(20)]
    assert _requests(gateway) == Counter(wanted + [f"parent{number}" for number in range(told)])
    assert gateway.counts.totals["events_repeated_total"] == 0
    # A child that ends without `close` leaves a file, and nothing in it that has no ack.
    with Sender("shop", port=1, spool_dir=tmp_path) as sender:
        eventually(lambda: list(tmp_path.rglob("*.seg")) == [], "the next one removes it")
        assert sender.unacked == 0


def test_what_a_child_left_goes_through_the_living(gateway: Running, tmp_path: Path) -> None:
    code = """
pid = os.fork()
if pid == 0:
    module.Sender._reconnect = lambda self: time.sleep(60)
    sender.emit("impression", record("child"))
    os._exit(0)
os.waitpid(pid, 0)
until = time.monotonic() + 60
while time.monotonic() < until and any("slot-00" not in str(p) for p in sender._folder.rglob("*.seg")): time.sleep(0.02)
time.sleep(0.2)
print(sender.flush(60))
"""
    done = _run(gateway, tmp_path, code)
    assert done.stdout == "True\n", done.stderr
    eventually(lambda: _requests(gateway) == {"child": 1}, "adopted")


def test_a_child_that_emits_nothing_touches_nothing(gateway: Running, tmp_path: Path) -> None:
    code = """
sender.emit("impression", record("a"))
for end in (os._exit, sys.exit):
    pid = os.fork()
    if pid == 0: end(0)
    assert os.waitpid(pid, 0)[1] == 0
sender.emit("impression", record("b"))
assert sender.flush(60) and not sender.last_error
print(sorted(p.name for p in sender._folder.iterdir()))
"""
    done = _run(gateway, tmp_path, code)
    assert done.stdout == "['slot-00']\n", done.stderr
    assert _requests(gateway) == {"a": 1, "b": 1}


def test_the_interpreters_end_sends_what_was_emitted(gateway: Running, tmp_path: Path) -> None:
    done = _run(gateway, tmp_path, "for n in range(100): sender.emit('impression', record(str(n)))")
    assert done.returncode == 0, done.stderr
    assert _requests(gateway) == Counter(map(str, range(100)))
    assert list(tmp_path.rglob("*.seg")) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_killed_process_had_taken_goes_with_the_next_start(
    gateway: Running, tmp_path: Path, how: signal.Signals
) -> None:
    code = "sender._closing = sender.emit('impression', record('a')); os.kill(os.getpid(), int(sys.argv[3]))"
    # Nobody listens on port 1: the event cannot be on its way already.
    command = [sys.executable, "-c", _HEAD + code, "1", str(tmp_path), str(int(how))]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -how
    with Sender("shop", port=gateway.port, spool_dir=tmp_path) as sender:
        assert sender.unacked == 1
        assert sender.flush(20)
    assert _requests(gateway) == {"a": 1}
