"""How long work inside one call says that it goes on: whoever watches the call follows, and does not take it for hung.

A store that writes piece by piece, or a lake that is read batch by batch, says `moved` after each piece. It needs to
know nobody: those who follow are found by the thread that the call runs in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_here = threading.local()


def moved() -> None:
    """Tell those who follow this thread that its work goes on. Cheap; nothing happens where nobody follows."""
    for follower in getattr(_here, "followers", ()):
        follower()


@contextmanager
def followed(follower: Callable[[], None]) -> Iterator[None]:
    """Call `follower` at each `moved` of this thread while the block runs."""
    before: tuple[Callable[[], None], ...] = getattr(_here, "followers", ())
    _here.followers = (*before, follower)
    try:
        yield
    finally:
        _here.followers = before
