"""Kafka on this machine: one KRaft node, broker and controller, loopback only."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from base64 import urlsafe_b64encode
from pathlib import Path

from headrace.backends.log.kafka import RECORD_BYTES_MAX
from headrace.contract.errors import Unavailable
from headrace.deploy.local.layout import HOST, Layout
from headrace.deploy.local.servers import room
from headrace.deploy.local.servers.java import Java

HEAP_MB = 512


def settings(layout: Layout) -> dict[str, str]:
    """Return server.properties. The log survives kill -9 of the broker: the page cache is the kernel's."""
    broker, controller = layout.port("kafka"), layout.port("kafka_controller")
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@{HOST}:{controller}",
        "listeners": f"PLAINTEXT://{HOST}:{broker},CONTROLLER://{HOST}:{controller}",
        "advertised.listeners": f"PLAINTEXT://{HOST}:{broker}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "controller.listener.names": "CONTROLLER",
        "log.dirs": str(layout.home / "kafka" / "data"),
        "auto.create.topics.enable": "false",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "4",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "group.initial.rebalance.delay.ms": "0",
        "group.min.session.timeout.ms": "1000",
        "message.max.bytes": str(RECORD_BYTES_MAX),
        "replica.fetch.max.bytes": str(RECORD_BYTES_MAX),
        "num.network.threads": "2",
        "num.io.threads": "4",
        # 16 MiB instead of 128: a quarter of this heap for topics of a few thousand keys would be waste.
        "log.cleaner.dedupe.buffer.size": "16777216",
        "log.segment.bytes": "134217728",
        "controlled.shutdown.enable": "false",
        # After kill -9 the controller takes no new registration of the broker before the dead one's session ends: 9 s
        # by default. 3 s, with six heartbeats in it, so that one late heartbeat on a busy machine fences nobody.
        "broker.session.timeout.ms": "3000",
        "broker.heartbeat.interval.ms": "500",
    }


def format_once(layout: Layout, java: Java, jars: Path) -> None:
    """Write the configuration, and format the storage when it is new. An unfinished format is done anew."""
    folder = layout.home / "kafka"
    folder.mkdir(exist_ok=True)
    file = folder / "server.properties"
    file.write_text("".join(f"{name}={value}\n" for name, value in settings(layout).items()))
    done = folder / "formatted"
    if done.exists():
        return
    shutil.rmtree(folder / "data", ignore_errors=True)
    cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A", 1)
    command = [
        *command_line(java, jars, folder, heap_mb=128, quick=True),
        *("kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(file)),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if ran.returncode:
        raise Unavailable(f"Kafka's storage was not formatted: {(ran.stderr or ran.stdout).strip()[-500:]}")
    done.write_text(f"{cluster}\n")


def start_command(layout: Layout, java: Java, jars: Path) -> list[str]:
    """Return the command line of the broker, which begins when the disk has room."""
    folder = layout.home / "kafka"
    return room.guarded(folder, [*command_line(java, jars, folder), "kafka.Kafka", str(folder / "server.properties")])


def command_line(java: Java, jars: Path, *before: Path, heap_mb: int = HEAP_MB, quick: bool = False) -> list[str]:
    """Return `java` with a bounded heap, warnings to stderr, and a class path of folders and jars."""
    simple = "-Dorg.slf4j.simpleLogger"
    return [
        java.path,
        f"-Xmx{heap_mb}m",
        *(("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1") if quick else ("-XX:+UseG1GC",)),
        "-XX:+ExitOnOutOfMemoryError",
        "-Djava.awt.headless=true",
        "-Djava.net.preferIPv4Stack=true",
        f"{simple}.defaultLogLevel=warn",
        f"{simple}.showDateTime=true",
        f"{simple}.dateTimeFormat=yyyy-MM-dd HH:mm:ss,SSS",
        "-cp",
        ":".join([*(str(folder) for folder in before), f"{jars}/*"]),
    ]
