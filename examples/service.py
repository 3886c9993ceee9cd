"""A small web service for a try of any project: it asks for scores, shows, logs, and does what visitors do.

1. *show*: ask serving to rank a visit's candidates. Without an answer they are shown all the same.
2. Log one impression a candidate, with the answer's version and values unless the visit says that nobody logs them.
3. *answer*: when its delay is over, log each feedback with the impression's fields that its type declares.

It keeps what was served of each impression that got a score, so that the score can be held against the label and the
true probability. Pure: time, log and serving come in as parameters.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from headrace.contract.errors import ConfigRejected
from headrace.contract.project import Project, Task
from headrace.examples.visits import Given, Visit

Log = Callable[[str, dict[str, Any]], object]
"""Gives one event (tag, record) to whoever ships it."""
Rank = Callable[[dict[str, Any]], "Mapping[str, Any] | None"]
"""Gives the body of POST /v1/rank to serving and returns its answer; None where there is none."""

SERVED_MAX = 200_000
"""Most impressions whose score is kept: about 100 MB."""

Floats = npt.NDArray[np.float64]


class Served(msgspec.Struct):
    """One impression that got scores, by task, beside what is true of it."""

    at_ms: int
    scores: dict[str, float]
    chances: dict[str, float]
    answered_ms: dict[str, int]
    """Feedback -> when it came."""


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """How good served scores were, of one task; NaN where only one label was seen."""

    impressions: int
    positives: int
    auc: float
    auc_oracle: float
    """What the true probabilities reach on the same impressions."""
    calibration: float
    """Sum of scores by the sum of true probabilities: 1 is right, and chance has no part in it."""

    @property
    def gain_share(self) -> float:
        """Share of the oracle's AUC gain over a constant, whose AUC is 0.5."""
        return (self.auc - 0.5) / (self.auc_oracle - 0.5)

    def line(self) -> str:
        """Return the figures for people."""
        return (
            f"AUC {self.auc:.3f} of an oracle's {self.auc_oracle:.3f} (constant 0.500), calibration "
            f"{self.calibration:.2f}, {self.positives:,} of {self.impressions:,} positive"
        )


class Service:
    """One service's state. `rank` None asks nobody."""

    def __init__(self, project: Project, visits: Iterator[Visit], *, log: Log, run: str, rank: Rank | None) -> None:
        self.project, self.log, self.rank = project, log, rank
        self.served: list[Served] = []
        self.shown = 0
        """Impressions that were logged."""
        self._visits, self._run, self._requests, self._due = visits, run, 0, 0
        self._tags = {feedback.name: feedback.tag for feedback in project.feedback}
        self._repeats = {f.name: {project.impression.key, *f.fields} for f in project.feedback}
        self._coming: list[tuple[int, int, str, dict[str, Any], Served | None]] = []

    @property
    def waits(self) -> int:
        """Return how many feedbacks are still to come."""
        return len(self._coming)

    def show(self, now_ms: int) -> bool:
        """Show the next visit; False where there is none.

        Raises `ConfigRejected` where the visit is of another project.
        """
        visit = next(self._visits, None)
        if visit is None:
            return False
        self._refuse_foreign(visit)
        request_id = f"{self._run}-{self._requests}"
        self._requests += 1
        body = {"request_id": request_id, "context": visit.context, "candidates": visit.candidates}
        answer = self.rank(body) if self.rank is not None else None
        kept = [self._impression(visit, place, request_id, answer, now_ms) for place in range(len(visit.candidates))]
        for given in visit.given:
            self._due += 1
            record = self._feedback(visit, given, request_id)
            at_ms = now_ms + given.delay_ms
            heapq.heappush(self._coming, (at_ms, self._due, given.feedback, record, kept[given.place]))
        return True

    def answer(self, now_ms: int) -> None:
        """Log the feedback that is due."""
        while self._coming and self._coming[0][0] <= now_ms:
            at_ms, _, name, record, served = heapq.heappop(self._coming)
            self.log(self._tags[name], {**record, "event_time_ms": at_ms})
            if served is not None:
                served.answered_ms.setdefault(name, at_ms)

    def quality(self, task: Task, *, since_ms: int = 0, upto_ms: int) -> Quality:
        """Return the figures of impressions from `since_ms` on whose label is known at `upto_ms`: those whose window,
        with what it corrects, is over."""
        window_ms = task.window_ms + task.correct_ms
        known = [s for s in self.served if since_ms <= s.at_ms <= upto_ms - window_ms]
        positive_N = np.array([0 <= s.answered_ms.get(task.feedback, -1) - s.at_ms <= window_ms for s in known], bool)
        score_N = np.array([s.scores[task.name] for s in known])
        chance_N = np.array([s.chances[task.name] for s in known])
        positives = int(positive_N.sum())
        return Quality(
            impressions=len(known),
            positives=positives,
            auc=auc(score_N, positive_N),
            auc_oracle=auc(chance_N, positive_N),
            calibration=float(score_N.sum() / chance_N.sum()) if len(known) else float("nan"),
        )

    def _refuse_foreign(self, visit: Visit) -> None:
        """Raise `ConfigRejected` before anything of a visit is logged that the project could not take."""
        key = self.project.impression.key
        names = {given.feedback for given in visit.given} - set(self._tags)
        names |= visit.chances.keys() - {task.name for task in self.project.tasks}
        has_key = all(key in visit.context or key in candidate for candidate in visit.candidates)
        if names or not has_key:
            told = f"{sorted(names)}, which it does not declare" if names else f"no field {key!r}, its partition key"
            raise ConfigRejected(
                f"the traffic is of another project than {self.project.name!r}: its visits have {told}. traffic.py in "
                "the project's folder says what visitors do: write it for this project, or send events of your own."
            )

    def _impression(
        self, visit: Visit, place: int, request_id: str, answer: Mapping[str, Any] | None, now_ms: int
    ) -> Served | None:
        record = {**visit.context, **visit.candidates[place], "event_id": f"{request_id}.{place}"}
        record |= {"request_id": request_id, "place": place, "event_time_ms": now_ms}
        served = None
        if answer is not None:
            if visit.logs_answer:
                record |= {"served": answer["served"][place], "version": answer["version"]}
            by_task = {self.project.recipe.task: answer["scores"], **answer.get("tasks", {})}
            scores = {task: values[place] for task, values in by_task.items()}
            served = Served(now_ms, scores, {task: values[place] for task, values in visit.chances.items()}, {})
            if len(self.served) < SERVED_MAX:
                self.served.append(served)
        self.log(self.project.impression.tag, record)
        self.shown += 1
        return served

    def _feedback(self, visit: Visit, given: Given, request_id: str) -> dict[str, Any]:
        known = visit.context | visit.candidates[given.place]
        told = {name: known[name] for name in self._repeats[given.feedback] if name in known} | given.fields
        event_id = f"{request_id}.{given.place}/{given.feedback}"
        return {**told, "event_id": event_id, "request_id": request_id, "place": given.place}


def auc(score_N: Floats, positive_N: npt.NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve by ranks (Mann-Whitney), a tie counting half; NaN where one label is missing.

    >>> auc(np.array([0.1, 0.9, 0.5, 0.5]), np.array([False, True, True, False]))
    0.875
    """
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if not positives or not negatives:
        return float("nan")
    _, group_N, count_G = np.unique(score_N, return_inverse=True, return_counts=True)
    # The mean rank of a group of ties, ranks from 1.
    rank_G = np.cumsum(count_G) - (count_G - 1) / 2
    return float((rank_G[group_N][positive_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))
