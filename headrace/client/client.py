"""The client that waits: any thread may call it, and connections are kept for the next request."""

from __future__ import annotations

import http.client
import random
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from headrace.client.answer import Answer, answer_of
from headrace.client.attempts import PATH, Attempts, unreachable
from headrace.contract.errors import BadRequest, ConfigRejected
from headrace.contract.interfaces.ranking import RankAnswer

IDLE_S = 10.0
"""A connection that idled for longer is not used again: serving closes it after 15 s."""
KEPT_MAX = 32
"""Most connections that are kept while they idle."""


class Emits(Protocol):
    """What `headrace.sender.Sender` does."""

    def emit(self, label: str | None, data: dict[str, Any]) -> bool:
        """Keep one event until the gateway has it."""


class Address:
    """Where serving is. Raises `ConfigRejected` for what is no address of it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ConfigRejected(f"{url!r} is no address of serving: write http://HOST:PORT, or https.")
        self.url, self.host, self.is_tls = url, parts.hostname, parts.scheme == "https"
        self.port = parts.port or (443 if self.is_tls else 80)


class Logs:
    """What both clients know of impressions."""

    def __init__(self, sender: Emits | None, label: str, now_ms: Callable[[], int]) -> None:
        self._sender, self._label, self._now_ms = sender, label, now_ms

    def shown(self, answer: Answer, places: Iterable[int], **fields: Any) -> None:
        """Log an impression for each candidate that was shown, by its place in the request, in any order.

        What serving used to score it travels with it, so that exactly this is learnt. Calling it twice counts once.

        Args:
            fields: further fields of the impression, of all of them, such as where on the page they were.

        Raises `IndexError` for a place that no candidate has, and what `Sender.emit` raises.
        """
        if self._sender is None:
            raise ConfigRejected("this client has no sender: make it with Client(url, sender=Sender(...)).")
        for record in list(answer.impressions(places, self._now_ms())):
            self._sender.emit(self._label, {**record, **fields})


def request_of(
    context: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], request_id: str | None
) -> dict[str, Any]:
    """Return the body of a request; an id is made where none is given. Raises `BadRequest` without candidates."""
    if not candidates:
        raise BadRequest(422, "there are no candidates", "rank one at least")
    return {"request_id": request_id or uuid.uuid4().hex, "context": context, "candidates": candidates}


class Client(Logs):
    """Asks one serving, or what stands before several of them.

    Args:
        url: such as http://127.0.0.1:8080.
        timeout_ms: longest time for one `rank`, attempts and pauses included, where the call says no other.
        sender: logs what was `shown`.
        label: the impression's tag behind the sender's prefix.
        headers: of each request, such as a proxy's token.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_ms: float = 1_000.0,
        sender: Emits | None = None,
        label: str = "impression",
        headers: Mapping[str, str] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        super().__init__(sender, label, now_ms)
        self._address, self._timeout_ms = Address(url), timeout_ms
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._monotonic, self._sleep, self._chance = monotonic, sleep, chance
        self._kept: list[tuple[http.client.HTTPConnection, float]] = []

    def rank(
        self,
        context: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]],
        *,
        request_id: str | None = None,
        timeout_ms: float | None = None,
    ) -> Answer:
        """Return the scores of `candidates`, raw fields as the project declares them.

        Args:
            context: fields that all candidates share; a candidate's own wins.
            request_id: what feedback names later, once a request; None makes one.

        Raises:
            BadRequest: the request is wrong; it says what and what to do.
            TooLate: there was no answer in time.
            Overloaded, Unavailable: serving is full or away, and no time is left for another attempt.
        """
        request = request_of(context, candidates, request_id)
        timeout_s = (self._timeout_ms if timeout_ms is None else timeout_ms) / 1_000
        attempts = Attempts(request, timeout_s, self._monotonic, self._chance)
        while True:
            try:
                said = attempts.answer(*self._post(attempts))
            except TimeoutError as error:
                raise attempts.too_late() from error
            except (OSError, http.client.HTTPException) as error:
                said = attempts.pause_s(unreachable(self._address.url, error))
            if isinstance(said, RankAnswer):
                return answer_of(request, said)
            self._sleep(said)

    def close(self) -> None:
        """Let the kept connections go. The sender is its owner's to close."""
        while self._kept:
            self._kept.pop()[0].close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _post(self, attempts: Attempts) -> tuple[int, bytes]:
        """Send one attempt; on a new connection where a kept one was closed meanwhile, which nobody has read."""
        while (kept := self._take()) is not None:
            try:
                return self._once(kept, attempts)
            except (ConnectionResetError, BrokenPipeError, http.client.CannotSendRequest):
                continue  # `RemoteDisconnected` is a `ConnectionResetError`.
        kind = http.client.HTTPSConnection if self._address.is_tls else http.client.HTTPConnection
        return self._once(kind(self._address.host, self._address.port), attempts)

    def _take(self) -> http.client.HTTPConnection | None:
        while self._kept:
            try:
                connection, since_s = self._kept.pop()
            except IndexError:  # Another thread took it.
                break
            if self._monotonic() - since_s < IDLE_S:
                return connection
            connection.close()
        return None

    def _once(self, connection: http.client.HTTPConnection, attempts: Attempts) -> tuple[int, bytes]:
        try:
            connection.timeout = attempts.left_s()
            if connection.sock is not None:
                connection.sock.settimeout(connection.timeout)
            connection.request("POST", PATH, attempts.body(), self._headers)
            response = connection.getresponse()
            found = response.status, response.read()
        except BaseException:
            # What a later answer on this connection belongs to, nobody would know.
            connection.close()
            raise
        if connection.sock is not None and len(self._kept) < KEPT_MAX:
            self._kept.append((connection, self._monotonic()))
        else:
            connection.close()
        return found
