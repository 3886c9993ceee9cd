"""Goal: whatever a background thread or task dies of reaches its stage. Method: let them die."""

from __future__ import annotations

import asyncio

import pytest

from headrace.process.background import Background


def test_a_thread_tells_what_it_died_of_and_the_first_failure_counts() -> None:
    told: list[str] = []
    background = Background(lambda: told.append("failed"))
    background.check()

    def dies(error: BaseException) -> None:
        raise error

    background.thread("good", lambda: None).join()
    background.check()
    for error in (SystemExit(3), MemoryError("later")):
        background.thread("bad", lambda error=error: dies(error)).join()  # type: ignore[misc]
    with pytest.raises(SystemExit):
        background.check()
    assert told == ["failed", "failed"]


def test_a_task_tells_what_it_died_of_and_cancelling_it_is_no_failure() -> None:
    async def run() -> None:
        background = Background()

        async def dies() -> None:
            raise MemoryError

        waiting = background.task("waits", asyncio.sleep(3_600))
        await background.task("dies", dies())
        with pytest.raises(MemoryError):
            background.check()
        background.failure = None
        waiting.cancel()
        await asyncio.wait([waiting])
        background.check()

    asyncio.run(run())
