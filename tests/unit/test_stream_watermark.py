"""Goal: only live gateways hold the watermark and it never goes back. Method: small examples."""

from __future__ import annotations

from headrace.contract.events import Punctuation
from headrace.stream.watermark import Watermark


def times(*punctuations: Punctuation, silent_ms: int = 100) -> list[int]:
    watermark = Watermark(silent_ms)
    return [watermark.take(p) for p in punctuations]


def test_the_slowest_live_gateway_holds_it():
    assert times(Punctuation("a", 1, 50), Punctuation("b", 1, 40), Punctuation("a", 1, 90)) == [50, 50, 50]
    assert times(Punctuation("a", 1, 50), Punctuation("b", 1, 60), Punctuation("a", 1, 90)) == [50, 50, 60]


def test_a_silent_gateway_lets_go_and_a_goodbye_counts_once():
    assert times(Punctuation("a", 1, 50), Punctuation("b", 1, 60), Punctuation("b", 1, 151)) == [50, 50, 151]
    assert times(Punctuation("a", 1, 50), Punctuation("a", 1, 70, bye=True), Punctuation("b", 1, 90)) == [50, 70, 90]


def test_an_older_epoch_is_a_ghost():
    assert times(Punctuation("a", 2, 50), Punctuation("a", 1, 90), Punctuation("a", 3, 60)) == [50, 50, 60]


def test_state_survives_its_plain_form():
    first = Watermark(100)
    first.take(Punctuation("a", 1, 50))
    second = Watermark(100)
    second.load_plain(first.to_plain())
    assert second.take(Punctuation("a", 1, 70)) == first.take(Punctuation("a", 1, 70)) == 70
