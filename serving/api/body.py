"""Reads the bodies of requests, bounded in bytes and time: what a client sends must cost the others nothing."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

BODY_BYTES_MAX = 4_194_304
BODIES_BYTES_MAX = 64 * BODY_BYTES_MAX
"""Most bytes of all bodies of a process that are being read."""
BODY_S = 20.0
"""Longest time for one body: 4 MiB at 210 kB/s."""


class BadRequest(Exception):
    """What is wrong with a request's body, and the next step."""

    def __init__(self, status: int, error: str, step: str) -> None:
        super().__init__(error)
        self.status, self.error, self.step = status, error, step


class Bodies:
    """The bodies that one process reads now."""

    def __init__(self) -> None:
        self._bytes = 0

    async def read(self, request: Request) -> bytes:
        """Return the request's body.

        Raises `BadRequest`: too large, not whole in time, not whole at all, or too much is being read now.
        """
        held, parts = 0, list[bytes]()
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    held += len(part)
                    self._bytes += len(part)
                    if held > BODY_BYTES_MAX:
                        raise BadRequest(413, f"more than {BODY_BYTES_MAX} bytes", "send fewer candidates")
                    if self._bytes > BODIES_BYTES_MAX:
                        raise BadRequest(
                            503, f"{BODIES_BYTES_MAX} bytes of bodies are read now", "ask again in a second"
                        )
                    parts.append(part)
        except TimeoutError as error:
            raise BadRequest(408, f"the body took more than {BODY_S:g} s", "send it at once, or smaller") from error
        except ClientDisconnect as error:
            raise BadRequest(400, "the body ended early", "send it again") from error
        finally:
            self._bytes -= held
        return b"".join(parts)
