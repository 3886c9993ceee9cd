"""The client that awaits, on asyncio's streams. For one event loop."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from headrace.client.answer import Answer, answer_of
from headrace.client.attempts import PATH, Attempts, unreachable
from headrace.client.client import IDLE_S, KEPT_MAX, Address, Emits, Logs, request_of
from headrace.contract.interfaces.ranking import RankAnswer

HEAD_MAX = 65_536
"""Most bytes of an answer's status and headers, and of a chunk's."""
BODY_MAX = 67_108_864
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _NoHttp(Exception):
    """What answers does not speak HTTP/1.1, or ended in the middle."""


class _Unread(Exception):
    """A kept connection was closed before a byte of the answer: nobody has read the request."""


class AsyncClient(Logs):
    """As `Client`, with `await`; `shown` does not wait for the network."""

    def __init__(
        self,
        url: str,
        *,
        timeout_ms: float = 1_000.0,
        sender: Emits | None = None,
        label: str = "impression",
        headers: Mapping[str, str] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: Callable[[], float] = random.random,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        super().__init__(sender, label, now_ms)
        self._address, self._timeout_ms = Address(url), timeout_ms
        self._monotonic, self._sleep, self._chance = monotonic, sleep, chance
        self._tls = ssl.create_default_context() if self._address.is_tls else None
        told = {"Host": f"{self._address.host}:{self._address.port}", "Content-Type": "application/json"}
        lines = [f"{name}: {value}\r\n" for name, value in {**told, **(headers or {})}.items()]
        self._head = (f"POST {PATH} HTTP/1.1\r\n" + "".join(lines)).encode("latin-1")
        self._kept: list[tuple[Streams, float]] = []

    async def rank(
        self,
        context: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]],
        *,
        request_id: str | None = None,
        timeout_ms: float | None = None,
    ) -> Answer:
        """Return the scores of `candidates`; arguments and errors as `Client.rank`."""
        request = request_of(context, candidates, request_id)
        timeout_s = (self._timeout_ms if timeout_ms is None else timeout_ms) / 1_000
        attempts = Attempts(request, timeout_s, self._monotonic, self._chance)
        while True:
            try:
                async with asyncio.timeout(attempts.left_s()):
                    said = attempts.answer(*await self._post(attempts))
            except TimeoutError as error:
                raise attempts.too_late() from error
            except (OSError, _NoHttp) as error:
                said = attempts.pause_s(unreachable(self._address.url, error))
            if isinstance(said, RankAnswer):
                return answer_of(request, said)
            await self._sleep(said)

    async def close(self) -> None:
        """Let the kept connections go. The sender is its owner's to close."""
        while self._kept:
            self._kept.pop()[0][1].close()
        await asyncio.sleep(0)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _post(self, attempts: Attempts) -> tuple[int, bytes]:
        while self._kept:
            streams, since_s = self._kept.pop()
            if self._monotonic() - since_s >= IDLE_S or streams[0].at_eof():
                streams[1].close()
                continue
            try:
                return await self._once(streams, attempts)
            except _Unread:
                continue
        opened = await asyncio.open_connection(self._address.host, self._address.port, ssl=self._tls, limit=HEAD_MAX)
        try:
            return await self._once(opened, attempts)
        except _Unread as error:
            raise _NoHttp("it closed the connection without an answer") from error

    async def _once(self, streams: Streams, attempts: Attempts) -> tuple[int, bytes]:
        reader, writer = streams
        try:
            body = attempts.body()
            writer.write(b"%bContent-Length: %d\r\n\r\n%b" % (self._head, len(body), body))
            try:
                await writer.drain()
                status, headers = await _head(reader)
            except (ConnectionResetError, BrokenPipeError) as error:
                raise _Unread from error
            found = status, await _body(reader, headers)
        except BaseException:
            writer.close()
            raise
        if headers.get("connection", "").lower() != "close" and len(self._kept) < KEPT_MAX:
            self._kept.append((streams, self._monotonic()))
        else:
            writer.close()
        return found


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Return status and headers. Raises `_Unread` where nothing comes, `_NoHttp` where it is no answer."""
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, status = lines[0].split(" ", 2)[:2]
        if version != "HTTP/1.1" or len(status) != 3:
            raise _NoHttp(f"it answers {lines[0][:100]!r}")
        headers = (line.partition(":") for line in lines[1:] if line)
        return int(status), {name.strip().lower(): value.strip() for name, _, value in headers}
    except asyncio.IncompleteReadError as error:
        raise (_NoHttp("its answer ends in the middle") if error.partial else _Unread()) from error
    except (asyncio.LimitOverrunError, ValueError) as error:
        raise _NoHttp("its answer has no head that can be read") from error


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    try:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return await _chunks(reader)
        size = int(headers["content-length"])
        if not 0 <= size <= BODY_MAX:
            raise _NoHttp(f"its answer has {size} bytes")
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError as error:
        raise _NoHttp("its answer ends in the middle") from error
    except (asyncio.LimitOverrunError, KeyError, ValueError) as error:
        raise _NoHttp("its answer has no length that can be read") from error


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    parts, total = list[bytes](), 0
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        total += size
        if size < 0 or total > BODY_MAX:
            raise _NoHttp(f"its answer has {total} bytes and more")
        parts.append((await reader.readexactly(size + 2))[:-2])
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass
    return b"".join(parts)
