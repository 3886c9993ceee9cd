"""Goal: a long run says how far it is and how long it will take, on a terminal and in a log file.

Method: lines under a clock of the test's own; the bar on a real pseudo-terminal, with a log line meanwhile.
"""

from __future__ import annotations

import logging
import os
import re
import select
import subprocess
import sys
import time

from headrace.cli.progress_bar import Bar, Lines, duration, show_progress

CHILD = """
import logging, sys, time
logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
from headrace.cli.progress_bar import show_progress
bar = show_progress(logging.getLogger("x"))
bar.begin("learning the lake", 1000)
for done in range(0, 1001, 50):
    bar.done(done)
    time.sleep(0.05)
    if done == 500:
        logging.getLogger("x").warning("something happened")
bar.end()
logging.getLogger("x").warning("and afterwards")
"""


def test_lines_say_how_far_and_how_long(caplog):
    now = [100.0]
    lines = Lines(logging.getLogger("some"), lambda: now[0])
    with caplog.at_level(logging.INFO):
        lines.end()
        lines.begin("learning the lake", 10_000)
        for second in range(1, 11):
            now[0] += 1
            lines.done(second * 1_000)
        lines.end()
        lines.end()
    assert caplog.messages == [
        "learning the lake: 10,000 samples",
        "learning the lake: 5,000 of 10,000 samples, 50 %, 1,000/s, 5 s left",
        "learning the lake: 10,000 of 10,000 samples, 100 %, 1,000/s, 0 s left",
        "learning the lake: done, 10,000 samples in 10 s",
    ]


def test_durations():
    assert [duration(s) for s in (0.2, 59.4, 61, 3_599, 7_260)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "59 min 59 s",
        "2 h 1 min",
    ]


def test_a_pipe_gets_lines():
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        assert isinstance(show_progress(logging.getLogger("some"), stream), Lines)
    os.close(reading)


def test_a_terminal_gets_a_bar_with_log_lines_above_it():
    ours, theirs = os.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "140"}
    child = subprocess.Popen([sys.executable, "-c", CHILD], stderr=theirs, stdout=theirs, stdin=theirs, env=env)
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                chunk = os.read(ours, 65_536)
            except OSError:  # the child's end is closed
                break
            if not chunk:
                break
            seen += chunk
    assert child.wait(30) == 0
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    assert "something happened" in lines and "and afterwards" in lines
    bars = [line for line in lines if line.startswith("learning the lake")]
    assert any(re.search(r"\d+/1000 samples .*/s .*left: 0:00:0\d", line) for line in bars), bars[-3:]
    assert "1000/1000 samples" in bars[-1]


def test_the_bar_is_that_of_a_terminal():
    class Terminal:
        def isatty(self) -> bool:
            return True

    assert isinstance(show_progress(logging.getLogger("some"), Terminal()), Bar)
