"""Goal: a call that stands still ends its process by name, and one that goes on does not, however long it takes.

Method: a virtual clock, and one real process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest

from headrace.backends import blobs_file, blobs_hdfs
from headrace.backends.blobs_file import FileBlobs
from headrace.backends.clock import VirtualClock
from headrace.process.awake import Awake
from headrace.process.call_watch import ANSWER_MAX_S, LOOK_S, TOLD_S, CallWatch
from headrace.process.moved import followed, moved


class Ended(BaseException):
    """The process was ended."""


def end(why: str) -> None:
    raise Ended(why)


class Store:
    """A store whose `get` takes as long as it is told, in steps that it tells of or not."""

    def __init__(self, clock: VirtualClock, watch: CallWatch) -> None:
        self.clock, self.watch, self.root, self.moves = clock, watch, "here", True

    def get(self, steps: int) -> str:
        for _ in range(steps):
            self.clock.advance(ANSWER_MAX_S * 0.6)
            self.watch.look()
            if self.moves:
                moved()
        return "data"


def test_a_call_that_stands_still_ends_the_process_and_one_that_moves_does_not() -> None:
    clock = VirtualClock()
    watch = CallWatch(clock.monotonic, end, by_itself=False)
    inner = Store(clock, watch)
    store = watch.wrap("blobs", inner)
    assert store.get(100) == "data" and store.root == "here"
    store.moves = False
    assert inner.moves is False and store.get(1) == "data"
    with pytest.raises(Ended, match=r"blobs\.get has not come back for 288 s, 240 s are allowed"):
        store.get(2)
    watch.look()


@pytest.mark.parametrize("hangs_at", ["beginning", "end"])
def test_a_block_is_watched_where_it_begins_and_where_it_ends(hangs_at: str) -> None:
    clock = VirtualClock()
    watch = CallWatch(clock.monotonic, end, by_itself=False)

    def ask(where: str) -> None:
        if where == hangs_at:
            clock.advance(ANSWER_MAX_S + 1.0)
            watch.look()

    class Lake:
        @contextmanager
        def leased(self) -> Iterator[str]:
            ask("beginning")
            try:
                yield "held"
            finally:
                ask("end")

    with (
        pytest.raises(Ended, match=rf"lake\.leased, its {hangs_at} has not come back for 241 s"),
        watch.wrap("lake", Lake()).leased() as held,
    ):
        assert held == "held" and hangs_at == "end"
        clock.advance(10 * ANSWER_MAX_S)
        watch.look()  # Nothing is called inside it, so nothing is waited for.
    watch.look()


def test_a_call_that_comes_back_is_progress_of_what_it_is_part_of() -> None:
    clock = VirtualClock()
    watch = CallWatch(clock.monotonic, end, by_itself=False)
    store = watch.wrap("blobs", Store(clock, watch))
    with watch.named("recovery", 200.0):
        for _ in range(5):
            store.get(1)
        clock.advance(201.0)
        with pytest.raises(Ended, match="recovery has not come back for 201 s"):
            watch.look()


def test_the_age_of_the_oldest_call_is_told_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    clock, ages = VirtualClock(), list[float]()
    watch = CallWatch(clock.monotonic, end, by_itself=False)
    watch.tell = ages.append
    with watch.named("lake.read"):
        for _ in range(3):
            clock.advance(TOLD_S * 0.75)
            watch.look()
    watch.look()
    assert ages == [22.5, 45.0, 67.5, 0.0]
    assert [r.message for r in caplog.records] == ["lake.read has not come back for 45 s; 240 s are allowed"]


def test_time_in_which_the_whole_process_stood_still_is_no_calls() -> None:
    clock = VirtualClock()
    watch, awake = CallWatch(clock.monotonic, end, by_itself=False), Awake(clock.monotonic, LOOK_S)
    with watch.named("log.poll", 5.0):
        for step_s in (LOOK_S, 1_000.0, LOOK_S, 1_000.0, LOOK_S):
            clock.advance(step_s)
            watch.look(awake.stood_s())
        clock.advance(LOOK_S)
        with pytest.raises(Ended, match=r"log\.poll has not come back for 6 s"):
            watch.look(awake.stood_s())
    clock.advance(1_000.0)
    with watch.named("begun since", 5.0):
        watch.look(awake.stood_s())
        clock.advance(6.0)
        with pytest.raises(Ended, match="begun since has not come back for 6 s"):
            watch.look()


def test_nothing_is_wrapped_twice_and_what_is_not_there_not_at_all() -> None:
    watch = CallWatch(by_itself=False)
    once = watch.wrap("a", BytesIO(b"x"))
    assert watch.wrap("b", once) is once and watch.wrap("c", None) is None


def test_a_big_blob_is_stored_and_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs_file, "PIECE_BYTES", 10)
    blobs, told = FileBlobs(tmp_path), list[int]()
    for data in (b"", b"abc", b"0123456789", bytes(range(35))):
        with followed(lambda: told.append(1)):
            blobs.put("x", data)
            assert blobs.get("x") == data
    assert len(told) == (0 + 0) + (0 + 1) + (0 + 1) + (3 + 4)
    monkeypatch.setattr(blobs_hdfs, "SENT_BYTES", 2)
    with followed(lambda: told.append(1)):
        assert list(blobs_hdfs._sent(b"abc")) == [b"ab", b"c"]
    assert len(told) == 11


HANGS = """
import logging, os, threading, sys
from headrace.process import call_watch
call_watch.LOOK_S = 0.05
logging.basicConfig()
watch = call_watch.CallWatch()
class Store:
    def get(self, name): threading.Event().wait()
    def here(self): return True
store = watch.wrap("blobs", Store())
store.here()
if FORK and os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
with watch.named("the start", 0.05):
    store.get("x")
"""


@pytest.mark.parametrize("forks", [False, True])
def test_a_hanging_call_ends_a_real_process_and_one_that_was_forked(forks: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HANGS.replace("FORK", str(forks))],
        capture_output=True,
        text=True,
        timeout=60.0,
    )
    assert done.returncode == 1 and "has not come back" in done.stderr and "in get" in done.stderr
