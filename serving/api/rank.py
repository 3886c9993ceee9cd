"""POST /v1/rank: a body with candidates in, their scores by exactly one version of the model out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from starlette.responses import Response

from headrace.contract.checks.unknown_fields import UnknownFields
from headrace.contract.errors import BadRequest, Unavailable
from headrace.contract.formats.json_record import decode_json
from headrace.contract.formats.served_token import TokenLayout, token_head, token_layout
from headrace.kernels.served_tokens import seal_tokens
from headrace.serving.api.answers import answer
from headrace.serving.api.dependencies import ServingDependencies
from headrace.serving.api.fallback import fallback_scores
from headrace.serving.features import Served, State
from headrace.serving.model.scorer import merge, rank, recipe_of, spec_of, unknown_fields
from headrace.serving.model.shared_reader import Meta, View

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
    open: bool = False
    """True: `served` is an object of columns for each candidate, in place of a token."""
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
    served: Sequence[str | dict[str, Any]]
    """What each candidate was served: its token or, where that is asked, counters and crawled values by column."""
    counters: State
    warnings: list[str]
    created_ms: int = 0
    """When the version was made."""
    is_fallback: bool = False
    """True: no model scored this."""


class Ranker:
    """Answers requests for scores. One an application. It keeps nothing of a request; the shared model
    keeps the last few, to warm the next version with them."""

    def __init__(self, dependencies: ServingDependencies) -> None:
        self.deps = dependencies
        self._key = dependencies.token_key
        self._unknown = UnknownFields(dependencies.project.impression.fields)
        self._layouts: dict[tuple[str, str, bool], TokenLayout] = {}
        """That of the tokens that were sealed last."""

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

        def use(view: View) -> tuple[npt.NDArray[np.float32], Served]:
            spec = spec_of(view.meta.spec_json)
            if counters == "reading" and (spec.counters or self.deps.project.crawls):
                raise Unavailable(READING)
            found = self.deps.features.look_up(spec, raw, count)
            return rank(view, raw, found, rows=count, event_time_ms=now_ms), found

        (scores_NT, found), meta = self.deps.shared.read(use, is_request=True)
        version, recipe = meta.manifest.version, recipe_of(meta.recipe_json)
        # Zeros that nobody counted would be learnt for ever: without them the join takes its own counters.
        is_read = counters != "unread"
        tokens = [] if ask.open and not ask.log else self._tokens(meta, scores_NT, found, is_read)
        if ask.log:
            self._log(ask, version, tokens, now_ms)
        by_task = {task: scores_NT[:, i].tolist() for i, task in enumerate(recipe.heads)}
        served: Sequence[str | dict[str, Any]] = tokens
        if ask.open:
            served = found.open() if is_read else [{} for _ in range(count)]
        return Ranked(
            version=version,
            scores={recipe.task: by_task.pop(recipe.task), **by_task},
            served=served,
            counters=counters,
            warnings=self._warnings(ask),
            created_ms=meta.manifest.created_ms,
        )

    def _log(self, ask: RankRequest, version: str, served: Sequence[str | dict[str, Any]], now_ms: int) -> None:
        self.deps.impressions.log(
            request_id=ask.request_id,
            version=version,
            context=ask.context,
            candidates=ask.candidates,
            served=served,
            event_time_ms=now_ms,
        )

    def _tokens(self, meta: Meta, scores_NT: npt.NDArray[np.float32], found: Served, is_read: bool) -> list[str]:
        """Return a token for each candidate."""
        held = found if is_read else Served(found.rows, [], [])
        of = meta.spec_json, meta.recipe_json, is_read
        if of not in self._layouts:
            counters, crawls = ([counter for counter, _ in held.counters], [crawl for crawl, _ in held.entities])
            self._layouts = {of: token_layout(recipe_of(meta.recipe_json).heads, counters, crawls)}
        head = token_head(self._key, meta.manifest.version)
        sealed = seal_tokens(self._layouts[of], self._key, head, scores_NT, held.matrix(), held.packed())
        return msgspec.json.decode(sealed, type=list[str])

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
