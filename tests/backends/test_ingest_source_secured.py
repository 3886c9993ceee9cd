"""A foreign topic behind SASL: the source logs in with the name and the secret that the configuration says.

Goal: the right password reads, a wrong one reads nothing and says why, without the password. Method: a real broker
with one more listener.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import confluent_kafka as ck
import pytest
from local_world import free_base

from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.backends.log.group_kafka import KafkaGroup
from headrace.contract.config import port
from headrace.contract.interfaces.log import TopicSpec
from headrace.deploy.local import stack as local_stack
from headrace.deploy.local.doctor import free_port
from headrace.deploy.local.layout import HOST, Layout
from headrace.deploy.local.servers import kafka

pytestmark = pytest.mark.real

LOGIN = 'org.apache.kafka.common.security.plain.PlainLoginModule required user_shipper="right";'


@pytest.fixture
def secured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Return the addresses of the plain and of the secured listener of one broker."""
    base = free_base()
    extra = next(number for number in range(24_000, 24_900) if free_port(number))
    plain = kafka.settings

    def with_login(layout: Layout) -> dict[str, str]:
        made = plain(layout)
        made["listeners"] += f",SASL_PLAINTEXT://{HOST}:{extra}"
        made["advertised.listeners"] += f",SASL_PLAINTEXT://{HOST}:{extra}"
        made["listener.security.protocol.map"] += ",SASL_PLAINTEXT:SASL_PLAINTEXT"
        made["sasl.enabled.mechanisms"] = "PLAIN"
        made["listener.name.sasl_plaintext.plain.sasl.jaas.config"] = LOGIN
        return made

    monkeypatch.setattr(kafka, "settings", with_login)
    layout = Layout(
        home=tmp_path / "home",
        port_base=base,
        brokers=f"{HOST}:{port('kafka', base)}",
        store=f"file:{tmp_path}/store",
        webhdfs=None,
        project=tmp_path,
        own_kafka=True,
        own_hdfs=False,
    )
    try:
        local_stack.start(layout, (TopicSpec("weblogs", 1),), print, stages=False)
        yield layout.brokers, f"{HOST}:{extra}"
    finally:
        local_stack.stop(layout, print)


def group(brokers: str, password: str) -> KafkaGroup:
    """Join with a password."""
    client = {
        "security.protocol": "sasl_plaintext",
        "sasl.mechanism": "PLAIN",
        "sasl.username": "shipper",
        "sasl.password": password,
    }
    return KafkaGroup(brokers, "weblogs", f"g-{password}", client=client)


def test_the_right_password_reads_and_a_wrong_one_says_so(
    secured: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    plain, behind_login = secured
    KafkaAdmin(plain).ensure_topics([TopicSpec("weblogs", 1)])
    producer = ck.Producer({"bootstrap.servers": plain})
    producer.produce("weblogs", b"one")
    assert producer.flush(30) == 0
    good = group(behind_login, "right")
    deadline = time.monotonic() + 30
    while not (found := good.take(5)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [one.value for one in found] == [b"one"]
    good.close(10)
    with caplog.at_level(logging.WARNING):
        bad = group(behind_login, "wrong-secret")
        deadline = time.monotonic() + 30
        while "uthentication" not in caplog.text and time.monotonic() < deadline:
            assert bad.take(5) == []
            time.sleep(0.05)
        bad.close(5)
    assert "uthentication failed" in caplog.text and "wrong-secret" not in caplog.text
