"""Goal: the probes of each stage are red when it does not work, and why is said.

Method: gateway, trainer and serving over logs and stores in memory that fail on purpose; what stands in Faust's or
Twisted's loop runs on real Kafka in tests/backends/test_health_real.py. That each stage is wired is read from its text.
"""

from __future__ import annotations

import inspect
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from gateway_world import Running, eventually, frame, read_value
from ingest_world import impression
from starlette.applications import Starlette
from trainer_world import World

from headrace.backends.health import LOOP, LOOP_HEALTHY_S, LOOP_READY_S, READING, BeatingStop, Health
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.backends.reachable import KAFKA, Reachable
from headrace.cli import consumer
from headrace.cli.runtime import open_blobs
from headrace.cli.stages import crawl, ingest, serve, train
from headrace.cli.stages.serve import ServeSigns
from headrace.contract.errors import Unavailable
from headrace.ingest.reading_watch import ReadingWatch
from headrace.serving.model.shared_region import Told
from headrace.serving.processes import answer_requests, listen
from headrace.trainer.run import Stopped, Trainer


class Hand:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("module", [consumer, ingest, crawl, train])
def test_each_stage_gives_signs_of_its_loop_and_asks_what_it_stands_on(module: object) -> None:
    text = inspect.getsource(module)  # type: ignore[arg-type]
    assert "stop.attach(" in text and ".reachable(" in text
    assert ".producer(metrics" in text.replace("self.metrics", "metrics"), "refused receipts are counted"


def test_the_gateway_is_red_while_it_reads_from_nobody() -> None:
    hand = Hand()
    health, stop = Health(hand), BeatingStop()
    health.ready(True)
    health.expect(READING, ready_s=5.0)
    stop.attach(health)
    looks = threading.Semaphore(0)

    def reads() -> None:
        health.seen(READING)
        looks.release()

    with (
        Running(companions=[ReadingWatch(reads)], stop=stop, buffer_bytes_max=20_000) as gateway,
        gateway.connect() as sock,
    ):
        assert looks.acquire(timeout=30)
        gateway.log.away = True
        sock.sendall(frame([impression(1, title="x" * 30_000)], "c1"))
        eventually(lambda: not gateway.loop.is_open(), "full")
        hand.now_s += 6
        eventually(lambda: health.no_signs()[LOOP] == 0, "the loop turns all the while")
        assert health.state() == (False, "reading: no sign for 6 s")
        assert health.trouble() == "", "a restart would not bring Kafka back"
        gateway.log.away = False
        assert read_value(sock) == {"ack": "c1"}
        eventually(lambda: health.state()[0], "reading goes on")


def test_a_gateway_whose_loop_stands_is_restarted() -> None:
    hand = Hand()
    health, stop = Health(hand), BeatingStop()
    armed, stands, let_go = threading.Event(), threading.Event(), threading.Event()
    health.ready(True)
    stop.attach(health)

    def stand() -> None:
        if armed.is_set():
            stands.set()
            let_go.wait(30)

    with Running(companions=[ReadingWatch(stand)], stop=stop):
        eventually(lambda: LOOP in health.no_signs(), "the loop has begun")
        armed.set()
        assert stands.wait(30)
        hand.now_s += LOOP_HEALTHY_S + 1
        assert not health.state()[0] and LOOP in health.trouble()
        let_go.set()
        eventually(lambda: not health.trouble(), "it turns again")


class StopsAfter(BeatingStop):
    """A stop that is asked a number of times, each a second after the other."""

    def __init__(self, hand: Hand, turns: int) -> None:
        super().__init__()
        self.hand, self.left = hand, turns

    def is_set(self) -> bool:
        self.hand.now_s += 1
        self.left -= 1
        if self.left <= 0:
            self.set()
        return super().is_set()


def test_a_trainer_without_its_broker_turns_on_and_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    hand, world = Hand(), World()
    health = Health(hand)
    stop = StopsAfter(hand, 60)
    metrics = MemoryMetrics()
    monkeypatch.setattr(metrics, "ready", health.ready)
    trainer = Trainer(world.deps(stop=stop, metrics=metrics))
    stop.attach(health)
    said: list[tuple[bool, str]] = []

    def ask() -> None:
        if stop.left < 50:
            raise Unavailable("Kafka does not answer")

    kafka = Reachable(KAFKA, ask, health, ready_s=15.0)

    def away() -> bool:
        kafka.look()
        said.append(health.state())
        if stop.left < 50:
            raise Unavailable("Kafka does not answer")
        return False

    monkeypatch.setattr(trainer, "turn", away)
    with suppress(Stopped):
        trainer.run()
    assert said[-1] != said[0] and (True, "") in said, "before the broker went away"
    assert not said[-1][0] and "kafka: no sign for" in said[-1][1]
    assert health.trouble() == "" and health.no_signs()[LOOP] < LOOP_READY_S


def test_a_worker_of_serving_that_stands_is_red_and_restarted() -> None:
    hand = Hand()
    health = Health(hand)
    health.ready(True)
    signs = ServeSigns(health, workers=2)

    def told(worker: int, ago_s: float) -> Told:
        return Told(worker, 0, 0, round((hand.now_s - ago_s) * 1_000))

    for _ in range(300):
        hand.now_s += 1
        # Worker 7 is of an earlier stage that had more of them.
        signs.look([told(0, 0.5), told(1, 0.5), told(2, 1.0), told(7, 9_000)], round(hand.now_s * 1_000))
        assert health.state()[0]
    stands_s = hand.now_s
    while hand.now_s < stands_s + LOOP_HEALTHY_S + LOOP_READY_S + 1:
        hand.now_s += 1
        signs.look([told(1, 0.5), told(2, hand.now_s - stands_s)], round(hand.now_s * 1_000))
    assert not health.state()[0] and health.trouble().startswith("worker 2: no sign")


def test_the_loop_that_answers_requests_gives_signs(tmp_path: Path) -> None:
    turned, stop = threading.Event(), threading.Event()

    def end() -> None:
        assert turned.wait(30)
        raise RuntimeError("ends the stage")

    listener: socket.socket = listen("127.0.0.1", 0)
    assert answer_requests(Starlette(), listener, stop, jobs={"end": end}, turned=turned.set) == 1
    assert turned.is_set()


def test_serving_says_that_its_own_loop_is_watched() -> None:
    text = inspect.getsource(serve)
    assert "expect(LOOP" in text and "turned=partial(metrics.health.seen, LOOP)" in text


def test_a_store_that_answers_says_that_the_name_of_the_question_is_not_there(tmp_path: Path) -> None:
    assert open_blobs(f"file:{tmp_path}", None, patience_s=1.0).get("probe/answers") is None
