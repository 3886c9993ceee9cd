"""Goal: on a real broker, a retry of dead letters that is killed with SIGKILL anywhere, or runs twice at once, puts
each event into the log once; and an operator's way from `list` over a fix to a closed ledger works.

Method: letters of a gateway without sockets; retries as processes that kill themselves before or after each mark and
record; the command line in a project folder of its own.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from ingest_world import NOT_LATE, PROJECT, impression, message
from letters_world import P
from local_world import free_base
from retry_process import Turn, retry

from headrace.backends.clock import SystemClock
from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.backends.log.fenced_kafka import FencedKafka
from headrace.backends.log.kafka import KafkaProducer, KafkaReader
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.cli.main import main
from headrace.contract.config import IngestConfig, port
from headrace.contract.formats.events import PUNCTUATION, decode_batch
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import read_range
from headrace.contract.project import Project
from headrace.deploy.local.layout import Layout
from headrace.ingest.dead_letters.letters import read_letters
from headrace.ingest.dead_letters.settler import Clients, Settler
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.gateway.gateway_dependencies import GatewayDependencies
from headrace.ingest.gateway.late_events import LateEvents

pytestmark = pytest.mark.real
WORLDS = Path(__file__).resolve().parents[1] / "worlds" / "ingest"
CARTS = [{"request_id": f"r{n}", "user_id": n, "item_id": n} for n in range(6)]


class World:
    """Topics of one generation on the session's broker."""

    generations = iter(range(1_000, 100_000))

    def __init__(self, layout: Layout) -> None:
        self.brokers = layout.brokers
        self.generation = next(self.generations)
        self.topics = Topics(self.generation)
        KafkaAdmin(self.brokers).ensure_topics(self.topics.specs(P))

    def take(
        self, *chunks: tuple[str, list[Any]], project: Project = PROJECT, name: str = "g1", late: LateEvents = NOT_LATE
    ) -> None:
        """Let a gateway take chunks and say goodbye."""
        producer, clock = KafkaProducer(self.brokers), SystemClock()
        config = IngestConfig(grace_ms=0)
        deps = GatewayDependencies(
            project=project,
            config=config,
            topics=self.topics,
            partitions=P,
            producer=producer,
            metrics=MemoryMetrics(),
            clock=clock,
            late=late,
        )
        gateway = Gateway(deps, name)
        for number, (tag, found) in enumerate(chunks):
            what = message(tag, found, f"c{number}", clock.now_ms() // 1_000 - 5)
            gateway.offer(what, 100, Peer("10.0.0.1"), None)
        while not gateway.drained():
            producer.poll(0.05)
        gateway.goodbye()
        assert producer.flush(20) == 0
        producer.close()

    def rows(self) -> list[dict[str, Any]]:
        reader = KafkaReader(self.brokers)
        found: list[dict[str, Any]] = []
        for record in read_range(reader, self.topics.events):
            if record.value is not None and record.headers["kind"] != PUNCTUATION:
                found += decode_batch(record.value).to_pylist()
        reader.close()
        return found

    def letters(self) -> list[Any]:
        reader = KafkaReader(self.brokers)
        found = list(read_letters(reader, self.topics.dead_letters, reader.end_offsets(self.topics.dead_letters)[0]))
        reader.close()
        return found

    def clients(self) -> Clients:
        writer = FencedKafka(self.brokers, self.topics.retries, f"headrace-{self.topics.retries}")
        return Clients(KafkaProducer(self.brokers), KafkaReader(self.brokers), writer, None)

    def process(self, effect: int = 0, when: str = "after") -> subprocess.Popen[str]:
        words = [
            sys.executable,
            str(WORLDS / "retry_process.py"),
            self.brokers,
            str(self.generation),
            str(effect),
            when,
        ]
        return subprocess.Popen(
            words, cwd=WORLDS, env=os.environ | {"PYTHONPATH": str(WORLDS)}, stdout=-1, stderr=-1, text=True
        )


@pytest.fixture
def world(stack: Layout) -> World:
    return World(stack)


# 1 is the mark `retrying`; then come the records of the partitions and the newer letter of the event that is still bad,
# then the mark `retried`. To die before an effect is to die after the one that precedes it.
@pytest.mark.parametrize(
    ("effect", "when"),
    [
        (1, "before"),
        *((effect, "after") for effect in (1, 3, 6)),
        *(pytest.param(effect, "after", marks=pytest.mark.long) for effect in (2, 4, 5)),
    ],
)
def test_killed_at_any_step_each_event_is_in_the_log_once(world: World, effect: int, when: str) -> None:
    world.take(("shop.cart", [*CARTS, {"request_id": "bad", "user_id": 1, "item_id": "x"}]))
    victim = world.process(effect, when)
    out, error = victim.communicate(timeout=240)
    assert victim.returncode == -9, out + error
    report = retry(world.brokers, world.topics, Turn(0, False))
    assert Counter(row["request_id"] for row in world.rows()) == Counter(record["request_id"] for record in CARTS)
    states = Counter(letter.content.reason for letter in world.letters())
    assert states["undeclared"] == 7 and states["bad_type"] in (1, 2), report
    assert retry(world.brokers, world.topics, Turn(0, False)).appended == 0


def test_two_at_once_offer_a_letter_once(world: World) -> None:
    world.take(
        *(("shop.cart", [{"request_id": f"r{n}", "user_id": n} for n in range(k, k + 50)]) for k in (0, 50, 100))
    )
    both = [world.process(), world.process()]
    for one in both:
        one.communicate(timeout=240)
    retry(world.brokers, world.topics, Turn(0, False))
    assert Counter(row["request_id"] for row in world.rows()) == Counter(f"r{n}" for n in range(150))


@pytest.fixture
def project_dir(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: Layout) -> Iterator[Path]:
    """A project folder of this generation; `cart` is not declared yet."""
    for name in ("PORT_BASE", "HEADRACE_STORE", "HEADRACE_PRIVACY_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HEADRACE_BROKERS", stack.brokers)
    monkeypatch.setenv("HEADRACE_STORE", f"file:{tmp_path}/store")
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HEADRACE_PROJECT", str(tmp_path))
    (tmp_path / "headrace.toml").write_text(f"[log]\npartitions = {P}\ngeneration = {world.generation}\n")
    (tmp_path / "project.py").write_text("from ingest_world import PROJECT\n")
    yield tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_an_operators_way_from_the_list_to_a_closed_ledger(
    world: World, project_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.take(
        ("shop.cart", [*CARTS, {"request_id": "bytes", "user_id": 9, "note": b"\xff\x00"}]),
        ("shop.impression", [impression(1), impression(2, item_id="x")]),
        ("shop.cart", [{"request_id": "big", "user_id": 1, "note": "y" * 20_000}]),
    )
    listed = [msgspec.json.decode(line) for line in run(capsys, "dead-letters", "list", "--json").splitlines()]
    assert Counter(one["reason"] for one in listed) == {"undeclared": 8, "bad_type": 1}
    first = next(one for one in listed if one["tag"] == "shop.cart")
    assert first["record"] == CARTS[0] and first["state"] == "open" and "raw" not in first
    assert first["time_ns"] % 10**9 == 0 and first["time_ns"] > 10**18
    odd = next(one for one in listed if one.get("record", {}).get("request_id") == "bytes")
    assert odd["record"]["note"] == "\ufffd\x00" and odd["raw"]
    cut = next(one for one in listed if one["raw_truncated"])
    assert "record" not in cut and cut["raw"]
    table = run(capsys, "dead-letters", "list", "--reason", "undeclared", "--since", "1h")
    assert "no declared event has this tag" in table and "…" not in table and "8 letters" in table, (
        "piped: nothing is cut"
    )
    shown = run(capsys, "dead-letters", "show", first["id"])
    assert "declare one" in shown and '"request_id": "r0"' in shown
    assert "cannot be retried" in run(capsys, "dead-letters", "show", cut["id"])

    assert main(["dead-letters", "retry"]) == 2
    (project_dir / "project.py").write_text("from letters_world import CORRECTED as PROJECT\n")
    trial = msgspec.json.decode(run(capsys, "dead-letters", "retry", "--all", "--dry-run", "--json"))
    assert (trial["appended"], trial["refused"]) == (7, {"bad_type": 1}) and len(world.rows()) == 1
    done = msgspec.json.decode(run(capsys, "dead-letters", "retry", "--tag", "shop.cart", "--json"))
    assert (done["offered"], done["appended"]) == (7, 7) and len(done["skipped"]) == 1
    assert "7  retried before" in run(capsys, "dead-letters", "retry", "--all").replace("not offered: ", "")
    listed = [msgspec.json.decode(line) for line in run(capsys, "dead-letters", "list", "--json").splitlines()]
    assert Counter(one["state"] for one in listed) == {"retried": 7, "open": 2, "refused": 1}
    refused = [one["id"] for one in listed if one["state"] == "refused"]
    assert [one["retry_of"] for one in listed if one["attempts"]] == refused
    shown = run(capsys, "dead-letters", "show", first["id"])
    assert "nothing is left to do" in shown and "dead-letters retry" not in shown
    assert "retry_of" in run(capsys, "dead-letters", "show", refused[0])

    # A gateway of the corrected project goes on, so that the retried events are older than a second for the ledger.
    world.take(("shop.impression", [impression(3)]), name="g2")
    ledger = msgspec.json.decode(run(capsys, "ledger", "--json"))
    gateway = {name: ledger[name] for name in ("read", "appended", "dead_lettered", "repeated", "retried", "lost")}
    assert gateway == {"read": 11, "appended": 9, "dead_lettered": 2, "repeated": 0, "retried": 8, "lost": 0}
    assert ledger["dead_letters"] == {"undeclared": 1, "bad_type": 1}


@pytest.mark.long
def test_late_events_are_looked_up_in_the_log_and_settled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # The broker's clock is the gateway's, and the topic is a moment old.
    monkeypatch.setattr("headrace.ingest.dead_letters.look_up.EARLIER_MS", 0)
    world.take(("shop.impression", [impression(1)]))
    time.sleep(3.0)
    now_ms, late = SystemClock().now_ms(), LateEvents(1_000)
    again = [impression(1), *(impression(n, event_time_ms=now_ms - 1_500) for n in (2, 3, 2))]
    world.take(("shop.impression", again), name="g2", late=late)
    assert [letter.content.reason for letter in world.letters()] == ["too_late"] * 3 and late.written == 3
    metrics = MemoryMetrics()
    settler = Settler(
        PROJECT,
        IngestConfig(skew_ms=1),
        world.topics,
        P,
        open_clients=world.clients,
        metrics=metrics,
        clock=SystemClock(),
        late=late,
    )
    clients = world.clients()
    while settler.turn(clients):
        pass
    assert sorted(row["event_id"] for row in world.rows()) == ["e1", "e2", "e3"]
    assert (
        metrics.counters["late_settled_total", "new"] == 2 and metrics.counters["late_settled_total", "repeated"] == 1
    )
    assert not settler.turn(clients), "nothing waits"
    clients.close()


@pytest.mark.long
def test_a_running_gateway_settles_late_events(
    world: World, project_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = "[join]\nrepeat_horizon_ms = 4000\n[ingest]\nrepeat_horizon_ms = 1\n"
    toml = project_dir / "headrace.toml"
    toml.write_text(toml.read_text() + config)
    base = free_base()
    words = [sys.executable, "-m", "headrace.cli.main", "ingest", "--port-base", str(base), "--collector-port", "0"]
    env = os.environ | {"PYTHONPATH": str(WORLDS)}
    with subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True) as gateway:
        try:
            with connected(port("forward", base), gateway) as sock:
                for number in (1, 9):
                    # With the second one the gateway itself has forgotten the first.
                    send(sock, f"c{number}", impression(number, event_time_ms=SystemClock().now_ms()))
                    time.sleep(2.5)
                old_ms = SystemClock().now_ms() - 4_500
                send(sock, "c2", impression(1, event_time_ms=old_ms))
                send(sock, "c3", impression(2, event_time_ms=old_ms))
            until = time.monotonic() + 60.0
            while (told := settled(port("metrics_ingest", base))) != {"repeated": 1.0, "unknown": 1.0}:
                assert time.monotonic() < until, told
                time.sleep(0.2)
            gateway.terminate()
            _, error = gateway.communicate(timeout=30)
            assert gateway.returncode == 0, error
        finally:
            gateway.kill()
    assert sorted(row["event_id"] for row in world.rows()) == ["e1", "e9"]
    listed = [msgspec.json.decode(line) for line in run(capsys, "dead-letters", "list", "--json").splitlines()]
    assert Counter(one["state"] for one in listed) == {"retried": 1, "unknown": 1}
    run(capsys, "dead-letters", "retry", "--reason", "too_late", "--take")
    assert sorted(row["event_id"] for row in world.rows()) == ["e1", "e2", "e9"]


def connected(number: int, process: subprocess.Popen[str]) -> socket.socket:
    while process.poll() is None:
        try:
            return socket.create_connection(("127.0.0.1", number), 30.0)
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise AssertionError(process.communicate()[1])


def send(sock: socket.socket, chunk: str, record: dict[str, Any]) -> None:
    """Send one event and wait for its ack."""
    sock.sendall(msgpack.packb(["shop.impression", [[int(time.time()), record]], {"chunk": chunk}]))
    assert msgpack.unpackb(sock.recv(4_096)) == {"ack": chunk}


def settled(number: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{number}/metrics", timeout=5.0) as answer:
        text = answer.read().decode()
    found = re.findall(r'late_settled_total\{fate="(\w+)"\} (\S+)', text)
    return {fate: float(count) for fate, count in found if float(count)}
