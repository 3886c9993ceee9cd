"""What is answered where no route is: JSON that says what is wrong and the next step, as everywhere."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headrace.contract.errors import meant
from headrace.contract.metrics import Metrics
from headrace.serving.api.answers import problem

logger = logging.getLogger("headrace.serve")

_PATH_MAX = 100
"""Letters of a path that an answer repeats."""


def handlers(routes: Sequence[Route], metrics: Metrics) -> Mapping[Any, Callable[[Request, Any], Awaitable[Response]]]:
    """Return the handlers of an unknown path, of a wrong method, of OPTIONS, and of a failure."""
    paths = [route.path for route in routes]

    def count(status: int, reason: str = "") -> None:
        metrics.add("requests_total", status=str(status))
        if reason:
            metrics.add("requests_refused_total", reason=reason)

    async def no_path(request: Request, error: HTTPException) -> Response:
        count(404, "unknown_path")
        asked = request.url.path[:_PATH_MAX]
        near = meant(asked, paths) or " GET /openapi.json lists what there is."
        return problem(404, f"there is no {asked}.{near}", "see docs/rank-api.md")

    async def no_method(request: Request, error: HTTPException) -> Response:
        allow = ", ".join(sorted({*(error.headers or {}).get("Allow", "").split(", "), "OPTIONS"} - {""}))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": allow})
        count(405, "wrong_method")
        asked = request.url.path[:_PATH_MAX]
        response = problem(405, f"{request.method[:20]} {asked} is not there", f"use one of {allow}")
        response.headers["Allow"] = allow
        return response

    async def failed(request: Request, error: Exception) -> Response:
        count(500)
        logger.error("%s %s failed", request.method[:20], request.url.path[:_PATH_MAX], exc_info=error)
        return problem(500, "serving failed; its log says how", "report it, with the log")

    return {404: no_path, 405: no_method, Exception: failed}
