"""Goal: on real Kafka and HDFS the probes of every stage tell of a broker, a store and a stage that stand still, and
nothing is restarted but the stage.

Method: a whole stack; broker, NameNode and a stage get SIGSTOP, which no client can tell from a slow one. What is
waited for is what probes and `status` say; the bounds are for machines that are busy.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import confluent_kafka.admin as ck_admin
import pytest
from local_world import own_layout

from headrace.backends.log.kafka import KafkaProducer
from headrace.contract.formats.topics import Topics
from headrace.deploy.local import readiness
from headrace.deploy.local import stack as local_stack
from headrace.deploy.local.layout import HOST, Layout
from headrace.deploy.local.readiness import http_get
from headrace.deploy.local.supervise import Supervisor
from headrace.serving.model.region_file import region_in_memory

pytestmark = [pytest.mark.real, pytest.mark.long, pytest.mark.timeout(1_800)]

STAGES = ("ingest", "stream", "aggregate", "sink", "crawl", "train", "shop", "serve")
ON_KAFKA = ("ingest", "stream", "aggregate", "sink", "crawl", "train")
ON_STORE = ("stream", "aggregate", "sink", "crawl", "train")
NEVER_S = 300.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Layout]:
    layout = own_layout(tmp_path_factory.mktemp("whole") / "home")
    try:
        os.environ["RATE"] = "20"
        local_stack.start(layout, Topics().specs(2), print, stages=STAGES)
        yield layout
    finally:
        os.environ.pop("RATE")
        local_stack.stop(layout, print)
        region_in_memory(layout.home).unlink(missing_ok=True)


def awaited(holds: Callable[[], object], what: Callable[[], object]) -> None:
    until = time.monotonic() + NEVER_S
    while not holds():
        assert time.monotonic() < until, what()
        time.sleep(0.5)


@contextmanager
def stopped(layout: Layout, name: str) -> Iterator[int]:
    """SIGSTOP a process for the block."""
    pid = Supervisor(layout).pids()[name]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def pids(layout: Layout) -> dict[str, int]:
    return {name: pid for name, pid in Supervisor(layout).pids().items() if name in STAGES}


def reasons(layout: Layout, stages: tuple[str, ...]) -> dict[str, str]:
    probes = readiness.stage_probes(layout)
    return {stage: probes[stage]() for stage in stages}


def unhealthy(layout: Layout) -> list[str]:
    found = {s: http_get(f"http://{HOST}:{layout.port(f'metrics_{s}')}/healthz", 5.0) for s in STAGES}
    return [f"{stage}: {body!r}" for stage, (status, body) in found.items() if status == 503]


def all_ready(layout: Layout) -> None:
    awaited(lambda: not any(reasons(layout, STAGES).values()), lambda: reasons(layout, STAGES))


@pytest.mark.parametrize(("name", "sign", "red"), [("kafka", "kafka", ON_KAFKA), ("namenode", "store", ON_STORE)])
def test_who_stands_on_what_is_stopped_is_red_and_not_restarted(
    whole: Layout, name: str, sign: str, red: tuple[str, ...]
) -> None:
    all_ready(whole)
    seen: set[str] = set()

    def all_seen() -> bool:
        assert unhealthy(whole) == [], "a restart would not bring it back"
        seen.update(stage for stage, reason in reasons(whole, red).items() if f"{sign}: no sign" in reason)
        # Stages that have waited for the store for 45 s end by themselves, so they need not be red all at once.
        return seen == set(red)

    with stopped(whole, name):
        awaited(all_seen, lambda: (seen, reasons(whole, red)))
        assert reasons(whole, ("serve",)) == {"serve": ""}, "serving answers with its last version"
    all_ready(whole)
    text = http_get(f"http://{HOST}:{whole.port('metrics_watch')}/metrics")[1].decode()
    restarts = re.findall(r"^headrace_watch_unhealthy_restarts_total\{.*\} (\S+)$", text, re.MULTILINE)
    assert restarts and set(restarts) == {"0.0"}, "nothing was restarted from outside"


def test_a_stage_that_is_stopped_is_started_anew_and_status_says_so(whole: Layout) -> None:
    all_ready(whole)
    before = pids(whole)
    with stopped(whole, "sink") as pid:
        awaited(lambda: pids(whole).get("sink", pid) != pid, lambda: Supervisor(whole).processes())
    crashes = {p.name: p.crashes for p in Supervisor(whole).processes()}["sink"]
    assert crashes.total >= 1 and (crashes.last_exit, crashes.last_pid) == ("SIGKILL", pid)
    all_ready(whole)
    assert {name: at for name, at in pids(whole).items() if name != "sink"} == {
        name: at for name, at in before.items() if name != "sink"
    }
    text = http_get(f"http://{HOST}:{whole.port('metrics_watch')}/metrics")[1].decode()
    assert 'headrace_watch_unhealthy_restarts_total{process="sink"} 1.0' in text


def test_a_record_that_the_broker_refuses_is_logged_and_counted(
    whole: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    admin = ck_admin.AdminClient({"bootstrap.servers": whole.brokers})
    made = admin.create_topics([ck_admin.NewTopic("small", 2, 1, config={"max.message.bytes": "1000"})])  # type: ignore[attr-defined]
    made["small"].result(30)
    counted: list[str] = []
    told: list[Exception | None] = []
    producer = KafkaProducer(whole.brokers, refused=counted.append)
    producer.send("small", 1, os.urandom(5_000), delivered=lambda error, _: told.append(error))
    producer.send("small", 1, os.urandom(5_000))
    assert producer.flush(30) == 0
    assert counted == ["small", "small"] and told[0] is not None
    lines = [record.getMessage() for record in caplog.records if "was refused" in record.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("a record of small/1 was refused: ") and "MSG_SIZE" in lines[0]
    producer.close()


def test_a_stack_whose_home_moved_has_its_own_watch(whole: Layout, tmp_path: Path) -> None:
    assert not Supervisor(replace(whole, home=tmp_path)).running(), "another home's supervisor is not asked"
