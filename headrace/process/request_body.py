"""Reads the bodies of HTTP requests, for every door the same: what a client sends must cost the others nothing.

1. *declared*: a body that says it is larger than what would be read to its end is refused at once.
2. *kept*: up to `bytes_max` of one body, and up to `together_max` of all that are being read.
3. *discarded*: what is too large is read on and not kept, up to `discard_max`, so that its client sees the answer; then
   the answer comes although the body goes on, and the connection closes.
4. *in time*: a body that is not whole in `seconds` that the process was awake for is refused.

Whatever ends it, a refusal, a client that leaves, a task that is cancelled, what was kept of the body is given back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from headrace.contract.errors import BadRequest
from headrace.process.awake import awake_s, awake_timeout


@dataclass(frozen=True, kw_only=True)
class BodyBounds:
    """The bounds of one door, and what a client that meets them is told to do."""

    bytes_max: int
    """Most bytes of one body."""
    together_max: int
    """Most bytes that are kept of all bodies that are being read."""
    discard_max: int
    """Most bytes that are read of one body that is too large."""
    seconds: float
    """Longest time for one body."""
    if_large: str
    if_slow: str
    if_many: str


class Bodies:
    """The bodies that one process reads now. For one event loop."""

    def __init__(self, bounds: BodyBounds, monotonic: Callable[[], float] = awake_s) -> None:
        self.bounds, self._monotonic = bounds, monotonic
        self.held = 0
        """Bytes that are kept of all bodies that are being read."""

    async def read(self, request: Request) -> bytes:
        """Return the request's body.

        Raises `BadRequest`: 413 too large, 408 not whole in time, 400 not whole at all, 503 too much is being read now.
        """
        bounds = self.bounds
        declared = request.headers.get("content-length", "")
        # More digits than any body has: a number of a million digits takes seconds to read.
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > bounds.discard_max:
            raise self._too_large()
        try:
            async with awake_timeout(bounds.seconds, self._monotonic):
                return await self._whole(request)
        except TimeoutError as error:
            raise BadRequest(408, f"the body took more than {bounds.seconds:g} s", bounds.if_slow) from error
        except ClientDisconnect as error:
            raise BadRequest(400, "the body ended early", "send it again") from error

    async def _whole(self, request: Request) -> bytes:
        bounds, parts, kept, size = self.bounds, list[bytes](), 0, 0
        try:
            async for part in request.stream():
                size += len(part)
                if size > bounds.bytes_max:
                    self.held -= kept
                    kept, parts = 0, []
                    if size > bounds.discard_max:
                        break
                    continue
                if self.held + len(part) > bounds.together_max:
                    raise BadRequest(503, f"{bounds.together_max} bytes of bodies are being read", bounds.if_many)
                kept += len(part)
                self.held += len(part)
                parts.append(part)
        finally:
            self.held -= kept
        if size > bounds.bytes_max:
            raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> BadRequest:
        return BadRequest(413, f"the body is larger than {self.bounds.bytes_max} bytes", self.bounds.if_large)
