"""The HTTP collector: events of apps and browsers, in the gateway's own loop, with the forward port's guarantee.

The way of a request, in the words that the tests use:

1. *admit*: origin, token and bounds; while the gateway holds too much, or drains, the answer is 503 with Retry-After
   and nothing is taken.
2. *read*: the body, bounded in bytes and time, becomes one message a tag; where one event has not the form, none is
   taken.
3. *offer*: the messages join the gateway's batches, with the idempotency key as their chunk id.
4. *answer*: 200 when Kafka has all of it, dead letters included, with what became of the events.

A crash, or a client that leaves, anywhere before 4 means that the client sends again: the gateway, else the stream,
drops what was appended before, by the key or the events' own ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headrace.contract.config import IngestConfig
from headrace.contract.errors import BadRequest, InvariantBroken
from headrace.contract.interfaces.clock import Clock
from headrace.contract.metrics import Metrics
from headrace.ingest.decode.message import Message
from headrace.ingest.gateway.admission import BEYOND_CEILING, Admission
from headrace.ingest.gateway.batcher import Outcome
from headrace.ingest.gateway.chunk_identity import Peer, peer_of
from headrace.ingest.http.access import Origins, Tokens, is_loopback
from headrace.ingest.http.body import messages_of, read_events
from headrace.ingest.http.forwarded import Proxies
from headrace.ingest.http.page import page_routes
from headrace.ingest.http.uvicorn_server import CollectorConfig, listen, serve
from headrace.ingest.tls_identity import TlsIdentity
from headrace.process.awake import awake_timeout
from headrace.process.http_bounds import ConnectionBounds
from headrace.process.open_files import connections_within
from headrace.process.request_body import Bodies, BodyBounds

log = logging.getLogger("headrace.ingest")

LOOPBACK = "127.0.0.1"
KEY_CHARS_MAX = 255
_BODY_S = 30.0
"""Longest time for one body: 1 MiB at 35 kB/s."""
_ANSWER_S = 25.0
"""Longest wait for Kafka; below the 30 s after which proxies and clients give up."""
_LAST_S = 0.8
"""Longest wait of a request that was begun when the gateway stops; then the client is told to send again."""
_DISCARD_BYTES_MAX = 16_777_216
"""Most bytes of a body too large that are read, so that its client sees the answer; then the connection closes."""
_HEADERS = "authorization, content-type, content-encoding, idempotency-key"


class CollectorEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a gateway listens for HTTP, and the tokens that it asks for."""

    host: str = LOOPBACK
    port: int = 8088
    tokens: tuple[str, ...] = ()
    """None: nobody is asked, and only this machine may come."""
    share_port: bool = False
    """Several gateway processes on one port (SO_REUSEPORT)."""

    def __repr__(self) -> str:
        """Say everything but the tokens."""
        return f"CollectorEndpoint({self.host}:{self.port}, {len(self.tokens)} tokens)"


class _Answer:
    """What one request still waits for, and the sum of what has come."""

    def __init__(self, messages: int) -> None:
        self.open = messages
        self.outcome = Outcome(0, 0, 0)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def acked(self, one: Outcome) -> None:
        """Add a message's outcome; the last one ends the wait."""
        sums = (a + b for a, b in zip(msgspec.structs.astuple(self.outcome), msgspec.structs.astuple(one), strict=True))
        self.outcome = Outcome(*sums)
        self.open -= 1
        if self.open <= 0 and not self.done.done():
            self.done.set_result(None)


class Collector:
    """A companion of the gateway's loop."""

    def __init__(
        self,
        config: IngestConfig,
        endpoint: CollectorEndpoint,
        metrics: Metrics,
        clock: Clock,
        identity: TlsIdentity | None = None,
    ) -> None:
        self._config, self._endpoint, self._identity = config, endpoint, identity
        self._metrics, self._clock = metrics, clock
        self._tokens, self._origins = Tokens(endpoint.tokens), Origins(config.cors_origins)
        self._proxies = Proxies(config.trusted_proxies, config.forwarded_header)
        self._bodies = Bodies(bounds_of(config))
        self._requests = 0
        self._stopping = asyncio.Event()
        self._gateway: Admission | None = None
        self.port = 0
        """The bound port, once it runs."""

    async def run(self, admission: Admission, stopping: asyncio.Event) -> None:
        """Serve until `stopping`, then answer what has begun. Raises `ConfigRejected` where the port is taken."""
        self._gateway, self._stopping = admission, stopping
        host = self._endpoint.host
        if not self._tokens and not is_loopback(host):
            log.warning("no HEADRACE_TOKENS: the collector listens on %s, not %s; set one to open it", LOOPBACK, host)
            host = LOOPBACK
        listener = listen(host, self._endpoint.port, share_port=self._endpoint.share_port)
        self.port = listener.getsockname()[1]
        most = connections_within(self._config.collector_connections_max)
        asks = "asks for a token" if self._tokens else "open to all of this machine (no HEADRACE_TOKENS)"
        scheme = "http" if self._identity is None else "https"
        log.info("collector on %s://%s:%d/, %s", scheme, host, self.port, asks)
        bounds = ConnectionBounds(most, admission.refuse, lambda client: peer_of(client).origin)
        config = CollectorConfig(self.app(), bounds, self._identity, self._config.handshake_ms)
        await serve(config, listener, stopping)

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/v1/events", self.events, methods=["POST"]),
            Route("/v1/events", self.preflight, methods=["OPTIONS"]),
            *page_routes(),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _nothing_here})

    async def preflight(self, request: Request) -> Response:
        """Answer a browser's preflight request, before it sends from another origin."""
        if not self._known_origin(request):
            return self._counted(request, problem(403, _FOREIGN, _ALLOW))
        headers = {
            "Access-Control-Allow-Methods": "POST",
            "Access-Control-Allow-Headers": _HEADERS,
            # 2 hours: the most that Chromium takes.
            "Access-Control-Max-Age": "7200",
            "Allow": "POST, OPTIONS",
        }
        if request.headers.get("access-control-request-private-network") == "true":
            headers["Access-Control-Allow-Private-Network"] = "true"
        return self._cors(request, Response(status_code=204, headers=headers))

    async def events(self, request: Request) -> Response:
        """Take events; answer when Kafka has them."""
        started = self._clock.monotonic()
        self._requests += 1
        self._metrics.set("requests_open", self._requests)
        try:
            response = await self._events(request)
        except BadRequest as error:
            response = problem(error.status, error.error, error.step)
        except Exception as error:
            # A fault of ours must cost one request. Without the message: it may quote an event.
            log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            response = problem(500, "the collector failed", "send it again; the gateway's log says why")
        finally:
            self._requests -= 1
            self._metrics.set("requests_open", self._requests)
        self._metrics.observe("request_seconds", self._clock.monotonic() - started)
        return self._cors(request, self._counted(request, response))

    async def _events(self, request: Request) -> Response:
        refusal = self._admit(request)
        if refusal is not None:
            return refusal
        key = request.headers.get("idempotency-key", "").strip()
        if len(key) > KEY_CHARS_MAX or not key.isprintable() or not key.isascii():
            raise BadRequest(400, f"Idempotency-Key is not {KEY_CHARS_MAX} or fewer ASCII characters", "send a UUID")
        messages = await self._read(request, key)
        # The body took its time: the gateway may have reached its bound, or its end, meanwhile.
        if refusal := self._busy():
            return refusal
        return await self._offer(messages, Peer(self._origin(request)))

    # -- 1. admit

    def _admit(self, request: Request) -> Response | None:
        if not self._known_origin(request):
            return problem(403, _FOREIGN, _ALLOW)
        if self._tokens:
            told = request.headers.get("authorization", "")
            if not self._tokens.accepts(told, request.query_params.get("token", "")):
                response = problem(401, "no known token", "send Authorization: Bearer TOKEN, or ?token= from a beacon")
                response.headers["WWW-Authenticate"] = 'Bearer realm="headrace"'
                return response
        return self._busy()

    def _known_origin(self, request: Request) -> bool:
        """A browser names the page's origin; other clients name none and are not asked."""
        origin = request.headers.get("origin")
        return origin is None or self._origins.accepts(origin, request.url.scheme, request.headers.get("host", ""))

    def _busy(self) -> Response | None:
        if self._stopping.is_set() or self._admission.is_draining():
            return problem(503, "the gateway stops", "send it again, another one takes over")
        if not self._admission.is_open():
            return problem(503, "the gateway holds all that it may until Kafka has it", "send it again")
        if self._requests > self._config.collector_requests_max:
            most = self._config.collector_requests_max
            return problem(503, f"{most} requests are open (ingest.collector_requests_max)", "send it again")
        return None

    # -- 2. read

    async def _read(self, request: Request, key: str) -> list[Message]:
        events = read_events(
            await self._bodies.read(request),
            request.headers.get("content-type", ""),
            request.headers.get("content-encoding", "").strip().lower(),
            self._config.collector_bytes_max,
        )
        return messages_of(events, key, self._admission.now_ms(), request.query_params.get("sent_at", ""))

    # -- 3. offer, 4. answer

    async def _offer(self, messages: Sequence[Message], peer: Peer) -> Response:
        # All or none: what was taken of a request that is sent again would count twice where it brings no ids.
        mapped = [(message.tag, self._admission.mapped(message)) for message in messages]
        parts = [(tag, part) for tag, one in mapped for part in one.messages]
        asked = [(tag, self._admission.refuses(part, peer.origin)) for tag, part in parts]
        if refused := [one for one in asked if one[1]]:
            return self._refused(refused)
        for tag, one in mapped:
            if one.skipped:
                self._metrics.add("lines_skipped_total", one.skipped, tag=tag)
        # One more than the messages: outcomes that come at once must not end the wait early.
        waiting = _Answer(len(parts) + 1)
        for _, part in parts:
            self._admission.offer(part, 0, peer, waiting.acked)
        waiting.acked(Outcome(0, 0, 0))
        stopping = asyncio.ensure_future(self._stopping.wait())
        either: set[asyncio.Future[Any]] = {waiting.done, stopping}
        try:
            with contextlib.suppress(TimeoutError):
                async with awake_timeout(_ANSWER_S):
                    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done.done() and stopping.done():
                await asyncio.wait({waiting.done}, timeout=_LAST_S)
        finally:
            stopping.cancel()
        if not waiting.done.done():
            return problem(503, "Kafka has not confirmed the events yet", _SAME)
        return answer(200, msgspec.structs.asdict(waiting.outcome))

    def _refused(self, refused: Sequence[tuple[str, str]]) -> Response:
        """Answer for the tags that the gateway refuses, each with its reason."""
        retry_s = max(1, self._config.dead_letter_probe_ms // 1000)
        if tags := list(dict.fromkeys(tag for tag, why in refused if why == BEYOND_CEILING)):
            error = f"too many events of {', '.join(tags[:3])} become dead letters (ingest.dead_letter_share_max)"
            step = f"see headrace dead-letters list, correct events or types; {_SAME}"
            return problem(503, error, step, retry_s=retry_s)
        late = ", ".join(list(dict.fromkeys(tag for tag, _ in refused))[:3])
        error = f"as many late events wait to be looked up as may, and those of {late} are late"
        return problem(503, error, _SAME, retry_s=retry_s)

    # -- answers

    def _counted(self, request: Request, response: Response) -> Response:
        status = response.status_code
        self._metrics.add("requests_total", status=str(status))
        if status >= 400:
            self._admission.refuse(
                self._origin(request), f"http_{status}", _WHY.get(status, "the request is not in order")
            )
        if status in (408, 413) or (status == 503 and self._stopping.is_set()):
            response.headers["Connection"] = "close"
        return response

    def _cors(self, request: Request, response: Response) -> Response:
        origin = request.headers.get("origin")
        response.headers["Vary"] = "Origin"
        if origin is not None and self._known_origin(request):
            response.headers["Access-Control-Allow-Origin"] = origin
            # A beacon is sent in credentials mode; without this a browser calls its answer an error.
            response.headers["Access-Control-Allow-Credentials"] = "true"
            response.headers["Access-Control-Expose-Headers"] = "Retry-After"
        return response

    def _origin(self, request: Request) -> str:
        peer = peer_of(request.scope.get("client")).origin
        return self._proxies.client(peer, request.headers.getlist(self._proxies.header))

    @property
    def _admission(self) -> Admission:
        if self._gateway is None:
            raise InvariantBroken("the collector answers only while it runs")
        return self._gateway


_FOREIGN, _ALLOW = "pages of this origin may not send", "name it in ingest.cors_origins"
_SAME = "send it again with the same Idempotency-Key or event ids: what Kafka has got counts once"
_SMALLER = "send smaller batches, or raise ingest.collector_bytes_max"
_WHY = {
    401: "no known token",
    403: "a page of an origin that ingest.cors_origins does not name",
    413: "more bytes or events than one request may have",
    415: "a content type or encoding that is not known",
    503: "it is told to send again: a bound or a ceiling is reached, Kafka is slow, or the gateway stops",
}


def bounds_of(config: IngestConfig) -> BodyBounds:
    """Return the bounds of the collector's bodies."""
    return BodyBounds(
        bytes_max=config.collector_bytes_max,
        together_max=max(config.collector_bytes_max, config.buffer_bytes_max // 4),
        discard_max=max(config.collector_bytes_max, _DISCARD_BYTES_MAX),
        seconds=_BODY_S,
        if_large=_SMALLER,
        if_slow="send smaller batches",
        if_many="send it again",
    )


def answer(status: int, body: dict[str, Any]) -> Response:
    """Return `body` as JSON, not to be cached."""
    return Response(msgspec.json.encode(body), status, {"Cache-Control": "no-store"}, media_type="application/json")


def problem(status: int, error: str, step: str, *, retry_s: int = 1) -> Response:
    """Return what is wrong and the next step; where the fault is not the client's, when to send again."""
    response = answer(status, {"error": error, "next": step})
    if status >= 500:
        response.headers["Retry-After"] = str(retry_s)
    return response


async def _nothing_here(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    step = "POST /v1/events takes events; GET / explains it"
    response = problem(status, "no such method here" if status == 405 else "nothing lies here", step)
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)
    return response
