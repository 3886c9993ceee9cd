"""POST /v1/rank: a body with candidates in, their scores by exactly one version of the model out."""

from __future__ import annotations

import logging
import re
from typing import Annotated, Any

import msgspec
from starlette.responses import Response

from headrace.contract.checks.unknown_fields import UnknownFields
from headrace.contract.crawl import external_columns
from headrace.contract.errors import BadRequest, EventRejected, Overloaded, Unavailable, meant
from headrace.contract.formats.json_record import decode_json
from headrace.serving.api.answers import answer, problem
from headrace.serving.api.dependencies import ServingDependencies
from headrace.serving.features import State
from headrace.serving.model.scorer import merge, rank, recipe_of, spec_of, unknown_fields
from headrace.serving.model.shared_region import View

logger = logging.getLogger("headrace.serve")

READING = "the counters are still being read from `features`; ask again when /readyz says so."
_NEXT = {
    "bad_type": "send a value of the declared type, or null",
    "unknown_field": "leave the field out, or declare it in the project",
}
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


class Ranked(msgspec.Struct, frozen=True):
    """What one version says of all candidates of a request."""

    version: str
    scores: dict[str, list[float]]
    """By task, those of the recipe's main task first."""
    served: list[dict[str, Any]]
    """Counters and crawled values of each candidate, as they were used."""
    counters: State
    warnings: list[str]


class Ranker:
    """Answers requests for scores. One an application; it keeps nothing of a request."""

    def __init__(self, dependencies: ServingDependencies) -> None:
        self.deps = dependencies
        self._unknown = UnknownFields(dependencies.project.impression.fields)

    def respond(self, sent: bytes) -> Response:
        """Return the answer to a body of POST /v1/rank, or what is wrong with it."""
        try:
            ask: RankRequest = decode_json(sent, RankRequest)
            ranked = self.rank(ask)
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
        (_, scores), *others = ranked.scores.items()
        body = {"request_id": ask.request_id, "version": ranked.version, "scores": scores, "served": ranked.served}
        # The other tasks of a recipe that has several; of one, the answer is what it always was.
        body |= {"tasks": dict(others)} if others else {}
        body |= {"counters": ranked.counters} if ranked.counters in SAID else {}
        return answer(200, body | ({"warnings": ranked.warnings} if ranked.warnings else {}))

    def rank(self, ask: RankRequest) -> Ranked:
        """Score all candidates with exactly one version of the model, and log them where that is asked.

        Raises:
            BadRequest, EventRejected: the request is wrong.
            Unavailable, Overloaded: it may be asked again in a second.
        """
        count, most = len(ask.candidates), self.deps.config.candidates_max
        if count > most:
            raise BadRequest(422, f"{count} candidates", f"send at most {most} in one request")
        raw = merge(self.deps.project, ask.context, ask.candidates, self.deps.privacy)
        warnings = self._warnings(ask)
        now_ms, counters = self.deps.clock.now_ms(), self.deps.counters()
        external = external_columns(self.deps.project.crawls)

        def use(view: View) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
            spec = spec_of(view.meta.spec_json)
            if counters == "reading" and (spec.counters or external):
                raise Unavailable(READING)
            served = self.deps.features.columns(spec, raw, count)
            return rank(view, raw, served, event_time_ms=now_ms, external=external), served

        (by_task, served), meta = self.deps.shared.read(use)
        version, task = meta.manifest.version, recipe_of(meta.recipe_json).task
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
        scores = {task: by_task.pop(task), **by_task}
        return Ranked(version=version, scores=scores, served=served, counters=counters, warnings=warnings)

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


def _meant(said: str) -> str:
    """Return what a misspelt field of the request itself may mean, of a decoder's message.

    >>> _meant("Object contains unknown field `candidate`"), _meant("Expected `str`")
    (". Did you mean 'candidates'?", '')
    """
    found = re.search(r"unknown field `(.*)`", said)
    near = meant(found[1], RankRequest.__struct_fields__) if found else ""
    return f".{near}" if near else ""
