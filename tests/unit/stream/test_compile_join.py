"""Goal: nothing is left to compile when the first event comes. Method: lead other events
through a join that was compiled before and count what was compiled."""

from __future__ import annotations

from headrace.contract.config import JoinConfig
from headrace.contract.formats.events import (
    FEEDBACK,
    IMPRESSION,
    SPEC,
    batch_from_rows,
    feedback_schema,
    impression_schema,
)
from headrace.contract.interfaces.log import Record
from headrace.contract.rules import change_of, encode_change
from headrace.examples.shop.shop import PROJECT
from headrace.kernels import hashes, open_addressing, ring_table, sample_ids
from headrace.kernels.sample_ids import seal_of
from headrace.stream.join import aggregate_lookup, early_feedback, local_counters, matching, pending, recent_keys
from headrace.stream.join.join import JoinState
from headrace.stream.join.state import encode_state, load_state
from headrace.stream.shell.compile_join import compile_join, events_record, punctuation_record


def _compiled() -> dict[str, int]:
    shared = (hashes, open_addressing, ring_table, sample_ids)
    modules = (*shared, aggregate_lookup, local_counters, early_feedback, matching, recent_keys, pending)
    kernels = {f"{m.__name__}.{n}": f for m in modules for n, f in vars(m).items() if hasattr(f, "nopython_signatures")}
    return {name: len(kernel.nopython_signatures) for name, kernel in kernels.items()}


def test_after_compiling_the_join_other_events_compile_nothing() -> None:
    compile_join(PROJECT, JoinConfig())
    after = _compiled()
    assert sum(after.values()) > 10
    state = JoinState(PROJECT, JoinConfig(), silent_ms=1_000, partition=1)
    shown, clicked = impression_schema(PROJECT), feedback_schema(PROJECT, PROJECT.feedback[0])
    for number in range(30):
        key = {"user_id": number % 4, "video_id": number % 3, "author_id": None}
        envelope = {"event_id": f"i{number}", "request_id": f"r{number}", "place": 0, "key": str(number % 4)}
        row = {**envelope, **key, "event_time_ms": 1_000 * number}
        click = row | {"event_id": f"c{number}", "value": 2.5}
        state.take(events_record(4 * number, IMPRESSION, batch_from_rows([row] * (1 + number % 2), shown)))
        if number % 3:
            state.take(events_record(4 * number + 1, FEEDBACK, batch_from_rows([click], clicked), "click"))
        if number == 15:
            change = encode_change(change_of(PROJECT, 2, now_ms=0))
            state.take(Record("", 1, 4 * number + 2, None, change, {"kind": SPEC}, 0))
        emitted = state.take(punctuation_record(4 * number + 3, 1_000 * number))
        if emitted is not None:
            seal_of(emitted.batch)
    assert state.rules.number == 2
    load_state(JoinState(PROJECT, JoinConfig(), silent_ms=1_000, partition=1), encode_state(state))
    assert _compiled() == after
