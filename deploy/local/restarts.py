"""When a process that has ended is started again, and what is known of its ends. Pure: times come in.

1. An end that nobody asked for counts as a crash, however long the process had run.
2. The n-th crash in a row waits FIRST_S * 2^(n-1), at most `max_s`, until the next start: 0.5, 1, 2, 4, 8, 16, 30 s.
3. A run of `HEALTHY_S` ends the row, and so does a start that somebody asked for. A shorter run does not: what dies
   after half a minute again and again waits as long as what dies at once.
4. It never gives up: a stage whose broker was away for an hour is back within `max_s` of the broker.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import Struct, structs

FIRST_S = 0.5
MAX_S = 30.0
HEALTHY_S = 300.0
"""Above every bound after which a stage ends by itself, such as 120 s without an assignment: one that ends at its bound
again and again is in a crash loop too."""
WORDS_MAX = 300
_TROUBLE = re.compile(
    r"^headrace [a-z-]+: |\b(ERROR|CRITICAL|FATAL|\w*(?:Error|Exception|Rejected|Unavailable|Broken|Overloaded)\b:)"
)


class Crashes(Struct):
    """The ends of one process that nobody asked for, since the supervisor was started."""

    total: int = 0
    in_row: int = 0
    last_pid: int = 0
    last_exit: str = ""
    """`exit 1`, `SIGKILL`, or why it could not be started."""
    last_ran_s: float = 0.0
    last_words: str = ""
    """The newest line of trouble that it wrote in that life, else the newest line; "" where it wrote none."""
    next_start_s: float = 0.0
    """On the monotonic clock; 0 when no start is waited for."""

    def ended(self, *, pid: int, how: str, ran_s: float, words: str, now_s: float, max_s: float = MAX_S) -> None:
        """Note a crash and decide when the next start is."""
        if ran_s >= HEALTHY_S:
            self.in_row = 0
        self.total, self.in_row = self.total + 1, self.in_row + 1
        self.last_pid, self.last_exit, self.last_ran_s, self.last_words = pid, how, ran_s, words
        self.next_start_s = now_s + wait_s(self.in_row, max_s)

    def asked(self) -> None:
        """Note that somebody asked for a start or a stop: what comes begins a new row."""
        self.in_row, self.next_start_s = 0, 0.0

    def told(self, *, now_s: float, begun_s: float) -> Crashes:
        """Return what is known at a time, with `next_start_s` as seconds from it.

        A process that has run for `HEALTHY_S` since it began, and still does, is in no row any more.
        """
        left_s = self.left_s(now_s)
        is_over = left_s == 0.0 and now_s - begun_s >= HEALTHY_S
        return structs.replace(self, in_row=0 if is_over else self.in_row, next_start_s=left_s)

    def left_s(self, now_s: float) -> float:
        """Return how long the next start still waits."""
        return max(0.0, self.next_start_s - now_s)


def wait_s(in_row: int, max_s: float = MAX_S) -> float:
    """Return how long the start after the `in_row`-th crash in a row waits.

    >>> [wait_s(n) for n in (1, 2, 3, 7, 8, 10_000)]
    [0.5, 1.0, 2.0, 30.0, 30.0, 30.0]
    """
    # 2^20 times FIRST_S is far above every bound, and a float has no trouble with it.
    return float(min(max_s, FIRST_S * 2 ** min(20, in_row - 1)))


def last_words(lines: Sequence[str]) -> str:
    """Return the newest line that tells of trouble, else the newest; shortened, "" without any.

    >>> last_words(["a", "x ERROR headrace.engine stopping: no store", "bye", ""])
    'x ERROR headrace.engine stopping: no store'
    >>> last_words(["headrace ingest: the key is missing.", "    cookie", "Set it."])
    'headrace ingest: the key is missing.'
    >>> last_words(["one", "two", ""]), last_words([])
    ('two', '')
    """
    said = [line.strip() for line in lines if line.strip()]
    found = next((line for line in reversed(said) if _TROUBLE.search(line)), said[-1] if said else "")
    # XML-RPC, by which it is told, has no control characters.
    return "".join(letter if letter.isprintable() else " " for letter in found[:WORDS_MAX])
