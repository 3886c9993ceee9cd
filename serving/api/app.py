"""Serving's HTTP application: POST /v1/rank, GET /v1/model, /healthz, /readyz, /metrics."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headrace.contract.checks.unknown_fields import UnknownFields
from headrace.contract.config import ServeConfig
from headrace.contract.crawl import external_columns
from headrace.contract.errors import BadRequest, EventRejected, Overloaded, Unavailable, meant
from headrace.contract.formats.json_record import decode_json
from headrace.contract.formats.snapshot import served_digest
from headrace.contract.interfaces.clock import Clock
from headrace.contract.metrics import Metrics
from headrace.contract.privacy import Privacy
from headrace.contract.project import Project
from headrace.process.request_body import Bodies, BodyBounds
from headrace.serving.features import FeatureMemory, State
from headrace.serving.model.scorer import merge, rank, recipe_of, spec_of, unknown_fields
from headrace.serving.model.shared_region import SharedModel, Told, View

logger = logging.getLogger("headrace.serve")

READING = "the counters are still being read from `features`; ask again when /readyz says so."
BEHIND = (
    "the counters are more than {} ms (serve.counters_behind_ms) behind the end of `features`: give serving more "
    "processors, or fewer workers."
)
_NEXT = {
    "bad_type": "send a value of the declared type, or null",
    "unknown_field": "leave the field out, or declare it in the project",
}
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
SAID = ("unread", "stale")
"""States of the counters that every answer names."""
WARNINGS_MAX = 10
"""Warnings of one answer; one a field, where it stands first."""
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class RankRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /v1/rank: raw fields as declared; a candidate's field wins over the context's."""

    request_id: Text
    candidates: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]
    context: dict[str, Any] = {}
    log: bool = False
    """True: serving logs one impression for each candidate. False: the service does, which knows what was shown."""


class Impressions(Protocol):
    """What `serving.impression_log.ImpressionLog` does."""

    def log(
        self,
        *,
        request_id: str,
        version: str,
        context: dict[str, Any],
        candidates: Sequence[dict[str, Any]],
        served: Sequence[dict[str, Any]],
        event_time_ms: int,
    ) -> None:
        """Log one impression for each candidate."""


@dataclass(frozen=True, kw_only=True)
class ServingDependencies:
    """What the application needs of the process around it."""

    project: Project
    config: ServeConfig
    shared: SharedModel
    features: FeatureMemory
    metrics: Metrics
    metrics_text: Callable[[], bytes]
    clock: Clock
    impressions: Impressions
    privacy: Privacy | None = None


class ServingApp:
    """The answers to each route."""

    def __init__(self, dependencies: ServingDependencies) -> None:
        self.deps, self._bodies = dependencies, Bodies(BODIES)
        self._unknown = UnknownFields(dependencies.project.impression.fields)

    async def rank(self, request: Request) -> Response:
        """Score all candidates of a request with exactly one version of the model."""
        started = time.perf_counter()
        response = await self._rank(request)
        self.deps.metrics.add("requests_total", status=str(response.status_code))
        self.deps.metrics.observe("request_seconds", time.perf_counter() - started)
        return response

    async def _rank(self, request: Request) -> Response:
        try:
            sent = await self._bodies.read(request)
            ask: RankRequest = decode_json(sent, RankRequest)
            count, most = len(ask.candidates), self.deps.config.candidates_max
            if count > most:
                return problem(422, f"{count} candidates", f"send at most {most} in one request")
            raw = merge(self.deps.project, ask.context, ask.candidates, self.deps.privacy)
            warnings = self._warnings(ask)

            now_ms = self.deps.clock.now_ms()
            external = external_columns(self.deps.project.crawls)

            counters = self._counters()

            def use(view: View) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
                spec = spec_of(view.meta.spec_json)
                if counters == "reading" and (spec.counters or external):
                    raise Unavailable(READING)
                served = self.deps.features.columns(spec, raw, count)
                return rank(view, raw, served, event_time_ms=now_ms, external=external), served

            (by_task, served), meta = self.deps.shared.read(use)
            version = meta.manifest.version
            if counters == "unread":
                # Zeros that nobody counted would be learnt for ever: without them the join takes its own counters.
                served = [{} for _ in range(count)]
            if ask.log:
                self.deps.impressions.log(
                    request_id=ask.request_id,
                    version=version,
                    context=ask.context,
                    candidates=ask.candidates,
                    served=served,
                    event_time_ms=now_ms,
                )
        except BadRequest as error:
            return problem(error.status, error.error, error.step)
        except msgspec.ValidationError as error:
            return problem(422, f"{error}{_meant(str(error))}", "see POST /v1/rank in docs/serving.md")
        except msgspec.DecodeError as error:
            return problem(400, f"no JSON: {error}", "send application/json")
        except EventRejected as error:
            return problem(422, str(error), f"{error.reason}: {_NEXT.get(error.reason, 'correct the field')}")
        except (Unavailable, Overloaded) as error:
            return problem(503, str(error), "ask again in a second")
        scores = by_task.pop(recipe_of(meta.recipe_json).task)
        body: dict[str, Any] = {"request_id": ask.request_id, "version": version, "scores": scores, "served": served}
        # The other tasks of a recipe that has several; of one, the answer is what it always was.
        body |= {"tasks": by_task} if by_task else {}
        body |= {"counters": counters} if counters in SAID else {}
        return answer(200, body | ({"warnings": warnings} if warnings else {}))

    def _warnings(self, ask: RankRequest) -> list[str]:
        """Return what an answer says of fields that the project does not declare; count them, and log each once."""
        warnings: list[str] = []
        for where, name in unknown_fields(self.deps.project, ask.context, ask.candidates).items():
            if said := self._unknown.new(name):
                logger.warning("field of a request: %s No score reads it.", said)
            self.deps.metrics.add("unknown_fields_total", type="impression", field=self._unknown.label(name))
            if len(warnings) < WARNINGS_MAX:
                warnings.append(f"{where} is not declared, and no score reads it.{self._unknown.meant(name)}")
        return warnings

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
        """Return why requests cannot be answered well yet; empty when they can."""
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
        return self.deps.features.state(self.deps.clock.monotonic(), self.deps.config.counters_behind_ms / 1_000)

    async def readyz(self, request: Request) -> Response:
        """200 when a model is loaded that has room to grow, and the counters are read, as far as a broker answers."""
        reason, counters = self.not_ready(), self._counters()
        ready = f"ready, with counters that are {counters}: no broker answers\n" if counters in SAID else "ready\n"
        return Response(reason or ready, 503 if reason else 200, media_type="text/plain")

    async def healthz(self, request: Request) -> Response:
        """200 while the process answers."""
        return Response("ok\n", media_type="text/plain")

    async def metrics_page(self, request: Request) -> Response:
        """Prometheus' text format."""
        return Response(self.deps.metrics_text(), media_type="text/plain; version=0.0.4")


def make_app(app: ServingApp) -> Starlette:
    """Return the ASGI application."""
    return Starlette(
        routes=[
            Route("/v1/rank", app.rank, methods=["POST"]),
            Route("/v1/model", app.model),
            Route("/healthz", app.healthz),
            Route("/readyz", app.readyz),
            Route("/metrics", app.metrics_page),
        ]
    )


def _meant(said: str) -> str:
    """Return what a misspelt field of the request itself may mean, of a decoder's message.

    >>> _meant("Object contains unknown field `candidate`"), _meant("Expected `str`")
    (". Did you mean 'candidates'?", '')
    """
    found = re.search(r"unknown field `(.*)`", said)
    near = meant(found[1], RankRequest.__struct_fields__) if found else ""
    return f".{near}" if near else ""


def answer(status: int, body: dict[str, Any]) -> Response:
    """Return `body` as JSON."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def problem(status: int, error: str, step: str) -> Response:
    """Return what is wrong and the next step."""
    response = answer(status, {"error": error, "next": step})
    if status == 503:
        response.headers["Retry-After"] = "1"
    if status in (408, 413):
        response.headers["Connection"] = "close"
    return response
