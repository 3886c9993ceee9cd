"""The JSON of an answer, and of what is wrong."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response


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
