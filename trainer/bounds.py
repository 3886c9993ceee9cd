"""How long anything that a trainer does may stand still. What does not come back ends the process, by name.

Every call of the log, the store, the lake and the board is watched, in whatever thread it runs; so is what the training
thread does between two of them. Work that goes on is never cut off, however long it takes: a big checkpoint is stored
piece by piece and a lake read batch by batch, and each of these begins the time anew (`headrace.process.moved`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from headrace.contract.errors import Unavailable
from headrace.process.call_watch import LAKE_CALLS, LAKE_MAX_S

if TYPE_CHECKING:
    from headrace.trainer.dependencies import Dependencies

WORK_MAX_S = 1_800.0
"""Longest that the training thread may work without a call that comes back: the first step compiles for a minute, and
the state of 30 GB is copied and hashed in two."""
SILENT_MAX_S = 330.0
"""Longest that a broker which answers may send none of the recorded rows: Kafka's client gives up after 300 s."""
POLL_S = 0.2


class Stopped(Exception):
    """The process was asked to stop while it waited."""


def watched(deps: Dependencies) -> Dependencies:
    """Return the same dependencies with every call watched by `deps.calls`."""
    wrap, open_reader = deps.calls.wrap, deps.open_reader
    return dataclasses.replace(
        deps,
        reader=wrap("reader", deps.reader),
        open_reader=None if open_reader is None else lambda: wrap("reader", open_reader()),
        admin=wrap("admin", deps.admin),
        producer=wrap("producer", deps.producer),
        steps_writer=wrap("steps_writer", deps.steps_writer),
        blobs=wrap("blobs", deps.blobs),
        lake=wrap("lake", deps.lake, dict.fromkeys(LAKE_CALLS, LAKE_MAX_S)),
        board=wrap("board", deps.board),
    )


def wait(deps: Dependencies, seconds: float) -> None:
    """Wait, in whatever thread. Raises `Stopped` where the process was asked to stop before or meanwhile."""
    for wait_s in (seconds, 0.0):
        if deps.stop.is_set():
            raise Stopped
        if wait_s:
            deps.clock.sleep(wait_s)


def poll_until(has: Callable[[], bool], poll: Callable[[float], Mapping[int, int]], what: str) -> None:
    """Poll until `has`; `poll` waits that long at most and returns where reading stands.

    Raises what `poll` raises, and `Unavailable` where the log answers and sends nothing for `SILENT_MAX_S`.
    """
    stands_at: Mapping[int, int] = {}
    silent_s = 0.0
    while not has():
        before, stands_at = stands_at, poll(POLL_S)
        silent_s = 0.0 if stands_at != before else silent_s + POLL_S
        if silent_s > SILENT_MAX_S:
            raise Unavailable(
                f"{what} did not come in {silent_s:.0f} s, though the broker answers; reading stands at the offsets "
                f"{dict(stands_at)}. This process ends, and the next one reads anew. See whether an open transaction "
                "or a replica that is behind keeps them back: `headrace status`."
            )
