"""Serving's HTTP application: POST /v1/rank, GET /v1/model, /healthz, /readyz, /metrics."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headrace.contract.errors import BadRequest, Unavailable
from headrace.contract.formats.snapshot import served_digest
from headrace.process.request_body import Bodies, BodyBounds
from headrace.serving.api.answers import REFUSED, answer, check_json, problem, refusal_of, refused
from headrace.serving.api.dependencies import ServingDependencies
from headrace.serving.api.open_inference.over_http import OpenInferenceHttp
from headrace.serving.api.openapi import page
from headrace.serving.api.paths import handlers
from headrace.serving.api.rank import READING, SAID, Ranker, RankRequest, timeout_ms_of
from headrace.serving.api.turns import Turns
from headrace.serving.features import State
from headrace.serving.model.shared_region import Told

BEHIND = (
    "the counters are more than {} ms (serve.counters_behind_ms) behind the end of `features`: give serving more "
    "processors, or fewer workers."
)
RELEASE = importlib.metadata.version("headrace")
DRAINING = "this process was told to end: ask another one."
BODIES = BodyBounds(
    bytes_max=4_194_304,
    together_max=64 * 4_194_304,
    discard_max=16_777_216,
    # 4 MiB at 210 kB/s.
    seconds=20.0,
    if_large="send fewer candidates",
    if_slow="send it at once, or smaller",
    if_many="ask again in a second",
)


class ServingApp:
    """The answers to each route."""

    def __init__(self, dependencies: ServingDependencies) -> None:
        self.deps, self._bodies, self.ranker = dependencies, Bodies(BODIES), Ranker(dependencies)
        self.turns = Turns(dependencies.config.queue_ms / 1_000, dependencies.clock.monotonic, dependencies.metrics)
        self._page: bytes | None = None
        self.is_draining = False
        """True: the process was told to end, and answers for `serve.drain_ms` more."""

    async def rank(self, request: Request) -> Response:
        """Score all candidates of a request with exactly one version of the model."""

        def known(error: Exception) -> BadRequest:
            return refusal_of(error, RankRequest.__struct_fields__)

        return await self.answered(
            request, check=check_json, left_ms=timeout_ms_of, work=self.ranker.respond, known=known
        )

    async def answered(
        self,
        request: Request,
        *,
        check: Callable[[Request], None],
        left_ms: Callable[[bytes], float | None],
        work: Callable[[bytes], Response],
        known: Callable[[Exception], BadRequest],
    ) -> Response:
        """Read a body, wait for its turn, and return what `work` makes of it.

        Args:
            check: raises `BadRequest` where the head alone says that the body is of no use.
            left_ms: how long the client of a body waits, None where it does not say so.
            known: what one of `REFUSED` says to this kind of client.
        """
        began_s = self.deps.clock.monotonic()
        try:
            check(request)
            sent = await self._bodies.read(request)
            left = left_ms(sent)
            until_s = math.inf if left is None else began_s + left / 1_000
            async with self.turns.turn(len(sent), since_s=began_s, until_s=until_s):
                response = work(sent)
        except REFUSED as error:
            found = known(error)
            self.deps.metrics.add("requests_refused_total", reason=found.reason)
            response = refused(found)
        self.deps.metrics.add("requests_total", status=str(response.status_code))
        self.deps.metrics.observe("request_seconds", self.deps.clock.monotonic() - began_s)
        return response

    async def model(self, request: Request) -> Response:
        """Say which version is served; with ?version=X, which events a recent version knew."""
        asked = request.query_params.get("version")
        try:
            meta = self.deps.shared.meta()
        except Unavailable as error:
            return problem(503, str(error), "ask again in a second")
        if asked is not None:
            known = self.deps.shared.known_by(asked)
            if known is None:
                return problem(404, f"version {asked!r} is not among the last 2,000", "ask for a newer one")
            told = {"positions": known.positions, "stored_left": known.stored_left, "live": known.live}
            return answer(200, {"version": asked, **told})
        manifest = meta.manifest
        return answer(
            200,
            {
                "model": manifest.model,
                "version": manifest.version,
                "run": manifest.run,
                "step": manifest.step,
                "positions": manifest.positions,
                "stored_left": manifest.stored_left,
                "live": manifest.live,
                "generation": manifest.generation,
                "age_seconds": max(0, self.deps.clock.now_ms() - manifest.created_ms) / 1000,
                "snapshot": meta.snapshot,
                "spec": manifest.spec,
                "digest": manifest.digest,
                "format": manifest.format,
                "rows": manifest.rows,
                "chain": manifest.chain or manifest.version,
                "seq": manifest.seq,
                "served_digest": served_digest(meta.held.text, meta.dense_sha256) if meta.held is not None else "",
                "room": {"rows_max": self.deps.shared.rows_max, "row_values": 1 + self.deps.shared.dim},
                "refused": self.deps.shared.refused(),
                "counters": self._counters(),
                "workers": [
                    {"worker": t.worker, "features_offset": t.offset, "behind_seconds": self.behind_ms(t) / 1_000}
                    for t in self.deps.shared.told()
                ],
            },
        )

    def not_ready(self) -> str:
        """Return why requests cannot be answered well; empty when they can."""
        if self.is_draining:
            return DRAINING
        try:
            meta = self.deps.shared.meta()
        except Unavailable as error:
            return str(error)
        if self.deps.shared.is_full:
            return f"the model has outgrown its room; {meta.manifest.version} stays. {self.deps.shared.refused()}"
        counters = self._counters()
        if counters == "reading":
            return READING
        bound_ms = self.deps.config.counters_behind_ms
        if counters == "behind":
            return BEHIND.format(bound_ms)
        late = [str(told.worker) for told in self.deps.shared.told() if self.behind_ms(told) > bound_ms]
        # One port: whoever asks cannot choose the worker. While no broker answers, all are behind alike, and say so.
        is_away = self.deps.features.away_since_s is not None
        return f"worker {', '.join(late)}: {BEHIND.format(bound_ms)}" if late and not is_away else ""

    def is_reading(self) -> bool:
        """Say whether what there was at the beginning is still being read: the counters, and a model where a region was
        begun anew, as for wider rows."""
        return self._counters() == "reading" or not self.deps.shared.holds_model

    def behind_ms(self, told: Told) -> int:
        """Return how far behind the counters of a process are, by what it told; one that is silent falls behind too."""
        return round(self.deps.clock.monotonic() * 1_000) - told.current_ms

    def tell(self) -> None:
        """Tell the other processes how far the counters of this one are. Call it twice a second or so."""
        memory, now_ms = self.deps.features, round(self.deps.clock.monotonic() * 1_000)
        current_ms = round(memory.current_s * 1_000) if memory.is_caught_up else 0
        self.deps.shared.tell(offset=memory.offset, current_ms=current_ms, now_ms=now_ms)

    def measure_workers(self) -> None:
        """Set the metrics of how far the counters of each process are."""
        for told in self.deps.shared.told():
            worker = str(told.worker)
            self.deps.metrics.set("features_offset", told.offset, worker=worker)
            self.deps.metrics.set("counters_behind_seconds", self.behind_ms(told) / 1_000, worker=worker)

    def _counters(self) -> State:
        return self.deps.counters()

    async def readyz(self, request: Request) -> Response:
        """200 when a model is loaded that has room to grow, and the counters are read, as far as a broker answers."""
        reason, counters = self.not_ready(), self._counters()
        ready = f"ready, with counters that are {counters}: no broker answers\n" if counters in SAID else "ready\n"
        return Response(reason or ready, 503 if reason else 200, media_type="text/plain")

    async def healthz(self, request: Request) -> Response:
        """200 while the process answers."""
        return Response("ok\n", media_type="text/plain")

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI page of this project's routes."""
        if self._page is None:
            self._page = msgspec.json.encode(page(self.deps.project, self.deps.config, RELEASE))
        return Response(self._page, media_type="application/json")

    async def metrics_page(self, request: Request) -> Response:
        """Prometheus' text format."""
        return Response(self.deps.metrics_text(), media_type="text/plain; version=0.0.4")


def make_app(app: ServingApp) -> Starlette:
    """Return the ASGI application."""
    routes = [
        Route("/v1/rank", app.rank, methods=["POST"]),
        Route("/v1/model", app.model),
        Route("/healthz", app.healthz),
        Route("/readyz", app.readyz),
        Route("/metrics", app.metrics_page),
        Route("/openapi.json", app.openapi),
        *OpenInferenceHttp(app, RELEASE).routes(),
    ]
    return Starlette(routes=routes, exception_handlers=handlers(routes, app.deps.metrics))
