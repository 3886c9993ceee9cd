"""Goal: only live gateways hold the watermark and it never goes back. Method: small examples."""

from __future__ import annotations

import msgspec

from headrace.contract.formats.events import Punctuation
from headrace.stream.join.watermark import Watermark


def times(*punctuations: Punctuation, silent_ms: int = 100) -> list[int]:
    watermark = Watermark(silent_ms)
    return [watermark.take(p) for p in punctuations]


def test_the_slowest_live_gateway_holds_it():
    assert times(Punctuation("a", 1, 50), Punctuation("b", 1, 40), Punctuation("a", 1, 90)) == [50, 50, 50]
    assert times(Punctuation("a", 1, 50), Punctuation("b", 1, 60), Punctuation("a", 1, 90)) == [50, 50, 60]


def test_a_silent_gateway_lets_go_and_a_goodbye_counts_once():
    words = [Punctuation("a", 1, 50), *(Punctuation("b", 1, t) for t in (60, 80, 100, 120, 140, 160, 161))]
    assert times(*words) == [50] * 7 + [161]
    assert times(Punctuation("a", 1, 50), Punctuation("a", 1, 70, bye=True), Punctuation("b", 1, 90)) == [50, 70, 90]


def test_a_clock_that_is_ahead_silences_nobody():
    words = [Punctuation(g, 1, t + (10_000 if g == "ahead" else 0)) for t in range(0, 500, 50) for g in ("b", "ahead")]
    assert times(*words)[::2] == list(range(0, 500, 50))


def test_the_first_gateway_back_after_a_day_waits_silent_ms_for_the_others():
    day = 86_400_000
    begin = [Punctuation("a", 1, 50), Punctuation("b", 1, 50), Punctuation("a", 1, 60)]
    back = [Punctuation("a", 1, day + t) for t in range(0, 100, 20)]
    assert times(*begin, *back) == [50] * 7 + [day + 80]
    assert times(*begin, *back[:4], Punctuation("b", 1, day + 70), back[4]) == [50] * 7 + [day + 60, day + 70]


def test_a_promise_that_stands_still_or_lies_far_behind_holds_nothing_for_ever():
    stuck = [Punctuation(g, 1, t if g == "a" else 10) for t in range(10, 200, 10) for g in ("a", "b")]
    assert times(*stuck)[-1] == 190
    late = [Punctuation(g, 1, t if g == "a" else t - 5_000) for t in range(6_000, 6_200, 10) for g in ("a", "b")]
    assert times(*late)[-1] == 6_190


def test_an_older_epoch_is_a_ghost():
    assert times(Punctuation("a", 2, 50), Punctuation("a", 1, 90), Punctuation("a", 3, 60)) == [50, 50, 60]


def test_state_survives_its_plain_form():
    first = Watermark(100)
    first.take(Punctuation("a", 1, 50))
    second = Watermark(100)
    first.take(Punctuation("b", 1, 60))
    second.load_plain(msgspec.json.decode(msgspec.json.encode(first.to_plain())))
    assert second.to_plain() == [list(part) if isinstance(part, tuple) else part for part in first.to_plain()]
    second.load_plain(first.to_plain()[:2])
    assert second.take(Punctuation("a", 1, 70)) == first.take(Punctuation("a", 1, 70)) == 60
