"""The JSON of an answer, and of what is wrong: each refusal has a status, what is wrong, the next step and a reason."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from headrace.contract.errors import BadRequest, EventRejected, Overloaded, Unavailable, meant
from headrace.contract.interfaces.ranking import Problem

REFUSED = (BadRequest, msgspec.DecodeError, EventRejected, Unavailable, Overloaded)
"""What a request that gets no answer raises; `refusal_of` makes one kind of it. A `ValidationError` is a
`DecodeError`."""
RETRY_MS = 1_000
"""After how long to ask again what is not there yet, or is full."""
_NEXT = {
    "bad_type": "send a value of the declared type, or null",
    "unknown_field": "leave the field out, or declare it in the project",
}
_REASONS = {
    408: "too_slow",
    413: "too_large",
    415: "content_type",
    422: "bad_field",
    503: "unavailable",
    504: "too_late",
}
_JSON = re.compile(r"application/([\w.-]+\+)?json|text/(json|plain)|application/x-www-form-urlencoded")
"""Types of a body that is read as JSON; the last two are what clients say that were told nothing (curl -d)."""


def answer(status: int, body: Any) -> Response:
    """Return `body`, a struct or what JSON knows, as JSON."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def problem(status: int, error: str, step: str, *, retry_ms: int = 0) -> Response:
    """Return what is wrong and the next step."""
    retry_ms = retry_ms or (RETRY_MS if status == 503 else 0)
    response = answer(status, Problem(error=error, next=step, retry_ms=retry_ms))
    if retry_ms:
        response.headers["Retry-After"] = str(math.ceil(retry_ms / 1_000))
    if status in (408, 413):
        response.headers["Connection"] = "close"
    return response


def refused(error: BadRequest) -> Response:
    """Return the answer to what is refused."""
    return problem(error.status, error.error, error.step, retry_ms=error.retry_ms)


def refusal_of(error: Exception, known: tuple[str, ...] = (), page: str = "POST /v1/rank") -> BadRequest:
    """Return as one kind what a request that gets no answer raised, one of `REFUSED`; its `reason` is never empty.

    Args:
        known: the fields of the request itself, of which one may be meant that is misspelt.
        page: the operation that is described in docs/rank-api.md.
    """
    found = _refusal(error, known, page)
    found.reason = found.reason or _REASONS.get(found.status, "bad_request")
    return found


def _refusal(error: Exception, known: tuple[str, ...], page: str) -> BadRequest:
    if isinstance(error, BadRequest):
        return error
    if isinstance(error, msgspec.ValidationError):
        return BadRequest(422, f"{error}{_meant(str(error), known)}", f"see {page} in docs/rank-api.md")
    if isinstance(error, msgspec.DecodeError):
        return BadRequest(400, f"no JSON: {error}", "send application/json", reason="bad_request")
    if isinstance(error, EventRejected):
        step = f"{error.reason}: {_NEXT.get(error.reason, 'correct the field')}"
        return BadRequest(422, str(error), step, reason="bad_field")
    return BadRequest(503, str(error), "ask again in a second", reason="unavailable", retry_ms=RETRY_MS)


def check_json(request: Request) -> None:
    """Raise `BadRequest` (415) where a body says that it is something else than JSON, or that it is compressed.

    A client that says nothing is taken at its body.
    """
    said = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if said and not _JSON.fullmatch(said):
        raise BadRequest(415, f"the body is {said[:100]!r}", "send application/json")
    check_plain(request)


def check_plain(request: Request) -> None:
    """Raise `BadRequest` (415) where a body says that it is compressed."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise BadRequest(415, f"the body is encoded as {coding[:100]!r}", "send it as it is, without Content-Encoding")


def _meant(said: str, known: tuple[str, ...]) -> str:
    """Return what a misspelt field of the request itself may mean, of a decoder's message.

    >>> _meant("Object contains unknown field `candidate`", ("candidates",)), _meant("Expected `str`", ())
    (". Did you mean 'candidates'?", '')
    """
    found = re.search(r"unknown field `(.*)`", said)
    near = meant(found[1], known) if found else ""
    return f".{near}" if near else ""
