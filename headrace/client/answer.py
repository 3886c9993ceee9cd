"""One typed answer, and the impressions of what was shown of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from headrace.contract.interfaces.ranking import RankAnswer

SERVED = "served"
"""Field of an impression that holds what was served where that is one text a candidate."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What serving said, beside what it was asked."""

    request_id: str
    context: Mapping[str, Any]
    candidates: Sequence[Mapping[str, Any]]
    version: str
    """The model's version; empty in a fallback."""
    scores: list[float]
    """Of the recipe's main task, in the order of `candidates`."""
    tasks: dict[str, list[float]]
    """Of the others, by name."""
    served: list[Any]
    """What each candidate's impression has to carry. Do not look into it: `shown` logs it as it came."""
    age_ms: int
    """Age of the version."""
    stale: bool
    """True: the version is older than serving allows (`serve.stale_ms`)."""
    fallback: bool
    """True: no model scored this."""
    counters: str
    warnings: list[str]

    def order(self) -> list[int]:
        """Return the places of the candidates, the highest score first; of equal ones the first comes first.

        >>> answer_of({"request_id": "r", "candidates": [{}, {}, {}]}, RankAnswer(
        ...     request_id="r", version="v", scores=[0.2, 0.9, 0.9], served=[{}, {}, {}])).order()
        [1, 2, 0]
        """
        return sorted(range(len(self.scores)), key=lambda place: -self.scores[place])

    def impressions(self, places: Iterable[int], at_ms: int) -> Iterator[dict[str, Any]]:
        """Yield one record for each candidate that was shown at `at_ms`, as serving logs them with `"log": true`.

        Raises `IndexError` for a place that no candidate has.
        """
        for place in places:
            if not 0 <= place < len(self.candidates):
                raise IndexError(f"place {place}: the request had {len(self.candidates)} candidates")
            served = self.served[place]
            yield {
                **self.context,
                **self.candidates[place],
                **(served if isinstance(served, dict) else {SERVED: served}),
                "event_id": f"{self.request_id}#{place}",
                "request_id": self.request_id,
                "place": place,
                "event_time_ms": at_ms,
                **({"version": self.version} if self.version else {}),
            }


def answer_of(request: Mapping[str, Any], said: RankAnswer) -> Answer:
    """Return what serving said to a body of POST /v1/rank."""
    told = {name: getattr(said, name) for name in RankAnswer.__struct_fields__ if name != "request_id"}
    return Answer(
        request_id=request["request_id"],
        context=request.get("context", {}),
        candidates=request["candidates"],
        **told,
    )
