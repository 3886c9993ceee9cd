"""Waits that something ends before their time: what is at rest costs next to nothing, and begins at once."""

from __future__ import annotations

import asyncio


async def woken(event: asyncio.Event, within_s: float) -> None:
    """Return when `event` is set, and after `within_s` at the latest. It stays as it is: whoever waits clears it."""
    if event.is_set():
        return
    waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(asyncio.sleep(within_s))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waits:
            each.cancel()
