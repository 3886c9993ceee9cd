"""Goal: an operator sees the whole letter, whatever a stranger put into it, and a retry keeps time, id and place.

Method: letters that a gateway without sockets wrote into a log in memory; the views as text and JSON.
"""

from __future__ import annotations

import base64
from random import Random
from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingest_world import PROJECT, START_MS, impression
from letters_world import CORRECTED, TOPICS, Dying, DyingProducer, DyingWriter, Killed, World

from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.contract.formats.dead_letters import DeadLetter, Fate, RetryMark, decode_dead_letter, decode_retry_mark
from headrace.contract.mapping import AccessLog, Route
from headrace.ingest.dead_letters.display import ADVICE, AFTER, plain, row, summary, title, view
from headrace.ingest.dead_letters.letters import (
    Filter,
    Letter,
    States,
    id_of,
    parse_age_ms,
    parse_id,
    record_of,
    superseded,
    why_not_retried,
)
from headrace.ingest.gateway.dry_run import DryRunProducer

ALL = Filter()


def letter(offset: int = 7, **more: Any) -> Letter:
    told = {"reason": "undeclared", "detail": "no declared event", "origin": "10.0.0.1", "tag": "shop.cart"}
    return Letter(offset, DeadLetter(**told | {"raw": msgpack.packb({"a": 1}), "seen_ms": START_MS} | more))


def test_the_whole_record_is_shown_and_raw_only_where_json_cannot_say_it() -> None:
    shown = view(letter(time_ns=1_700_000_000_123_456_789), "open")
    assert shown["record"] == {"a": 1} and "raw" not in shown
    assert (shown["id"], shown["reason"], shown["tag"], shown["state"]) == ("0/7", "undeclared", "shop.cart", "open")
    assert shown["time_ns"] == 1_700_000_000_123_456_789
    raw = msgpack.packb({"b": b"\xff", "n": float("nan"), 5: msgpack.Timestamp(1, 2), "t": b"caf\xe9".decode("latin1")})
    shown = view(letter(raw=raw), "open")
    assert shown["record"]["b"] == "\ufffd" and shown["record"]["n"] == "nan" and "5" in shown["record"]
    assert base64.b64decode(shown["raw"]) == raw
    msgspec.json.encode(shown)


def test_what_is_cut_or_no_record_is_shown_as_bytes_and_never_offered() -> None:
    for told in (letter(raw=b"\x81\xa1", raw_truncated=True), letter(raw=b"\x81\xa1"), letter(reason="bad_chunk")):
        shown = view(told, "open")
        assert "record" not in shown and base64.b64decode(shown["raw"]) == told.content.raw
        assert "cannot be retried" in why_not_retried(told)
    assert why_not_retried(letter()) == ""


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=4),
        max_leaves=12,
    )
)
def test_any_record_has_a_json_view_and_is_whole_where_it_says_so(record: Any) -> None:
    told = letter(raw=msgpack.packb(record))
    shown = msgspec.json.decode(msgspec.json.encode(view(told, "open")))
    if "raw" in shown:
        assert base64.b64decode(shown["raw"]) == told.content.raw
    else:
        assert shown["record"] == record_of(told.content)[0]
    assert plain(record)[1] == ("raw" not in shown)


@given(st.text(max_size=200), st.text(max_size=200), st.text(max_size=200))
def test_a_line_of_the_table_is_one_line_of_120_columns(tag: str, detail: str, origin: str) -> None:
    shown = row(letter(tag=tag, detail=detail, origin=origin), "open", "2026-01-01 00:00:00")
    assert len(shown) <= 120 and shown.isprintable()
    assert len(title()) <= 120


@given(st.text(max_size=200))
def test_a_line_that_is_piped_is_whole_and_one_line(detail: str) -> None:
    shown = row(letter(detail=detail), "open", "2026-01-01 00:00:00", whole=True)
    assert shown.isprintable()
    assert "".join(c if c.isprintable() else "?" for c in detail).rstrip() in shown


def test_what_is_left_to_do_goes_by_the_state() -> None:
    """Every state but `open`, of which the reason says it."""
    assert set(AFTER) == set(get_args(Fate)) - {"open", "appended", "repeated", "skipped"} | {"retried", "retrying"}


def test_counts_by_reason_end_the_table() -> None:
    lines = summary({("undeclared", "open"): 1_200, ("undeclared", "retried"): 3, ("future", "open"): 4})
    assert lines[0] == "1,207 letters"
    assert [line.split() for line in lines[1:]] == [
        ["1,203", "undeclared", "1,200", "open,", "3", "retried"],
        ["4", "future", "4", "open"],
    ]


def test_one_letter_is_one() -> None:
    assert summary({("future", "open"): 1})[0] == "1 letter"


def test_filters_and_ids() -> None:
    assert Filter(reason="undeclared", tag="shop.cart", since_ms=START_MS).takes(letter())
    for other in ({"reason": "x"}, {"tag": "x"}, {"origin": "x"}, {"since_ms": START_MS + 1}):
        assert not Filter(**other).takes(letter())
    assert Filter(offsets=frozenset({7})).takes(letter()) and not Filter(offsets=frozenset({8})).takes(letter())
    assert (parse_id("0/7"), parse_id("7"), parse_age_ms("15m")) == (7, 7, 900_000)
    for wrong in ("1/7", "x", "-1", ""):
        with pytest.raises(ConfigRejected, match="letter's id"):
            parse_id(wrong)
    with pytest.raises(ConfigRejected, match="length of time"):
        parse_age_ms("1w")


def test_every_reason_of_the_gateway_has_its_advice() -> None:
    known = {"undeclared", "no_partition_key", "no_request_id", "bad_type", "unknown_field", "future", "too_large"}
    assert known | {"bad_chunk", "bad_line", "too_deep"} <= ADVICE.keys()
    assert all("\n" not in line for line in ADVICE.values())


def test_states_follow_from_marks_and_newer_letters() -> None:
    def marked(*offsets: int) -> RetryMark:
        return RetryMark(step="retrying", run="r", at_ms=1, letters=offsets)

    states = States([marked(1, 2, 3, 4), RetryMark(step="retried", run="r", at_ms=2, outcomes={1: "appended"})])
    states.note(letter(9, retry_of=2))
    assert [states.of(offset) for offset in (0, 1, 2, 3)] == ["open", "retried", "refused", "retrying"]
    found = RetryMark(step="retried", run="r2", at_ms=3, outcomes={3: "open", 4: "unknown"})
    states = States([marked(3, 4), found])
    assert [states.of(offset) for offset in (3, 4)] == ["open", "unknown"]
    assert States([marked(3), found, marked(3)]).of(3) == "retrying"
    told = [letter(n) for n in (1, 3, 4)]
    marks = [RetryMark(step="retried", run="r", at_ms=2, outcomes={1: "repeated", 3: "open", 4: "unknown"})]
    assert superseded(told, marks) == [(told[0].content, "repeated")], "what is open or unknown stands for its event"


def test_letters_and_marks_of_before_and_after_are_read() -> None:
    old = b'{"reason":"future","detail":"","origin":"","tag":"t","raw":"gA==","from_a_later_version":1}'
    assert decode_dead_letter(old).retry_of == -1
    assert (
        decode_retry_mark(b'{"step":"retried","run":"r","at_ms":1,"outcomes":{"7":"open"},"new":2}').outcomes[7]
        == "open"
    )


def test_a_retry_keeps_the_events_own_id_time_and_fields() -> None:
    world = World()
    at_s = START_MS // 1_000 - 1_800
    world.offer("shop.cart", [{"request_id": "a", "user_id": 1, "event_id": "own", "item_id": 5}], "c", at_s)
    world.offer("shop.cart", [{"request_id": "b", "user_id": 1}, {"request_id": "c", "user_id": 1}], "c2", at_s)
    world.offer("shop.cart", [{"request_id": "d", "user_id": 1, "event_id": 12, "event_time_ms": START_MS - 7}], "c3")
    report = world.retry().retry(ALL)
    assert (report.offered, report.appended) == (4, 4)
    rows = {one["request_id"]: one for one in world.rows()}
    ids = [rows[name]["event_id"] for name in "abcd"]
    derived = ids[1].rpartition("/")[0]
    assert derived.startswith("shop.cart/c2/")
    assert ids == ["own", f"{derived}/0", f"{derived}/1", "12"]
    assert [rows[name]["event_time_ms"] for name in "abcd"] == [at_s * 1_000] * 3 + [START_MS - 7]
    assert rows["a"]["item_id"] == 5


def test_an_entry_without_a_time_is_not_dated_1970() -> None:
    world = World()
    world.log.append(
        TOPICS.dead_letters,
        0,
        msgspec.json.encode(letter(raw=msgpack.packb({"request_id": "r", "user_id": 1})).content),
        None,
        {},
    )
    assert world.retry().retry(ALL).refused == {"bad_type": 1}
    assert world.rows() == []


def test_a_letter_without_any_id_gets_one_of_its_place() -> None:
    told = letter(raw=msgpack.packb({"request_id": "r", "user_id": 1}), time_ns=START_MS * 10**6)
    assert id_of(told, {}) == "dead-letters/7"
    world = World()
    world.log.append(TOPICS.dead_letters, 0, msgspec.json.encode(told.content), None, {})
    assert world.retry().retry(ALL).appended == 1
    assert [one["event_id"] for one in world.rows()] == ["dead-letters/0"]


def test_only_what_is_chosen_is_offered_and_a_dry_run_writes_nothing() -> None:
    world = World()
    world.offer("shop.cart", [{"request_id": "a", "user_id": 1}, {"request_id": "b", "user_id": 2}], "c")
    world.offer("shop.impression", [impression(1, item_id="x")], "c2")
    trial = world.retry().dry_run(ALL)
    assert (trial.offered, trial.appended, trial.refused, trial.dry_run) == (3, 2, {"bad_type": 1}, True)
    assert world.rows() == [] and world.marks() == [] and len(world.letters()) == 3
    assert world.retry().retry(Filter(offsets=frozenset({1}))).appended == 1
    report = world.retry().retry(Filter(tag="shop.cart"))
    assert (report.appended, report.skipped) == (1, {"retried before": 1})
    assert world.states() == {0: "retried", 1: "retried", 2: "open"}


def test_a_retry_before_the_fix_changes_nothing_but_names_its_attempts() -> None:
    world = World()
    world.offer("shop.cart", [{"request_id": "a", "user_id": 1}], "c")
    for _ in range(3):
        assert world.retry(project=PROJECT).retry(ALL).refused == {"undeclared": 1}
    told = [one.content for one in world.letters()]
    assert [one.attempts for one in told] == [0, 1, 2, 3] and [one.retry_of for one in told] == [-1, 0, 1, 2]
    assert world.retry(project=CORRECTED).retry(ALL).appended == 1
    assert len(world.rows()) == 1


def test_a_broker_that_takes_nothing_ends_the_lease_and_loses_nothing() -> None:
    world = World()
    world.offer("shop.cart", [{"request_id": "a", "user_id": 1}], "c")

    class Deaf(DryRunProducer):
        def poll(self, timeout_s: float) -> None:
            pass

    with pytest.raises(Unavailable, match="within half its lease"):
        world.retry(producer=Deaf()).retry(ALL)
    assert world.states() == {0: "retrying"}
    assert world.retry().retry(ALL).found_out == {"open": 1}
    assert len(world.rows()) == 1


LINE = '203.0.113.9 - - [14/Nov/2023:22:13:20 +0000] "GET /item/5?uid=1&rid={} HTTP/1.1" 200 51 "-" "{}"'
ROUTE = Route(
    path="/item/{item_id}",
    event="shop.impression",
    fields={"user_id": "query:uid", "request_id": "query:rid", "event_id": "query:rid"},
)


@pytest.mark.parametrize("turn", [2, 3, 4, 5])
def test_lines_whose_id_comes_from_the_line_are_found_again_after_a_kill(turn: int) -> None:
    """A mapping gives the event another id than the letter has; a killed retry's event must be known by that one."""
    world = World()
    corrected = msgspec.structs.replace(PROJECT, mappings=(AccessLog(tag="nginx", routes=(ROUTE,)),)).checked()
    world.offer("nginx", [{"log": LINE.format("q1", "curl")}, {"log": LINE.format("q2", "curl")}], "c")
    world.offer("nginx", [{"log": LINE.format("q3", "x").replace("/item", "/other")}, {"log": "garbage"}], "c2")
    dying = Dying(turn, Random(turn))
    writer = DyingWriter(world.log, world.epochs, dying)
    with pytest.raises(Killed):
        world.retry(project=corrected, producer=DyingProducer(world.log.producer(), dying), writer=writer).retry(ALL)
    world.clock.advance(40.0)
    world.retry(project=corrected).retry(ALL)
    assert sorted(one["event_id"] for one in world.rows()) == ["q1", "q2"]
    states = world.states()
    assert [states[offset] for offset in range(3)] == ["retried"] * 3
    assert [one.content.reason for one in world.letters() if states[one.offset] == "open"] == ["bad_line"]
