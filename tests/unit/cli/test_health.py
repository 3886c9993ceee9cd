"""Goal: /readyz and /healthz tell when a stage does not work, though it cannot say so itself.

Method: a clock turned by hand; brokers and stores that fail or hang on purpose; the port of a real metrics server.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import pytest

from headrace.backends.health import LOOP, LOOP_HEALTHY_S, LOOP_READY_S, BeatingStop, Health
from headrace.backends.log.receipts import TELL_S, Receipts
from headrace.backends.metrics_prometheus import PrometheusMetrics
from headrace.backends.reachable import KAFKA, KAFKA_READY_S, Reachable
from headrace.contract.errors import Unavailable
from headrace.deploy.local.readiness import http_get
from headrace.process.awake import Awake, awake_s


class Hand:
    """A clock."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def health(hand: Hand) -> Health:
    found = Health(hand)
    found.ready(True)
    return found


def test_own_word_is_passed_on(health: Health) -> None:
    assert health.state() == (True, "")
    health.ready(True, "tags held back: x")
    assert health.state() == (True, "tags held back: x")
    health.ready(False, "waiting for Kafka's group")
    assert health.state() == (False, "waiting for Kafka's group")
    assert health.trouble() == "", "a stage that waits is not restarted"


def test_a_loop_that_stands_is_red_first_and_restarted_later(hand: Hand, health: Health) -> None:
    stop = BeatingStop()
    assert not stop.is_set()
    stop.attach(health)
    hand.now_s += 1_000
    assert health.state()[0], "a loop that has not begun is not expected"
    for _ in range(1_000):
        assert not stop.is_set()
        hand.now_s += LOOP_READY_S - 1
        assert health.state()[0]
    hand.now_s += 2
    assert health.state() == (False, f"{LOOP}: no sign for {LOOP_READY_S + 1:.0f} s")
    assert health.trouble() == ""
    hand.now_s += LOOP_HEALTHY_S
    assert health.trouble().startswith(f"{LOOP}: no sign")
    stop.is_set()
    assert health.state()[0] and health.trouble() == ""
    stop.set()
    assert stop.is_set() and stop.wait(0)


def test_a_process_that_was_stopped_is_not_red_when_it_wakes() -> None:
    now_s = 100.0
    awake = Awake(lambda: now_s)
    health = Health(awake.monotonic)
    health.ready(True)
    health.expect(LOOP, ready_s=LOOP_READY_S, healthy_s=LOOP_HEALTHY_S)
    receipts = Receipts(monotonic=awake.monotonic)
    health.measure("receipts", lambda: receipts.still_s(1), ready_s=LOOP_READY_S)
    now_s += 3_600.0
    assert health.state() == (True, "") and health.trouble() == ""
    assert health.no_signs() == {LOOP: 1.0, "receipts": 1.0}
    for _ in range(int(LOOP_READY_S)):
        now_s += 1.0
        awake.stood_s()
    assert "loop: no sign for 16 s" in health.state()[1]
    assert signature(Health).parameters["monotonic"].default is awake_s
    assert signature(Receipts).parameters["monotonic"].default is awake_s


def test_another_thread_gives_no_sign_of_the_loop(hand: Hand, health: Health) -> None:
    stop = BeatingStop()
    stop.attach(health)
    stop.is_set()
    hand.now_s += LOOP_READY_S + 1
    with ThreadPoolExecutor(1) as pool:
        pool.submit(stop.is_set).result()
    assert not health.state()[0]


def test_a_broker_that_is_away_is_red_and_no_reason_to_restart(
    hand: Hand, health: Health, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [True]

    def ask() -> None:
        if not answers[0]:
            raise Unavailable("Kafka does not answer in 5 s")

    kafka = Reachable(KAFKA, ask, health, ready_s=KAFKA_READY_S)
    with caplog.at_level(logging.INFO):
        assert kafka.look()
        answers[0] = False
        for _ in range(10_000):
            assert not kafka.look()
            hand.now_s += 10
        is_ready, reason = health.state()
        assert not is_ready and "kafka: no sign" in reason and "does not answer in 5 s" in reason
        assert health.trouble() == ""
        assert health.no_signs()[KAFKA] == 100_000
        answers[0] = True
        assert kafka.look() and health.state()[0]
    assert len(caplog.records) == 2, "one line when it goes away, one when it is back"


def test_a_call_that_never_returns_is_red_too(hand: Hand, health: Health) -> None:
    let_go = threading.Event()
    store = Reachable("store", let_go.wait, health, ready_s=60.0)
    store.start()
    assert health.state() == (False, "store: no sign for 0 s"), "nobody knows yet"
    hand.now_s += 61
    assert health.state() == (False, "store: no sign for 61 s")
    store.stop()
    assert health.state()[0], "what ended in good order is not expected"
    let_go.set()


def test_whatever_asking_raises_the_thread_goes_on(hand: Hand, health: Health) -> None:
    def ask() -> None:
        raise RuntimeError("a bug of a client")

    thing = Reachable("store", ask, health, ready_s=5.0)
    assert not thing.look()
    hand.now_s += 6
    assert "RuntimeError: a bug of a client" in health.state()[1]


def test_a_thread_that_ended_makes_both_red(health: Health) -> None:
    alive = [True]
    health.thread("the counters", lambda: alive[0])
    assert health.state()[0]
    alive[0] = False
    assert health.state() == (False, "the counters has ended")
    assert health.trouble() == "the counters has ended"


def test_receipts_that_do_not_come_are_red_and_an_idle_producer_is_not(hand: Hand, health: Health) -> None:
    receipts, waiting = Receipts(monotonic=hand), [0]
    health.measure("receipts", lambda: receipts.still_s(waiting[0]), ready_s=15.0)
    hand.now_s += 1_000
    assert health.state()[0], "nobody waits"
    receipts.sends_first()
    waiting[0] = 5
    hand.now_s += 14
    assert health.state()[0]
    receipts.confirmed()
    hand.now_s += 14
    assert health.state()[0], "each receipt is a sign"
    hand.now_s += 2
    assert health.state() == (False, "receipts: no sign for 16 s")


def test_each_refused_receipt_counts_and_the_log_says_where_and_why(
    hand: Hand, caplog: pytest.LogCaptureFixture
) -> None:
    counted: list[str] = []
    receipts = Receipts(counted.append, hand)
    caplog.set_level(logging.ERROR, "headrace.kafka")
    for _ in range(1_000):
        receipts.refuse("events", 3, "MSG_SIZE_TOO_LARGE")
    receipts.refuse("events", 2, "MSG_SIZE_TOO_LARGE")
    hand.now_s += TELL_S
    receipts.refuse("events", 3, "MSG_SIZE_TOO_LARGE")
    assert counted == ["events"] * 1_002
    assert [record.getMessage() for record in caplog.records] == [
        "a record of events/3 was refused: MSG_SIZE_TOO_LARGE",
        "a record of events/2 was refused: MSG_SIZE_TOO_LARGE",
        "a record of events/3 was refused: MSG_SIZE_TOO_LARGE, and 999 more since the last line",
    ]


@pytest.fixture
def metrics() -> Iterator[PrometheusMetrics]:
    found = PrometheusMetrics("sink", 0)
    yield found
    found.close()


def page(metrics: PrometheusMetrics, path: str) -> tuple[int, str]:
    status, body = http_get(f"http://127.0.0.1:{metrics.port}{path}")
    return status, body.decode()


def test_the_port_answers_by_what_health_says(metrics: PrometheusMetrics, hand: Hand) -> None:
    metrics.health = Health(hand)
    assert page(metrics, "/readyz") == (503, "starting\n")
    assert page(metrics, "/healthz") == (200, "alive\n")
    metrics.ready(True)
    assert page(metrics, "/readyz") == (200, "ready\n")
    metrics.health.expect(LOOP, ready_s=1.0, healthy_s=10.0)
    hand.now_s += 11
    assert page(metrics, "/readyz") == (503, "loop: no sign for 11 s\n")
    assert page(metrics, "/healthz") == (503, "loop: no sign for 11 s\n")


def test_metrics_tell_what_the_probes_say_and_counters_begin_at_zero(metrics: PrometheusMetrics) -> None:
    metrics.health.expect(LOOP, ready_s=1.0)
    text = page(metrics, "/metrics")[1]
    assert "headrace_sink_ready 0.0" in text
    assert 'headrace_sink_no_sign_seconds{sign="loop"} 0.' in text
    assert "headrace_sink_rows_stored_total 0.0" in text, "increase() sees the first count only from a 0 before"
    metrics.ready(True)
    assert "headrace_sink_ready 1.0" in page(metrics, "/metrics")[1]
