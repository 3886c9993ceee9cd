"""What the shop's features know of a visitor.

Goal: an impression knows what earlier ones ended in and nothing of its own end.
Method: synthetic visits through the real join, each followed by its feedback; every counter is counted again by hand.
"""

from __future__ import annotations

from collections import Counter

import pyarrow as pa

from headrace.contract.config import JoinConfig
from headrace.contract.formats.events import (
    Punctuation,
    batch_from_rows,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.interfaces.log import Record
from headrace.examples.shop import traffic
from headrace.examples.shop.shop import PROJECT, WATCHED
from headrace.examples.shop.web_service import feedback_record
from headrace.stream.join.join import JoinState

T0 = 1_800_000_000_000
EVERY_MS = 40
SHOWN = impression_schema(PROJECT)
SAID = {feedback.name: feedback_schema(PROJECT, feedback) for feedback in PROJECT.feedback}


def visits() -> list[traffic.Visit]:
    """Return visits of three users, so that each comes back."""
    chosen = list(traffic.synthetic(PROJECT.impression.fields, rows=300).visits())
    return [traffic.Visit(v.row, {**v.fields, "user_id": v.row % 3}, v.clicked, v.delay_ms, v.dwell) for v in chosen]


def records() -> list[Record]:
    """Return the log: each visit's impression and feedback at their times, then time to resolve all."""
    coming = []
    for visit in visits():
        at_ms, request = T0 + EVERY_MS * visit.row, f"r{visit.row}"
        lead = {"event_id": request, "request_id": request, "place": 0, "key": str(visit.fields["user_id"])}
        row = {**lead, **visit.fields, "event_time_ms": at_ms}
        coming.append((at_ms, {"kind": "impression"}, encode_batch(batch_from_rows([row], SHOWN))))
        for given in visit.feedback:
            told = {**feedback_record(PROJECT, visit, given, request), "key": lead["key"]}
            told["event_time_ms"] = at_ms + given.delay_ms
            value = encode_batch(batch_from_rows([told], SAID[given.name]))
            coming.append((told["event_time_ms"], {"kind": "feedback", "type": given.name}, value))
    end_ms = T0 + 3_600_000
    coming.append((end_ms, {"kind": "punctuation"}, encode_punctuation(Punctuation("g", 1, end_ms))))
    ordered = sorted(coming, key=lambda each: each[0])
    return [Record("events", 0, n, None, value, headers, 0) for n, (_, headers, value) in enumerate(ordered)]


def test_an_impression_knows_what_was_watched_before_and_nothing_of_itself():
    state = JoinState(PROJECT, JoinConfig(), silent_ms=10_000, partition=0)
    emitted = [each.batch for record in records() if (each := state.take(record)) is not None]
    samples = {row["event_id"]: row for row in pa.Table.from_batches(emitted).to_pylist()}
    seen, checked = visits(), 0
    for visit in seen:
        at_ms = EVERY_MS * visit.row
        before = [v for v in seen if v.row < visit.row and v.fields["user_id"] == visit.fields["user_id"]]
        watched, clicks = Counter[str](), 0
        for earlier in before:
            for given in earlier.feedback:
                # At equal times what earlier visitors say comes first in this log.
                if EVERY_MS * earlier.row + given.delay_ms <= at_ms:
                    watched.update({f"sum:dwell.{name}": value for name, value in given.facts.items()})
                    clicks += given.name == "click" and earlier.fields["tab"] == visit.fields["tab"]
        sample = samples[f"r{visit.row}"]
        for entry in WATCHED:
            assert abs(sample[f"counter.watched.{entry}"] - watched[entry]) < 1e-3, (visit.row, entry)
            checked += watched[entry] > 0
        assert sample["counter.user.impression"] == len(before)
        assert sample["counter.user_tab.click"] == clicks
        assert sample["label"] == float(visit.clicked)
    assert checked > 500


def test_samples_have_counters_of_dwells_and_no_dwell():
    assert not {name for name in SHOWN.names if name in SAID["dwell"].names[5:]} - set(PROJECT.impression.fields)
    assert {name for feature in PROJECT.features.features for name in feature.inputs() if "dwell" in name} == {
        f"counter.watched.{entry}" for entry in WATCHED
    }
