"""Gateway: take events over Fluent forward, append them to Kafka in columnar batches, ack what Kafka has.

On SIGTERM it stops reading, appends what it holds, acks it, says goodbye to every partition and exits 0 in 5 seconds.
HEADRACE_SHARED_KEY in the environment asks every shipper for Fluent's shared-key handshake.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import threading

from headrace.backends.log_kafka import KafkaAdmin
from headrace.cli.runtime import HOST, add_common, open_runtime, stop_event
from headrace.contract.errors import Unavailable
from headrace.contract.log import TopicSpec
from headrace.ingest import server

HELP = "gateway: Fluent forward in, batches to Kafka out"
_RETRY_FIRST_S, _RETRY_MAX_S = 0.1, 2.0
_ADMIN_S = 2.0
"""One question to a broker that may be away: shorter than the 5 s in which a stage must stop."""

log = logging.getLogger("headrace.ingest")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_common(parser)
    parser.add_argument("--host", default=HOST, help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, help="port to listen on (24224, moved by PORT_BASE)")
    parser.add_argument("--name", help="this gateway's name in punctuation, stable over restarts (host name and port)")
    parser.add_argument("--share-port", action="store_true", help="let several gateways listen on the port; name each")


def main(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    runtime = open_runtime(args)
    stop = stop_event()
    metrics = runtime.metrics("ingest")
    metrics.ready(False, "waiting for Kafka")
    partitions = runtime.config.log.partitions
    if not _topics_exist(KafkaAdmin(runtime.brokers, timeout_s=_ADMIN_S), runtime.topics.specs(partitions), stop):
        return 0
    port = args.port or runtime.port("forward")
    producer = runtime.producer()
    place = server.Place(
        host=args.host,
        port=port,
        name=args.name or f"{socket.gethostname()}-{port}",
        shared_key=os.environ.get("HEADRACE_SHARED_KEY", ""),
        share_port=args.share_port,
    )
    try:
        server.run(
            runtime.project,
            runtime.config.ingest,
            runtime.topics,
            partitions,
            producer,
            metrics,
            runtime.clock,
            place,
            stop,
            lambda _port: metrics.ready(True),
        )
    finally:
        metrics.ready(False, "stopping")
        producer.close()
        metrics.close()
    return 0


def _topics_exist(admin: KafkaAdmin, specs: tuple[TopicSpec, ...], stop: threading.Event) -> bool:
    """Create the topics as soon as a broker answers; False when told to stop before."""
    wait_s = _RETRY_FIRST_S
    while not stop.is_set():
        try:
            admin.ensure_topics(specs)
        except Unavailable as error:
            if wait_s == _RETRY_FIRST_S:
                log.warning("waiting for Kafka: %s", error)
            stop.wait(wait_s)
            wait_s = min(_RETRY_MAX_S, wait_s * 2)
        else:
            return True
    return False
