"""Goal: a bad deploy is stopped, what is good goes on, and both open again. Method: the ceiling by itself, then the
gateway without sockets on a log and a clock in memory."""

from __future__ import annotations

from collections.abc import Iterable

from ingest_world import START_MS

from headrace.contract.config import IngestConfig
from headrace.ingest.dead_letters.ceiling import UNDECLARED, Ceiling
from headrace.ingest.dead_letters.origins import NETWORKS_MAX, ORIGINS_MAX

CONFIG = IngestConfig(dead_letter_events_min=100, dead_letter_window_ms=12_000, dead_letter_probe_ms=5_000)
TAGS = ("shop.impression", "shop.click")
A, B = "10.0.0.1", "10.0.0.2"


def bad(ceiling: Ceiling, tag: str = "shop.click", events: int = 101, now_ms: int = START_MS, origin: str = A) -> None:
    ceiling.note(tag, origin, now_ms, dead=events, reason="bad_type")


def test_a_bad_tag_is_shut_and_its_neighbour_is_not() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    bad(ceiling, events=99)
    assert ceiling.allows("shop.click", A, 10, START_MS), "too few to tell"
    bad(ceiling, events=1)
    assert not ceiling.allows("shop.click", A, 10, START_MS)
    assert ceiling.allows("shop.impression", A, 10, START_MS)
    assert ceiling.allows("shop.cart", A, 10, START_MS), "what nobody declared has a window of its own"
    (alert,) = ceiling.alerts(START_MS)
    assert (alert.tag, alert.reason, alert.share, alert.refused_events) == ("shop.click", "bad_type", 1.0, 10)
    assert "tag shop.click" in alert.text and "--reason bad_type" in alert.text


def test_a_share_at_the_bound_goes_on() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    for _ in range(50):
        ceiling.note("shop.click", A, START_MS, appended=10)
        bad(ceiling, events=10)
    assert ceiling.allows("shop.click", A, 1, START_MS)
    bad(ceiling, events=1)
    assert not ceiling.allows("shop.click", A, 1, START_MS)


def test_what_is_older_than_the_window_does_not_count() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    for second in range(0, 200, 12):
        bad(ceiling, events=90, now_ms=START_MS + second * 1_000)
    assert ceiling.alerts(START_MS) == []


def test_a_probe_that_is_good_opens_and_one_that_is_bad_does_not() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    bad(ceiling)
    now_ms = START_MS + 5_000
    assert not ceiling.allows("shop.click", A, 10, now_ms - 1)
    assert ceiling.allows("shop.click", A, 10, now_ms)
    assert not ceiling.allows("shop.click", A, 10, now_ms), "one chunk only"
    bad(ceiling, events=10, now_ms=now_ms)
    assert not ceiling.allows("shop.click", A, 10, now_ms + 4_999)
    now_ms += 5_000
    assert ceiling.allows("shop.click", A, 10, now_ms)
    ceiling.note("shop.click", A, now_ms, appended=6)
    assert ceiling.alerts(now_ms), "no verdict before the whole probe is known"
    bad(ceiling, events=4, now_ms=now_ms)
    assert ceiling.alerts(now_ms) == []
    assert all(ceiling.allows("shop.click", A, 1_000, now_ms) for _ in range(5))


def test_a_probe_that_never_tells_is_followed_by_another() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    bad(ceiling)
    assert ceiling.allows("shop.click", A, 10, START_MS + 5_000)
    assert not ceiling.allows("shop.click", A, 10, START_MS + 9_999)
    assert ceiling.allows("shop.click", A, 10, START_MS + 10_000)


def test_undeclared_tags_count_among_all_events_and_share_one_window() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    ceiling.note("shop.click", A, START_MS, appended=1_000)
    for number in range(1_000):
        ceiling.note(f"docker.{number}", A, START_MS, dead=1, reason=UNDECLARED)
    assert ceiling.allows("docker.1", A, 1, START_MS), "half of all is not beyond half"
    ceiling.note("docker.7\n", A, START_MS, dead=1, reason=UNDECLARED)
    assert not ceiling.allows("other", A, 1, START_MS)
    assert ceiling.allows("shop.click", A, 1, START_MS)
    (alert,) = ceiling.alerts(START_MS)
    assert alert.tag == UNDECLARED and "docker.7?" in alert.text


def test_undeclared_tags_open_once_they_have_become_few() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    ceiling.note("x", A, START_MS, dead=200, reason=UNDECLARED)
    now_ms = START_MS
    for _ in range(10):
        now_ms += 5_000
        assert ceiling.allows("x", A, 50, now_ms), "a probe"
        ceiling.note("x", A, now_ms, dead=50, reason=UNDECLARED)
        assert not any(ceiling.allows("x", A, 50, now_ms + at) for at in (0, 1_000, 2_000))
    now_ms += 30_000
    assert ceiling.allows("x", A, 50, now_ms)
    assert ceiling.alerts(now_ms) == []


def test_with_share_1_nothing_is_ever_shut() -> None:
    ceiling = Ceiling(IngestConfig(dead_letter_share_max=1.0, dead_letter_events_min=1), TAGS)
    bad(ceiling, events=10_000_000)
    assert ceiling.allows("shop.click", A, 1, START_MS)


# -- origins


def test_who_sends_good_events_passes_and_the_offender_supplies_no_probe_but_its_own() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    ceiling.note("shop.click", B, START_MS, appended=60)
    bad(ceiling, events=101, origin=A)
    assert not ceiling.allows("shop.click", A, 10, START_MS)
    assert ceiling.allows("shop.click", B, 10, START_MS)
    assert ceiling.allows("shop.click", "10.0.0.3", 10, START_MS), "nothing bad is known of it"
    now_ms = START_MS + 5_000
    assert ceiling.allows("shop.click", A, 10, now_ms), "its probe"
    ceiling.note("shop.click", B, now_ms, appended=500)
    assert not ceiling.allows("shop.click", A, 10, now_ms), "what others send does not open it"
    (alert,) = ceiling.alerts(START_MS)
    assert (alert.origins, alert.has_good) == (1, True) and f"the chunks of {A} stay unacked" in alert.text


def test_one_bad_request_of_a_tag_below_the_ceiling_shuts_nobody_out() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    ceiling.note("shop.click", B, START_MS, appended=1_000)
    bad(ceiling, events=900, origin=A)
    assert ceiling.allows("shop.click", A, 10, START_MS)


def test_each_origin_that_is_shut_out_opens_by_its_own_probe() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    for origin in (A, B):
        bad(ceiling, origin=origin)
    now_ms = START_MS + 5_000
    assert ceiling.allows("shop.click", A, 10, now_ms) and ceiling.allows("shop.click", B, 10, now_ms)
    ceiling.note("shop.click", A, now_ms, appended=10)
    bad(ceiling, events=10, now_ms=now_ms, origin=B)
    assert ceiling.allows("shop.click", A, 10, now_ms) and not ceiling.allows("shop.click", B, 10, now_ms)


def test_an_offender_that_went_away_is_forgotten() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    bad(ceiling)
    assert ceiling.alerts(START_MS)
    assert ceiling.alerts(START_MS + 13_000) == [] and ceiling.size == 0


def attack(ceiling: Ceiling, addresses: Iterable[str], chunk: int = 10) -> int:
    """Send a bad chunk from each address; return how many events were taken."""
    taken = 0
    for number, address in enumerate(addresses):
        now_ms = START_MS + number // 100
        if ceiling.allows("shop.click", address, chunk, now_ms):
            taken += chunk
            bad(ceiling, events=chunk, now_ms=now_ms, origin=address)
    return taken


def test_whoever_changes_its_address_does_not_get_round_it() -> None:
    for around in ("10.7.{}.{}", "2001:db8:{}:{}::1"):
        ceiling = Ceiling(CONFIG, TAGS)
        ceiling.note("shop.click", "192.168.0.1", START_MS, appended=60)
        assert attack(ceiling, (around.format(n // 200, n % 200) for n in range(4_000))) <= 300
        assert ceiling.allows("shop.click", "192.168.0.1", 10, START_MS)
        assert ceiling.allows("shop.click", "192.168.0.2", 10, START_MS), "an unknown one of another network"
        assert ceiling.size <= 100


def test_thousands_of_networks_cost_no_more_than_the_bound_says() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    addresses = (f"{1 + n % 200}.{n // 200 % 200}.0.{n % 250}" for n in range(12_000))
    most = (NETWORKS_MAX + 1) * CONFIG.dead_letter_events_min
    assert attack(ceiling, addresses) <= most + 200
    assert ceiling.size <= 2 * (ORIGINS_MAX + NETWORKS_MAX + 1)


def test_whoever_finds_the_table_full_is_judged_with_its_network() -> None:
    ceiling = Ceiling(CONFIG, TAGS)
    for number in range(ORIGINS_MAX):
        ceiling.note("shop.click", f"10.0.{number // 250}.{number % 250}", START_MS, appended=1)
    for number in range(100):
        bad(ceiling, events=20, origin=f"172.16.0.{number}")
    assert not ceiling.allows("shop.click", "172.16.9.9", 1, START_MS)
    assert ceiling.allows("shop.click", "10.0.0.1", 1, START_MS)
    assert "new ones of 172.16.0.0/16" in ceiling.alerts(START_MS)[0].text
