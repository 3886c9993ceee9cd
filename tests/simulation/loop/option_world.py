"""One row of the matrix of options: a project is drafted level by level, and its events go through the whole loop.

Each request shows two candidates. What becomes of the n-th impression is said by its number alone (`FATES`), so the
labels that must come out are known without asking the join.
"""

from __future__ import annotations

from collections import Counter as Tally
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
from loop_world import START_MS, Loop, opened, quiet
from option_draft import SHOWN_TAG, Draft
from served_world import opened_columns

from headrace.contract.config import AggregateConfig, Config
from headrace.contract.crawl import external_columns
from headrace.contract.formats.events import ARROW_TYPES
from headrace.contract.formats.sample import matrix
from headrace.contract.project import Project
from headrace.contract.spec import EVENT_TIME
from headrace.replay.ledger.ledger import Ledger
from headrace.serving.model.scorer import merge
from headrace.stream.features.featurize import featurize

TURN_MS, TURNS, ASKED_FROM = 500, 26, 8
REQUESTS_A_TURN, SHOWN = 2, 2
SOON_MS, LATE_MS, TOO_LATE_MS = 700, 3_000, 6_000
"""Delays of feedback, against windows of `option_draft.WINDOW_MS`; a draft's pace makes both longer."""
FATES: tuple[tuple[tuple[str, int], ...], ...] = (
    (("click", SOON_MS),),
    (),
    (("click", SOON_MS), ("order", SOON_MS)),
    (("click", LATE_MS),),
    (),
    (("click", TOO_LATE_MS),),
    (("order", LATE_MS),),
)
CRAWLED_TURN = 4


@dataclass
class Asked:
    """A request that was answered, and what must be in the samples then."""

    raw: dict[str, pa.Array]
    answer: dict[str, Any]
    at_ms: int


@dataclass
class Outcome:
    """All that a check may look at."""

    draft: Draft
    project: Project
    loop: Loop
    shown: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Impressions that count, by event id, as they were sent."""
    answered: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    """Impression -> its feedback and the delay."""
    asked: dict[str, Asked] = field(default_factory=dict)
    letters: Tally[str] = field(default_factory=Tally)
    feedback: int = 0
    repeated: int = 0
    untrained: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def samples(self) -> pa.Table:
        """The lake's rows, in the log's order."""
        table = self.loop.samples()
        return table.sort_by([(name, "ascending") for name in ("partition", "offset", "rank")])

    def rows(self, task: str = "") -> list[dict[str, Any]]:
        """Return the first sample of each impression, of the first task or the named one, in the order of the log."""
        name, seen = task or self.project.tasks[0].name, dict[str, dict[str, Any]]()
        for row in self.samples.to_pylist():
            if row["task"] == name:
                seen.setdefault(row["event_id"], row)
        return sorted(seen.values(), key=lambda r: (r["partition"], r["impression_offset"], r["impression_row"]))


def run(draft: Draft, folder: Path) -> Outcome:
    """Lead the row's events through the loop and check all that holds for every row, then what its levels say."""
    project = draft.project()
    config = Config(aggregate=AggregateConfig(grid_ms=TURN_MS))
    with opened(project, quiet(config, TURN_MS), folder) as loop:
        out = Outcome(draft, project, loop)
        drive(out)
        check(out)
        for each in draft.checks:
            each(out)
    return out


def drive(out: Outcome) -> None:
    """Send everything, and wait until every window is over."""
    loop, coming, number = out.loop, list[tuple[int, str, dict[str, Any]]](), 0
    loop.turn(TURN_MS)
    for tag, record in out.draft.before:
        loop.send(tag, {"user": _candidate(out, 0)["user"], **record})
    out.untrained = _answer(out, "untrained", question(out))
    for turn in range(TURNS):
        if turn == CRAWLED_TURN and loop.pages is not None:
            for crawl in out.project.crawls:
                loop.pages.crawled(crawl.name, *out.draft.page)
        for _ in range(REQUESTS_A_TURN):
            _request(out, number, coming, is_asked=turn >= ASKED_FROM)
            number += 1
        _bad(out, turn)
        _feedback(out, coming)
        loop.turn(TURN_MS)
    for _ in range((TOO_LATE_MS * out.draft.pace + TURN_MS) // TURN_MS):
        _feedback(out, coming)
        loop.turn(TURN_MS)
    loop.settle(out.draft.window_ms + out.draft.correct_ms, TURN_MS)


def question(out: Outcome) -> dict[str, Any]:
    """Return what is asked of one user and two items that all traffic is about."""
    return _ask(out, [_candidate(out, 0), _candidate(out, 1)])


def _candidate(out: Outcome, number: int) -> dict[str, Any]:
    user: Any = number % 5
    user = user if out.draft.fields["user"] == "int64" else f"person-{user}"
    record: dict[str, Any] = {"user": user, "item": number * 3 % 7, "page": f"p{number % 3}"}
    record["price"] = 1.5 + number % 4
    for add in out.draft.shown:
        add(number, record)
    return record


def _ask(out: Outcome, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    known = {*out.draft.fields, *out.draft.private}
    shared = {"user": candidates[0]["user"]}
    return {"context": shared, "candidates": [{n: v for n, v in c.items() if n in known} for c in candidates]}


def _answer(out: Outcome, request_id: str, body: dict[str, Any]) -> dict[str, Any]:
    status, answer = out.loop.ask({"request_id": request_id, **body})
    assert status == 200, answer
    return answer


def _request(out: Outcome, number: int, coming: list[tuple[int, str, dict[str, Any]]], *, is_asked: bool) -> None:
    loop, request_id = out.loop, f"r{number}"
    candidates = [_candidate(out, number * SHOWN + place) for place in range(SHOWN)]
    for candidate in candidates:
        candidate["user"] = candidates[0]["user"]
    answer = None
    # Every other request is one that nobody asked a score for: the join counts by itself then.
    if is_asked and number % 2:
        body = _ask(out, candidates)
        answer = _answer(out, request_id, body)
        raw = merge(out.project, body["context"], body["candidates"], loop.privacy)
        out.asked[request_id] = Asked(raw, answer, loop.clock.now_ms())
    records = []
    for place, candidate in enumerate(candidates):
        event_id = f"{request_id}.{place}"
        record = {**candidate, "event_id": event_id, "request_id": request_id, "place": place}
        record["event_time_ms"] = loop.clock.now_ms()
        if answer is not None:
            record |= {"served": answer["served"][place], "version": answer["version"]}
        records.append(record)
        out.shown[event_id] = record
        out.answered[event_id] = list(FATES[(number * SHOWN + place) % len(FATES)])
        for name, delay_ms in out.answered[event_id]:
            coming.append((loop.clock.now_ms() + delay_ms * out.draft.pace, name, record))
    loop.send(SHOWN_TAG, *records)
    if number % 10 == 3:
        loop.send(SHOWN_TAG, records[0])
        out.repeated += 1


def _bad(out: Outcome, turn: int) -> None:
    """Send one event that no row takes, now and then."""
    if turn % 8 == 5:
        record = {**_candidate(out, turn), "event_id": f"bad{turn}", "event_time_ms": out.loop.clock.now_ms()}
        out.loop.send(SHOWN_TAG, record)
        out.letters["no_request_id"] += 1


def _feedback(out: Outcome, coming: list[tuple[int, str, dict[str, Any]]]) -> None:
    """Send the feedback that is due, clicks by the access log where the project reads one."""
    due = [each for each in coming if each[0] <= out.loop.clock.now_ms()]
    coming[:] = [each for each in coming if each not in due]
    for at_ms, name, shown in due:
        told = {*out.draft.told, *out.draft.private}
        record = {n: v for n, v in shown.items() if n in told}
        record |= {"request_id": shown["request_id"], "place": shown["place"], "event_time_ms": at_ms}
        record["event_id"] = f"{shown['event_id']}/{name}"
        out.feedback += 1
        if name == "click" and out.draft.mappings:
            query = urlencode({n: v for n, v in record.items() if n != "page" and not isinstance(v, list)})
            line = f'203.0.113.9 - - [14/Nov/2023:22:13:20 +0000] "POST /click/{record["page"]}?{query} HTTP/1.1" 302 5'
            out.loop.send("matrix.access", {"message": line})
            continue
        out.loop.send(f"matrix.{name}", record | ({"value": 2.5} if name == "order" else {}))


def expected_samples(out: Outcome) -> Tally[tuple[str, str, float, bool, float]]:
    """Return (impression, task, label, is a correction, weight) of every sample that must be, by the plain rules."""
    found = Tally[tuple[str, str, float, bool, float]]()
    for event_id, answers in out.answered.items():
        for task in out.project.tasks:
            delays = [delay_ms * out.draft.pace for name, delay_ms in answers if name == task.feedback]
            delay_ms = min(delays, default=10**9)
            late_ms = task.window_ms + task.correct_ms
            is_soon = delay_ms <= task.window_ms
            if task.policy == "window" and is_soon:
                found[event_id, task.name, 1.0, False, 1.0] += 1
                continue
            found[event_id, task.name, 0.0, False, 1.0] += 1
            if (is_soon and task.policy == "eager") or (not is_soon and delay_ms <= late_ms):
                found[event_id, task.name, 1.0, True, task.correction_weight] += 1
    return found


def check(out: Outcome) -> None:
    """Fail unless all that was sent is in the ledger, each label is right, what was scored is what was learnt, a replay
    has the same digest, and the last answer is of a trained model; and all that again of a run that learns the lake."""
    loop, ledger = out.loop, out.loop.check()
    _check_samples(out, ledger)
    _check_features(out)
    _check_answer(out)
    loop.train_anew(seed=99)
    again = loop.check()
    assert len(again.models) == 2 and again.learnt + again.sampled_out + again.other_tasks == out.samples.num_rows
    _check_answer(out)


def _check_samples(out: Outcome, ledger: Ledger) -> None:
    """Every event is where it belongs, once, and every label is right."""
    loop = out.loop
    assert ledger.impressions == len(out.shown) and ledger.feedback == out.feedback
    assert ledger.repeated + ledger.repeated_in_log == out.repeated
    out.letters.update(out.draft.refused)
    assert Tally(letter.reason for letter in loop.letters()) == out.letters
    rows = out.samples.select(["event_id", "task", "label", "correction", "weight"]).to_pylist()
    found = Tally((r["event_id"], r["task"], r["label"], bool(r["correction"]), r["weight"]) for r in rows)
    wanted = expected_samples(out)
    assert found == wanted, f"too many {sorted(found - wanted)[:5]}, missing {sorted(wanted - found)[:5]}"
    learnt = list(out.project.recipe.heads)
    assert sorted(ledger.models) == [loop.trainer.run_id]
    assert ledger.learnt + ledger.sampled_out + ledger.other_tasks == len(rows)
    if out.project.recipe.negative_share == 1:
        assert ledger.learnt == sum(row["task"] in learnt for row in rows)


def _check_answer(out: Outcome) -> None:
    """The last answer is of the newest version of a trained model, with a score for each task that it learns."""
    learner, recipe = out.loop.trainer.learner, out.project.recipe
    last = _answer(out, "last", question(out))
    assert last["version"] == f"{out.loop.trainer.run_id}-{learner.step}" and learner.step > 0
    assert sorted(last.get("tasks", {})) == sorted(set(recipe.heads) - {recipe.task})
    for name, values in {recipe.task: last["scores"], **last.get("tasks", {})}.items():
        is_chance = recipe.objective(name) == "log_loss"
        assert np.isfinite(values).all() and all(0 < value <= 1 for value in values if is_chance)
    assert last["scores"] != out.untrained["scores"]


def _check_features(out: Outcome) -> None:
    """What a request was scored by is what its sample holds."""
    spec, kinds = out.project.features, external_columns(out.project.crawls)
    rows = {row["event_id"]: row for row in out.rows()}
    assert len(out.asked) > 5
    for request_id, asked in out.asked.items():
        served = opened_columns(out.project, asked.answer["served"], out.loop.privacy)
        columns = {**asked.raw, EVENT_TIME: pa.array([asked.at_ms] * len(served), pa.int64())}
        for name in spec.counter_columns():
            columns[name] = pa.array([each[name] for each in served], pa.float32())
        for name, kind in kinds.items():
            columns[name] = pa.array([each[name] for each in served], ARROW_TYPES[kind])
        slots_NF, numeric_ND = featurize(columns, spec)
        for place in range(len(served)):
            row = rows[f"{request_id}.{place}"]
            assert row["version"] == asked.answer["version"]
            assert row["slots"] == slots_NF[place].tolist()
            assert row["numeric"] == numeric_ND[place].tolist()
    assert matrix(out.samples["slots"].combine_chunks(), spec.slots).shape[0] == out.samples.num_rows
    assert min(row["event_time_ms"] for row in rows.values()) > START_MS
