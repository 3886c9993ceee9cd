"""Says when a member of a consumer group can work no more: Kafka's client does not say so itself.

aiokafka keeps the group in a task of its own. When that task ends of an exception that it did not expect, the client
tells whoever fetches; Faust fetches only what is assigned, and the member waits for its assignment for ever. So:

1. *tasks*: a task of the client that has ended, or a thread of it, stops the stage.
2. *group*: a member that has no assignment for `GROUP_MAX_S` after its start, or after a partition was taken from it,
   stops the stage, whatever the reason. An assignment of no partition is one: there may be more members than work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from headrace.contract.errors import HeadraceError, Unavailable
from headrace.process.awake import awake_s

GROUP_MAX_S = 120.0
"""A group forms within 40 s, its session of 10 s and a request of 30 s, and a broker that restarts is back in 20 s:
twice their sum."""


class GroupWatch:
    """Watches one member."""

    def __init__(self, monotonic: Callable[[], float] = awake_s) -> None:
        self._monotonic = monotonic
        self._without_s: float | None = monotonic()
        """Since when it has no assignment; None while it has one."""

    @property
    def has_assignment(self) -> bool:
        """Say whether the member has one, be it of no partition."""
        return self._without_s is None

    def assigned(self) -> None:
        """Note that the group has an assignment for the member."""
        self._without_s = None

    def revoked(self) -> None:
        """Note that the assignment was taken away."""
        self._without_s = self._monotonic()

    def look(self, thread: Any) -> None:
        """Raise `Unavailable` where the member cannot work; `thread` is Faust's thread with aiokafka's consumer."""
        for what, cause in _ended(thread):
            raise Unavailable(
                f"Kafka's client has stopped working: {what} has ended ({cause}). The stage stops; a new process makes "
                "a new client. If it repeats, see `headrace status` and the broker's log."
            ) from cause
        if self._without_s is not None and (waited_s := self._monotonic() - self._without_s) > GROUP_MAX_S:
            raise Unavailable(
                f"the consumer group gave this member no assignment in {waited_s:.0f} s, {GROUP_MAX_S:.0f} s are "
                "allowed. The stage stops; a new process joins anew. `headrace status` shows the broker."
            )


def last_words(failure: BaseException, thread: Any, brokers: str, silent_s: float) -> str:
    """Return what a stage ended of, with its causes. What a dead client raises, "Event loop is closed", hides its own.

    Args:
        thread: Faust's thread with aiokafka's consumer; None where none was made.
        silent_s: for how long the brokers have not answered another client of this stage.
    """
    said = _chain(failure)
    if thread is None or isinstance(failure, HeadraceError):
        return said
    ended = [f"{what} has ended ({_chain(cause) if cause else 'no cause is known'})" for what, cause in _ended(thread)]
    if (crash := thread.crash_reason) is not None:
        ended.insert(0, f"its consumer failed ({_chain(crash)})")
    if not ended:
        return said
    return (
        f"Kafka's client has stopped working: {'; '.join(ended)}. The brokers {brokers} last answered this stage "
        f"{silent_s:.0f} s ago. A call of the stage failed then: {said}. The stage stops; a new process makes a "
        "new client."
    )


def _chain(error: BaseException) -> str:
    """Return an exception and what it came of, the first cause last."""
    words, seen = list[str](), set[int]()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        words.append(f"{type(each).__name__}: {each}")
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return ", which came of ".join(words)


def _ended(thread: Any) -> Iterator[tuple[str, BaseException | None]]:
    """Yield what of the client has ended, and of what. Nothing ends while the stage works."""
    worker, consumer = thread._thread, thread._consumer
    if worker is not None and worker.is_stopped.is_set():
        yield "its thread", None
    if consumer is None:
        return
    coordinator, fetcher = consumer._coordinator, consumer._fetcher
    tasks = {
        "its group coordination": None if coordinator is None else coordinator._coordination_task,
        "its fetcher": None if fetcher is None else fetcher._fetch_task,
        "its look at the cluster": consumer._client._sync_task,
    }
    for what, task in tasks.items():
        if task is not None and task.done():
            yield what, None if task.cancelled() else task.exception()
