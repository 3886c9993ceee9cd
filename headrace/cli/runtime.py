"""The runtime of a verb: the user's project, the addresses, and the backends that they choose."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.blobs_hdfs import PATIENCE_S, HdfsBlobs
from headrace.backends.clock import SystemClock
from headrace.backends.health import RECEIPTS, BeatingStop, Health
from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.backends.log.archived import ArchivedReader
from headrace.backends.log.fenced_kafka import FencedKafka
from headrace.backends.log.kafka import KafkaProducer, KafkaReader
from headrace.backends.metrics_prometheus import PrometheusMetrics
from headrace.backends.reachable import (
    KAFKA,
    KAFKA_READY_S,
    STORE,
    STORE_LOOK_S,
    STORE_READY_S,
    Reachable,
)
from headrace.cli.addresses import CEPHFS, find_addresses, find_home
from headrace.cli.project_folder import find_project, load_project
from headrace.cli.stage_topics import StageTopics, open_topics
from headrace.contract.config import Config, port
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.metrics import Stage
from headrace.contract.project import Project
from headrace.deploy.local.layout import cephfs_store, read_addresses, variant_port
from headrace.process.call_watch import LAKE_CALLS, LAKE_MAX_S, CallWatch

if TYPE_CHECKING:
    from headrace.backends.archive.delta import DeltaArchive
    from headrace.backends.lake.delta import DeltaLake
    from headrace.stream.stored_rules import StoredRules

_ANSWER_S = 5.0
_NO_BLOB = "probe/answers"
"""A name that nobody writes: a store that answers says that it is not there."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a verb runs with."""

    project: Project
    config: Config
    topics: Topics
    brokers: str
    store: str
    """`file:/absolute/path` or `hdfs://host:port/path`."""
    webhdfs: str | None
    home: Path
    """Local state, `.headrace`."""
    port_base: int | None
    project_dir: Path
    clock: SystemClock = field(default_factory=SystemClock)
    calls: CallWatch = field(default_factory=CallWatch)
    """Ends the process where a call of what is opened here never returns."""

    def port(self, name: str) -> int:
        """Return the port of `name` from the table of `headrace.contract.config`."""
        return port(name, self.port_base)

    def of_model(self, project: Project) -> Runtime:
        """Return the runtime of one of the project's models: with its name and recipe, and with its own topics."""
        return replace(self, project=project, topics=self.topics.of(project.model))

    def of_variant(self, name: str | None) -> Runtime:
        """Return the runtime of a declared variant's model; without a name that of the project's own recipe, which is a
        variant's that was promoted and moved, see `headrace.trainer.commit.decisions`.

        Raises `ConfigRejected` for a variant that is not declared, or whose model is the project's own; `Unavailable`.
        """
        from headrace.trainer.commit.decisions import home_of, knows_by, read_decisions

        reader = self.reader()
        decisions = read_decisions(reader, self.topics, self.project.name)
        home = home_of(self.project, decisions, knows_by(self.blobs(), reader, self.topics))
        reader.close()
        if name and name == home.variant:
            raise ConfigRejected(
                f"variant {name!r} was promoted and is the project's own recipe now: leave --variant out. Its trainer "
                f"beside is not needed any more: `headrace stop train@{name}`, then `headrace restart train`."
            )
        return self.of_model(self.project.of_variant(name) if name else home)

    def metrics(self, stage: Stage, *, variant: str = "") -> PrometheusMetrics:
        """Start the stage's /metrics, /readyz and /healthz; of the trainer of a variant on that one's own port."""
        at = self.port(f"metrics_{stage}")
        if variant:
            saved = read_addresses(self.home)
            at = self.port(variant_port(variant, saved.variants if saved is not None else (), self.project.variants))
        metrics = PrometheusMetrics(stage, at)
        self.calls.tell = partial(metrics.set, "call_age_seconds")
        return metrics

    def producer(self, metrics: PrometheusMetrics | None = None, *, linger_ms: float = 2.0) -> KafkaProducer:
        """Return a producer of these brokers. With a stage's metrics it counts refusals there, and its standstill makes
        the stage's /readyz red."""
        if metrics is None:
            return KafkaProducer(self.brokers, linger_ms=linger_ms)
        producer = KafkaProducer(
            self.brokers, linger_ms=linger_ms, refused=lambda topic: metrics.add("receipts_refused_total", topic=topic)
        )
        metrics.health.measure(RECEIPTS, producer.still_s, ready_s=KAFKA_READY_S)
        return producer

    @contextmanager
    def reachable(self, health: Health, *, store: bool = True) -> Iterator[None]:
        """Ask the brokers, and the store, all the while, and make the stage's /readyz red where one does not answer."""
        admin = self.admin(timeout_s=_ANSWER_S)
        found = [Reachable(KAFKA, admin.answers, health, ready_s=KAFKA_READY_S)]
        if store:
            blobs = open_blobs(self.store, self.webhdfs, patience_s=_ANSWER_S)
            ask = partial(blobs.get, _NO_BLOB)
            found.append(Reachable(STORE, ask, health, ready_s=STORE_READY_S, look_s=STORE_LOOK_S))
        for each in found:
            each.start()
        try:
            yield
        finally:
            for each in found:
                each.stop()

    def reader(self) -> KafkaReader:
        """Return a reader of these brokers."""
        return self.calls.wrap("reader", KafkaReader(self.brokers))

    def verbatim_reader(self) -> KafkaReader:
        """Return a reader that gives records with all that the broker keeps of them."""
        return self.calls.wrap("reader", KafkaReader(self.brokers, verbatim=True))

    def event_reader(self, holder: str) -> ArchivedReader:
        """Return a reader of these brokers that reads `events` from the archive where the topic no longer has them;
        `holder` names its lease."""
        events = self.topics.events
        archive = self.archive(events_id=self.admin().topic_id(events))
        return ArchivedReader(self.reader(), archive, events, holder=holder)

    def fenced(self, topic: str, writer_id: str) -> FencedKafka:
        """Return the fenced writer of a topic, which fences nobody before it is opened."""
        return self.calls.wrap(topic, FencedKafka(self.brokers, topic, writer_id))

    def admin(self, *, timeout_s: float = 20.0) -> KafkaAdmin:
        """Return an admin of these brokers that creates topics as `[log]` says."""
        log = self.config.log
        admin = KafkaAdmin(
            self.brokers,
            replication=log.replication,
            min_insync_replicas=log.min_insync_replicas,
            timeout_s=timeout_s,
        )
        return self.calls.wrap("admin", admin)

    def open_topics(self, *, ids_of: Sequence[str] = (), kept_of: Sequence[str] = ()) -> StageTopics:
        """Create the topics that are missing, and return what the log says of those that are named."""
        partitions = self.config.log.partitions
        return open_topics(self.admin(), self.topics, partitions, ids_of=ids_of, kept_of=kept_of)

    def stored_rules(self) -> list[StoredRules]:
        """Return by which rules the join's stored states were made. Raises `Unavailable`."""
        from headrace.stream.stored_rules import stored_rules

        return stored_rules(self.blobs(), self.topics.generation, self.config.log.partitions)

    def require_kafka(self) -> None:
        """Ask a broker once, for a verb that somebody waits for. Raises `Unavailable` after 5 s without an answer."""
        self.admin(timeout_s=_ANSWER_S).answers()

    def blobs(self) -> Blobs:
        """Return the store's blobs, below `<store>/blobs`."""
        return self.calls.wrap("blobs", open_blobs(self.store, self.webhdfs))

    def lake(self, *, samples_id: str = "", with_leases: bool = True) -> DeltaLake:
        """Return the store's lake, with the leases of its readers beside it; see `DeltaLake` for `samples_id`."""
        # Here, since most verbs have no lake and the library takes half a second to load.
        from headrace.backends.delta.leases import Leases
        from headrace.backends.lake.delta import DeltaLake
        from headrace.kernels.sample_ids import id_hashes

        lake = DeltaLake(
            self.lake_uri,
            generation=self.topics.generation,
            partitions=self.config.log.partitions,
            config=self.config.lake,
            samples_id=samples_id,
            hash_ids=id_hashes,
            leases=Leases(self.blobs(), self.clock, lease_ms=self.config.lake.lease_ms) if with_leases else None,
        )
        return self.calls.wrap("lake", lake, dict.fromkeys(LAKE_CALLS, LAKE_MAX_S))

    def archive(self, *, events_id: str = "", with_leases: bool = True) -> DeltaArchive:
        """Return the store's archive of events; see `DeltaArchive` for `events_id`."""
        from headrace.backends.archive.delta import DeltaArchive
        from headrace.backends.delta.leases import Leases

        config = msgspec.structs.replace(self.config.lake, retention_ms=self.config.archive.retention_ms)
        leases = Leases(self.blobs(), self.clock, lease_ms=config.lease_ms, table="events") if with_leases else None
        archive = DeltaArchive(
            f"{self.store.removeprefix('file:')}/lake/events",
            self.topics.events,
            generation=self.topics.generation,
            partitions=self.config.log.partitions,
            config=config,
            leases=leases,
            events_id=events_id,
        )
        return self.calls.wrap("archive", archive, {"read": LAKE_MAX_S})

    @property
    def lake_uri(self) -> str:
        """Where the Delta table of samples lies: a path, or an hdfs:// address."""
        return f"{self.store.removeprefix('file:')}/lake/samples"

    @property
    def tensorboard_dir(self) -> Path:
        """Where the trainer writes its scalars and TensorBoard reads them."""
        return self.home / "tensorboard"


def open_blobs(store: str, webhdfs: str | None, *, patience_s: float = PATIENCE_S) -> Blobs:
    """Return the blobs of a store; `patience_s` bounds how long one that is away is asked.

    Raises `ConfigRejected` for an address of another kind.
    """
    if store.startswith("file:"):
        return FileBlobs(Path(store.removeprefix("file:")) / "blobs")
    if store.startswith("hdfs://"):
        host, _, path = store.removeprefix("hdfs://").partition("/")
        at = webhdfs or f"http://{host.partition(':')[0]}:9870"
        return HdfsBlobs(at, f"{path}/blobs", patience_s=patience_s)
    raise ConfigRejected(f"STORE is {store!r}; it is file:/absolute/path or hdfs://host:port/path.")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every stage has."""
    parser.add_argument("--project", metavar="DIR", help="folder with headrace.toml (HEADRACE_PROJECT; examples/shop)")
    parser.add_argument("--brokers", help="Kafka's addresses (HEADRACE_BROKERS)")
    parser.add_argument("--store", help="file:/path or hdfs://host:port/path (HEADRACE_STORE)")
    parser.add_argument("--webhdfs", help="http://host:port of the NameNode (HEADRACE_WEBHDFS)")
    parser.add_argument("--home", metavar="DIR", help="local state (HEADRACE_HOME; .headrace)")
    parser.add_argument("--port-base", type=int, help="moves all ports together (PORT_BASE)")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])


def add_variant(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the flag that names one of the project's variants."""
    parser.add_argument("--variant", metavar="NAME", help=f"{what} this declared variant, not the project's own recipe")


def open_runtime(args: argparse.Namespace) -> Runtime:
    """Return the runtime that flags and environment describe; sets logging up. Raises `ConfigRejected`."""
    set_logging(getattr(args, "log_level", "INFO"))
    home = find_home(getattr(args, "home", None))
    at = find_addresses(args, home)
    project_dir = find_project(at.project)
    config, project = load_project(project_dir)
    return Runtime(
        project=project,
        config=config,
        topics=Topics(config.log.generation),
        brokers=at.brokers,
        store=cephfs_store(home) if at.store == CEPHFS else at.store,
        webhdfs=at.webhdfs,
        home=home,
        port_base=at.port_base,
        project_dir=project_dir,
    )


def set_logging(level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO") -> None:
    """Log to stderr, one line an event."""
    logging.basicConfig(level=level, format=LOG_FORMAT, stream=sys.stderr, force=True)
    logging.getLogger("hdfs").setLevel(logging.WARNING)  # It tells each request at INFO.


def stop_event() -> BeatingStop:
    """Return an event that SIGTERM and SIGINT set: the stage then has 5 s to stop cleanly.

    Attached to a stage's health, it also says that the stage's loop turns.
    """
    stop = BeatingStop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
