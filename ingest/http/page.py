"""What the collector says about itself: a page for people, OpenAPI for programs, the snippet for browsers.

All three are files beside this one, read once; nothing is fetched from elsewhere.
"""

from __future__ import annotations

import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_SNIPPET_AGE_S = 3_600
"""How long browsers keep the snippet without asking again."""


def page_routes() -> list[Route]:
    """Return the routes."""
    page = _File("page.html", "text/html; charset=utf-8", 0)
    return [
        Route("/", page.get),
        Route("/docs", page.get),
        Route("/openapi.json", _File("openapi.json", "application/json", 0).get),
        Route("/v1/headrace.js", _File("headrace.js", "text/javascript; charset=utf-8", _SNIPPET_AGE_S).get),
    ]


class _File:
    """One file of this package, served from memory."""

    def __init__(self, name: str, media_type: str, age_s: int) -> None:
        self._data = resources.files("headrace.ingest.http").joinpath(name).read_bytes()
        self._media_type = media_type
        self._headers = {
            "ETag": f'"{hashlib.sha256(self._data).hexdigest()[:32]}"',
            "Cache-Control": f"public, max-age={age_s}" if age_s else "no-cache",
            "X-Content-Type-Options": "nosniff",
            # Readable from any page: there is nothing secret in it, and a snippet is of no use elsewhere.
            "Access-Control-Allow-Origin": "*",
            "Cross-Origin-Resource-Policy": "cross-origin",
        }
        if media_type.startswith("text/html"):
            self._headers["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'"

    async def get(self, request: Request) -> Response:
        """Answer with the file, or with 304 where the client has it."""
        if request.headers.get("if-none-match") == self._headers["ETag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._data, headers=self._headers, media_type=self._media_type)
