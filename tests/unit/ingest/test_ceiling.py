"""Goal: a bad deploy is stopped, what is good goes on, and both open again. Method: the ceiling by itself, then the
gateway without sockets on a log and a clock in memory."""

from __future__ import annotations

from ingest_world import START_MS

from headrace.contract.config import IngestConfig
from headrace.ingest.dead_letters.ceiling import UNDECLARED, Ceiling

CONFIG = IngestConfig(dead_letter_events_min=100, dead_letter_window_ms=12_000, dead_letter_probe_ms=5_000)
TAGS = ("shop.impression", "shop.click")


def bad(ceiling: Ceiling, tag: str = "shop.click", events: int = 101, now_ms: int = START_MS) -> None:
    ceiling.note(tag, now_ms, dead=events, reason="bad_type")


def test_a_bad_tag_is_shut_and_its_neighbour_is_not() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    bad(ceiling, events=99)
    assert ceiling.allows("shop.click", 10, START_MS), "too few to tell"
    bad(ceiling, events=1)
    assert not ceiling.allows("shop.click", 10, START_MS)
    assert ceiling.allows("shop.impression", 10, START_MS)
    assert ceiling.allows("shop.cart", 10, START_MS), "what nobody declared has a window of its own"
    (alert,) = ceiling.alerts()
    assert (alert.tag, alert.reason, alert.share, alert.refused_events) == ("shop.click", "bad_type", 1.0, 10)
    assert "tag shop.click" in alert.text and "--reason bad_type" in alert.text


def test_a_share_at_the_bound_goes_on() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    for _ in range(50):
        ceiling.note("shop.click", START_MS, appended=10)
        bad(ceiling, events=10)
    assert ceiling.allows("shop.click", 1, START_MS)
    bad(ceiling, events=1)
    assert not ceiling.allows("shop.click", 1, START_MS)


def test_what_is_older_than_the_window_does_not_count() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    for second in range(0, 200, 12):
        bad(ceiling, events=90, now_ms=START_MS + second * 1_000)
    assert ceiling.alerts() == []


def test_a_probe_that_is_good_opens_and_one_that_is_bad_does_not() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    bad(ceiling)
    now_ms = START_MS + 5_000
    assert not ceiling.allows("shop.click", 10, now_ms - 1)
    assert ceiling.allows("shop.click", 10, now_ms)
    assert not ceiling.allows("shop.click", 10, now_ms), "one chunk only"
    bad(ceiling, events=10, now_ms=now_ms)
    assert not ceiling.allows("shop.click", 10, now_ms + 4_999)
    now_ms += 5_000
    assert ceiling.allows("shop.click", 10, now_ms)
    ceiling.note("shop.click", now_ms, appended=6)
    assert ceiling.alerts(), "no verdict before the whole probe is known"
    bad(ceiling, events=4, now_ms=now_ms)
    assert ceiling.alerts() == []
    assert all(ceiling.allows("shop.click", 1_000, now_ms) for _ in range(5))


def test_a_probe_that_never_tells_is_followed_by_another() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    bad(ceiling)
    assert ceiling.allows("shop.click", 10, START_MS + 5_000)
    assert not ceiling.allows("shop.click", 10, START_MS + 9_999)
    assert ceiling.allows("shop.click", 10, START_MS + 10_000)


def test_undeclared_tags_count_among_all_events_and_share_one_window() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    ceiling.note("shop.click", START_MS, appended=1_000)
    for number in range(1_000):
        ceiling.note(f"docker.{number}", START_MS, dead=1, reason=UNDECLARED)
    assert ceiling.allows("docker.1", 1, START_MS), "half of all is not beyond half"
    ceiling.note("docker.7\n", START_MS, dead=1, reason=UNDECLARED)
    assert not ceiling.allows("other", 1, START_MS)
    assert ceiling.allows("shop.click", 1, START_MS)
    (alert,) = ceiling.alerts()
    assert alert.tag == UNDECLARED and "docker.7?" in alert.text


def test_undeclared_tags_open_once_they_have_become_few() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    ceiling.note("x", START_MS, dead=200, reason=UNDECLARED)
    now_ms = START_MS
    for _ in range(10):
        now_ms += 5_000
        assert ceiling.allows("x", 50, now_ms), "a probe"
        ceiling.note("x", now_ms, dead=50, reason=UNDECLARED)
        assert not any(ceiling.allows("x", 50, now_ms + at) for at in (0, 1_000, 2_000))
    now_ms += 30_000
    assert ceiling.allows("x", 50, now_ms)
    assert ceiling.alerts() == []


def test_with_share_1_nothing_is_ever_shut() -> None:
    ceiling = Ceiling(IngestConfig(dead_letter_share_max=1.0, dead_letter_events_min=1), TAGS)
    bad(ceiling, events=10_000_000)
    assert ceiling.allows("shop.click", 1, START_MS)
