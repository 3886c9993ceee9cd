"""POST /v1/rank: a body with candidates in, their scores by exactly one version of the model out."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import msgspec
from starlette.responses import Response

from headrace.contract.checks.unknown_fields import UnknownFields
from headrace.contract.crawl import external_columns
from headrace.contract.errors import BadRequest, Unavailable
from headrace.contract.formats.json_record import decode_json
from headrace.serving.api.answers import answer
from headrace.serving.api.dependencies import ServingDependencies
from headrace.serving.api.fallback import fallback_scores
from headrace.serving.features import State
from headrace.serving.model.scorer import merge, rank, recipe_of, spec_of, unknown_fields
from headrace.serving.model.shared_region import View

logger = logging.getLogger("headrace.serve")

READING = "the counters are still being read from `features`; ask again when /readyz says so."
SAID = ("unread", "stale")
"""States of the counters that every answer names."""
WARNINGS_MAX = 10
"""Warnings of one answer; one a field, where it stands first."""
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
TimeoutMs = Annotated[float, msgspec.Meta(gt=0, le=3_600_000)]


class RankRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /v1/rank: raw fields as declared; a candidate's field wins over the context's."""

    request_id: Text
    """Feedback names it later, with `place`, the index of a candidate."""
    candidates: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]
    """What is ranked, `serve.candidates_max` at most."""
    context: dict[str, Any] = {}
    """Fields that all candidates share."""
    log: bool = False
    """True: serving logs one impression for each candidate. False: the service does, which knows what was shown."""
    timeout_ms: TimeoutMs | None = None
    """How long the client waits for the answer, from when serving has read the request's head. One that cannot be
    answered in that time gets 504, at once where that is known, and is not computed. None: as long as it takes."""


class _Hurry(msgspec.Struct):
    """Of a request, what has to be known before its turn. The rest of it is not decoded."""

    timeout_ms: TimeoutMs | None = None


def timeout_ms_of(sent: bytes) -> float | None:
    """Return how long the client of a body of POST /v1/rank waits; None where it does not say so rightly."""
    if b"timeout_ms" not in sent:
        return None
    try:
        hurry: _Hurry = decode_json(sent, _Hurry)
    except msgspec.DecodeError:
        return None  # Decoding all of it says what is wrong.
    return hurry.timeout_ms


class Ranked(msgspec.Struct, frozen=True):
    """What one version says of all candidates of a request."""

    version: str
    scores: dict[str, list[float]]
    """By task, those of the recipe's main task first."""
    served: list[dict[str, Any]]
    """Counters and crawled values of each candidate, as they were used."""
    counters: State
    warnings: list[str]
    created_ms: int = 0
    """When the version was made."""
    is_fallback: bool = False
    """True: no model scored this."""


class Ranker:
    """Answers requests for scores. One an application; it keeps nothing of a request."""

    def __init__(self, dependencies: ServingDependencies) -> None:
        self.deps = dependencies
        self._unknown = UnknownFields(dependencies.project.impression.fields)

    def respond(self, sent: bytes) -> Response:
        """Return the answer to a body of POST /v1/rank. Raises one of `answers.REFUSED`."""
        ask: RankRequest = decode_json(sent, RankRequest)
        ranked = self.ranked(ask)
        (_, scores), *others = ranked.scores.items()
        body: dict[str, Any] = {
            "request_id": ask.request_id,
            "version": ranked.version,
            "scores": scores,
            "served": ranked.served,
        }
        # The other tasks of a recipe that has several; of one, the answer is what it always was.
        body |= {"tasks": dict(others)} if others else {}
        return answer(200, body | self.said(ranked))

    def said(self, ranked: Ranked) -> dict[str, Any]:
        """Return what an answer says of its version, its counters and its request, beside the scores."""
        said: dict[str, Any] = {}
        if ranked.is_fallback:
            said["fallback"] = True
        else:
            said["age_ms"] = max(0, self.deps.clock.now_ms() - ranked.created_ms)
            if said["age_ms"] > self.deps.config.stale_ms:
                said["stale"] = True
        if ranked.counters in SAID:
            said["counters"] = ranked.counters
        if ranked.warnings:
            said["warnings"] = ranked.warnings
        return said

    def ranked(self, ask: RankRequest) -> Ranked:
        """Score as `rank` does; where no model can, as `serve.fallback` says. Raises as `rank`."""
        try:
            return self.rank(ask)
        except Unavailable:
            count = len(ask.candidates)
            scores = fallback_scores(self.deps.config, count)
            if scores is None:
                raise
        self.deps.metrics.add("fallback_answers_total")
        served: list[dict[str, Any]] = [{} for _ in range(count)]
        if ask.log:
            self._log(ask, "", served, self.deps.clock.now_ms())
        by_task = dict.fromkeys(self.deps.project.recipe.heads, scores)
        main = self.deps.project.recipe.task
        by_task = {main: by_task.pop(main), **by_task}
        return Ranked(
            version="",
            scores=by_task,
            served=served,
            counters=self.deps.counters(),
            warnings=self._warnings(ask),
            is_fallback=True,
        )

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
            self._log(ask, version, served, now_ms)
        return Ranked(
            version=version,
            scores={task: by_task.pop(task), **by_task},
            served=served,
            counters=counters,
            warnings=self._warnings(ask),
            created_ms=meta.manifest.created_ms,
        )

    def _log(self, ask: RankRequest, version: str, served: list[dict[str, Any]], now_ms: int) -> None:
        self.deps.impressions.log(
            request_id=ask.request_id,
            version=version,
            context=ask.context,
            candidates=ask.candidates,
            served=served,
            event_time_ms=now_ms,
        )

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
