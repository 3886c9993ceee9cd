"""Take events over Fluent forward, append them to Kafka in columnar batches, ack what Kafka has.

On SIGTERM it stops reading, appends what it holds, acks it, writes `bye` into every partition and exits 0 in 5 seconds.
Secrets come from the environment. HEADRACE_SHARED_KEY asks every shipper for Fluent's shared-key handshake,
HEADRACE_USERS (`name:password`, one a line or separated by commas) for a user as well. HEADRACE_PRIVACY_KEY hashes the
fields that the project declares private. HEADRACE_TLS_PASSWORD opens an encrypted TLS key. HEADRACE_TOKENS asks the
HTTP collector's clients for one of these tokens. TLS begins with `ingest.tls_cert` and `ingest.tls_key` in
headrace.toml, or the flags.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from headrace.backends.health import READING, Health
from headrace.backends.log.group_kafka import KafkaGroup
from headrace.backends.metrics_prometheus import PrometheusMetrics
from headrace.cli.addresses import HOST
from headrace.cli.runtime import Runtime, add_common, open_runtime, stop_event
from headrace.cli.stage_topics import open_topics
from headrace.cli.stored_ids import IdsOfLake, JoinedInStore
from headrace.contract.config import IngestConfig, SourceConfig
from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.contract.privacy import KEY_NAME, Privacy
from headrace.ingest.dead_letters.ceiling_watch import CeilingWatch
from headrace.ingest.dead_letters.settler import Clients, Settler
from headrace.ingest.forward.endpoint import Endpoint, read_users
from headrace.ingest.gateway.admission import Admission, Companion
from headrace.ingest.gateway.gateway_dependencies import GatewayDependencies
from headrace.ingest.gateway.late_events import LateEvents
from headrace.ingest.gateway.log_start import LogStart, read_start
from headrace.ingest.http.access import read_tokens
from headrace.ingest.http.collector import Collector, CollectorEndpoint
from headrace.ingest.reading_watch import ReadingWatch
from headrace.ingest.run import run
from headrace.ingest.sources.kafka_source import KafkaSource
from headrace.ingest.tls_identity import TlsIdentity
from headrace.process.watchdog import Watchdog

_RETRY_FIRST_S, _RETRY_MAX_S = 0.1, 2.0
_BEAT_S = 1.0
_ADMIN_S = 2.0
"""One question to a broker that may be away: shorter than the 5 s in which a stage must stop."""

_PAUSED_S = 5.0
"""Longest pause of reading that leaves /readyz green: Kafka confirms what a full buffer holds within a second."""

log = logging.getLogger("headrace.ingest")
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_common(parser)
    parser.add_argument("--host", default=HOST, help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, help="port to listen on (24224, moved by PORT_BASE)")
    parser.add_argument("--name", help="this gateway's name in punctuation, stable over restarts (host name and port)")
    parser.add_argument("--share-port", action="store_true", help="let several gateways listen on the port; name each")
    parser.add_argument("--socket", metavar="PATH", default="", help="listen on this Unix socket too, as Docker logs")
    parser.add_argument("--collector-port", type=int, help="HTTP collector (8088, moved by PORT_BASE; 0: none)")
    parser.add_argument("--metrics-port", type=int, help="port of /metrics (9101, moved by PORT_BASE)")
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate and chain, PEM (ingest.tls_cert)")
    parser.add_argument("--tls-key", metavar="FILE", help="private key, PEM (ingest.tls_key)")
    parser.add_argument("--tls-client-ca", metavar="FILE", help="ask for client certificates (ingest.tls_client_ca)")


def main(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    runtime = open_runtime(args)
    config = _with_tls(runtime.config.ingest, args, runtime.project_dir)
    identity = TlsIdentity(config, _secret("HEADRACE_TLS_PASSWORD")) if config.tls_cert else None
    port = args.port or runtime.port("forward")
    endpoint = Endpoint(
        host=args.host,
        port=port,
        name=args.name or f"{socket.gethostname()}-{port}",
        shared_key=_secret("HEADRACE_SHARED_KEY"),
        users=read_users(os.environ.get("HEADRACE_USERS", "")),
        share_port=args.share_port,
        socket_path=args.socket,
    ).checked()
    collector_endpoint = _collector_endpoint(args, runtime)
    privacy = Privacy(runtime.project, os.environ.get(KEY_NAME, ""))
    stop = stop_event()
    metrics = PrometheusMetrics("ingest", args.metrics_port or runtime.port("metrics_ingest"))
    metrics.ready(False, "waiting for Kafka")
    partitions = runtime.config.log.partitions
    starting = Watchdog()
    starting.start()
    admin = runtime.admin(timeout_s=_ADMIN_S)
    if once_kafka_answers(partial(open_topics, admin, runtime.topics, partitions), stop, starting.beat) is None:
        return 0
    start = _log_start(runtime, endpoint.name, stop, starting.beat)
    starting.stop()
    if start is None:
        return 0
    producer, late = runtime.producer(metrics), LateEvents(runtime.config.join.repeat_horizon_ms)
    deps = GatewayDependencies(
        project=runtime.project,
        config=config,
        topics=runtime.topics,
        partitions=partitions,
        producer=producer,
        metrics=metrics,
        clock=runtime.clock,
        privacy=privacy,
        start=start,
        instance=uuid.uuid4().hex[:12],
        broker_ms=producer.broker_ms,
        late=late,
    )
    settler = Settler(
        runtime.project,
        config,
        runtime.topics,
        partitions,
        open_clients=partial(_settler_clients, runtime),
        metrics=metrics,
        clock=runtime.clock,
        late=late,
        privacy=privacy,
    )
    try:
        watches = LoopWatch(), CeilingWatch(metrics, metrics.ready), _reading_watch(metrics.health)
        companions: list[Companion] = [*watches, settler, *_sources(runtime, metrics)]
        if collector_endpoint is not None:
            companions.append(Collector(config, collector_endpoint, metrics, runtime.clock, identity))
        stop.attach(metrics.health)
        with runtime.reachable(metrics.health, store=False):
            run(deps, endpoint, stop, ready=lambda _: metrics.ready(True), companions=companions, identity=identity)
    finally:
        metrics.ready(False, "stopping")
        producer.close()
        metrics.close()
    return 0


def _reading_watch(health: Health) -> ReadingWatch:
    """Make /readyz red while the gateway does not read, which is for longer than a moment."""
    health.expect(READING, ready_s=_PAUSED_S)
    return ReadingWatch(lambda: health.seen(READING))


class LoopWatch:
    """A companion that ends the process where the gateway's loop stands still, because a call on it does not return."""

    def __init__(self) -> None:
        self._watchdog = Watchdog()

    async def run(self, admission: Admission, stopping: asyncio.Event) -> None:
        """Beat until `stopping`; the end has bounds of its own."""
        self._watchdog.beat()
        self._watchdog.start()
        try:
            while not stopping.is_set():
                self._watchdog.beat()
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), _BEAT_S)
        finally:
            self._watchdog.stop()


def _with_tls(config: IngestConfig, args: argparse.Namespace, project_dir: Path) -> IngestConfig:
    """Return the configuration with the flags' TLS files; those of the TOML lie relative to its folder."""
    names = ("tls_cert", "tls_key", "tls_client_ca")
    files = {name: str(project_dir / getattr(config, name)) for name in names if getattr(config, name)}
    files |= {name: told for name in names if (told := getattr(args, name))}
    return msgspec.structs.replace(config, **files)


def _secret(name: str) -> str:
    """Return a secret of the environment as it is, and say where it may be more than was meant."""
    secret = os.environ.get(name, "")
    if secret != secret.strip():
        log.warning("%s begins or ends with a blank or a line break, as from a file; it counts as part of it", name)
    return secret


def _collector_endpoint(args: argparse.Namespace, runtime: Runtime) -> CollectorEndpoint | None:
    """Return where the collector listens, if there is one: a second gateway beside the first must name a port."""
    port = args.collector_port
    if port is None:
        if args.port and not args.share_port:
            log.info("no HTTP collector: this gateway has a --port of its own and no --collector-port")
            return None
        port = runtime.port("collector")
    tokens = read_tokens(os.environ.get("HEADRACE_TOKENS", ""))
    if not port:
        return None
    return CollectorEndpoint(host=args.host, port=port, tokens=tokens, share_port=args.share_port)


def _client(source: SourceConfig) -> dict[str, str]:
    """Return the connection's settings, each `$NAME` from the environment; `ConfigRejected` where it is not set."""
    client = dict(source.client)
    for name, text in client.items():
        if text.startswith("$"):
            if text[1:] not in os.environ:
                raise ConfigRejected(f"source {source.topic!r}: client {name!r} is {text}, which is not set.")
            client[name] = os.environ[text[1:]]
    return client


def _sources(runtime: Runtime, metrics: PrometheusMetrics) -> list[KafkaSource]:
    """Return what reads the foreign topics of `[[ingest.sources]]`."""
    sources = []
    for source in runtime.config.ingest.sources:
        open_group = partial(_open_group, source, runtime.brokers, _client(source))
        sources.append(KafkaSource(source, open_group, metrics, runtime.clock))
    return sources


def _open_group(source: SourceConfig, own_brokers: str, client: dict[str, str]) -> KafkaGroup:
    """Join the source's consumer group."""
    group = source.group or f"headrace-{source.topic}"
    return KafkaGroup(source.brokers or own_brokers, source.topic, group, start=source.start, client=client)


def _settler_clients(runtime: Runtime) -> Clients:
    """Return what looks late events up and writes down what came of them."""
    topic = runtime.topics.retries
    writer = runtime.fenced(topic, f"headrace-{topic}")
    joined = JoinedInStore(runtime.blobs, runtime.topics.generation)
    return Clients(runtime.producer(), runtime.reader(), writer, IdsOfLake(runtime.lake), joined)


def _log_start(runtime: Runtime, name: str, stop: threading.Event, alive: Callable[[], None]) -> LogStart | None:
    """Return what the log says of this gateway's time before; None when told to stop first."""
    reader = runtime.reader()
    try:
        return once_kafka_answers(lambda: read_start(reader, runtime.topics.events, name), stop, alive)
    finally:
        reader.close()


def once_kafka_answers(ask: Callable[[], T], stop: threading.Event, alive: Callable[[], None]) -> T | None:
    """Ask until Kafka answers; None when told to stop before. Before each question it says that it is `alive`."""
    wait_s = _RETRY_FIRST_S
    while not stop.is_set():
        alive()
        try:
            return ask()
        except Unavailable as error:
            if wait_s == _RETRY_FIRST_S:
                log.warning("waiting for Kafka: %s", error)
            stop.wait(wait_s)
            wait_s = min(_RETRY_MAX_S, wait_s * 2)
    return None
