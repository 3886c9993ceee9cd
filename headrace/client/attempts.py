"""When a request is sent again, and when it is given up. Pure: time and chance come in as parameters.

1. Every attempt tells serving how much of the request's time is left, so that nothing is computed for nobody.
2. After 429, 503, a connection that is refused or that breaks, the request is sent again: ranking twice does no harm.
3. Before that comes a pause that doubles each time, from `FIRST_S` to `LONGEST_S`, times 0.5 to 1.5 by chance, so that
   clients do not come back together; after 429 no shorter one than serving asks for.
4. A pause that does not fit into the time that is left ends it at once, with the reason of the last attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from headrace.contract.errors import BadRequest, HeadraceError, Overloaded, Unavailable
from headrace.contract.interfaces.ranking import Problem, RankAnswer

FIRST_S, LONGEST_S = 0.02, 1.0
PATH = "/v1/rank"


class TooLate(Unavailable):
    """The request's time is over, here or at serving, and there is no answer; show what needs none."""


class Attempts:
    """The attempts of one request."""

    def __init__(
        self, request: Mapping[str, Any], timeout_s: float, monotonic: Callable[[], float], chance: Callable[[], float]
    ) -> None:
        """`chance` returns a number from 0 to 1."""
        self._request, self._monotonic, self._chance = request, monotonic, chance
        self._timeout_s, self._until_s = timeout_s, monotonic() + timeout_s
        self._pause_s = FIRST_S

    def left_s(self) -> float:
        """Return how much time is left. Raises `TooLate` where none is."""
        left_s = self._until_s - self._monotonic()
        if left_s <= 0:
            raise self.too_late()
        return left_s

    def body(self) -> bytes:
        """Return the next attempt's body. Raises `TooLate` where no time is left."""
        # At least a millisecond: serving refuses what is less than nothing.
        return msgspec.json.encode({**self._request, "timeout_ms": max(1.0, round(self.left_s() * 1_000, 3))})

    def too_late(self) -> TooLate:
        """Return the error of a request without an answer in its time."""
        return TooLate(f"serving gave no answer in {self._timeout_s * 1_000:.0f} ms (timeout_ms).")

    def answer(self, status: int, body: bytes) -> RankAnswer | float:
        """Return the answer, or the pause in s before the next attempt.

        Raises `BadRequest` where serving refuses the request as it is, `TooLate`, `Overloaded` (429) and `Unavailable`
        where no time is left for another attempt.
        """
        if status == 200:
            return _decoded(body, RankAnswer)
        problem = _problem(body)
        if status == 429:
            said = Overloaded(f"serving has more requests than it can answer: {problem.error}; {problem.next}")
            return self.pause_s(said, problem.retry_ms / 1_000)
        if status == 503:
            return self.pause_s(Unavailable(f"serving cannot answer yet: {problem.error}; {problem.next}"))
        if status == 504:
            raise TooLate(f"serving would have been too late: {problem.error}; {problem.next}")
        if 400 <= status < 500:
            raise BadRequest(status, problem.error, problem.next)
        raise Unavailable(f"serving answered {status}: {problem.error}; {problem.next}")

    def pause_s(self, last: HeadraceError, least_s: float = 0.0) -> float:
        """Return the pause before the next attempt. Raises `last` where it does not fit into the time that is left."""
        pause_s = max(self._pause_s, least_s) * (0.5 + self._chance())
        self._pause_s = min(LONGEST_S, 2 * self._pause_s)
        pause_s = max(pause_s, least_s)
        if self._monotonic() + pause_s >= self._until_s:
            raise last
        return pause_s


def unreachable(url: str, error: BaseException) -> Unavailable:
    """Return the error of a connection that fails."""
    return Unavailable(f"serving at {url} does not answer: {error!r}. Is it up? `headrace status` tells.")


def _decoded(body: bytes, kind: type[RankAnswer]) -> RankAnswer:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unavailable(f"what answered is no serving: {error}") from error


def _problem(body: bytes) -> Problem:
    """Return what is said to be wrong; a proxy's page says nothing that can be read."""
    try:
        return msgspec.json.decode(body, type=Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Problem(error="no reason is given", next="look at what stands between here and serving")
