"""`headrace.toml`, decoded once into frozen structs that reject unknown keys. Every default is safe to run.

The environment is read by entry points only, for addresses: HEADRACE_BROKERS, HEADRACE_STORE, HEADRACE_WEBHDFS,
PORT_BASE, HEADRACE_HOME (where local state lies, `.headrace`).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from headrace.contract.errors import ConfigRejected

Millis = Annotated[int, Meta(gt=0, le=86_400_000)]
Count = Annotated[int, Meta(gt=0)]

PORTS: dict[str, int] = {
    "forward": 24224,
    "collector": 8088,
    "serving": 8080,
    "console": 8090,
    "tensorboard": 6006,
    "kafka": 9092,
    "kafka_controller": 9093,
    "namenode": 8020,
    "namenode_http": 9870,
    "datanode": 9866,
    "datanode_http": 9864,
    "datanode_ipc": 9867,
    "lighthouse": 29510,
    "supervisor": 9009,
    "metrics_ingest": 9101,
    "metrics_stream": 9102,
    "metrics_sink": 9103,
    "metrics_aggregate": 9104,
    "metrics_crawl": 9105,
    "metrics_train": 9106,
    "metrics_serve": 9107,
    "metrics_shop": 9108,
    "catalogue": 8091,
}
"""Every port, loopback by default. With PORT_BASE=n the i-th of this table moves to n + i."""


def port(name: str, base: int | None = None) -> int:
    """Return the port of `name`, moved by `base`.

    >>> port("serving"), port("serving", 30_000)
    (8080, 30002)
    """
    return PORTS[name] if base is None else base + list(PORTS).index(name)


class LogConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[log]"""

    partitions: Annotated[int, Meta(gt=0, le=256)] = 4
    """P of `events` and `samples`; fixed for a generation."""
    generation: Count = 1


class SourceConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[[ingest.sources]]: a Kafka topic that a shipper writes by itself, read into Headrace's own."""

    topic: Annotated[str, Meta(min_length=1, max_length=249)]
    format: Literal["json", "msgpack", "gelf", "raw", "otlp_json"] = "json"
    tag: str = ""
    """Tag of every record, or of those without `tag_field`."""
    tag_field: str = ""
    """Field of the record that holds its tag; taken out of the record."""
    time_field: str = "@timestamp"
    """Field that holds the time (json, msgpack), taken out of the record; without it Kafka's timestamp counts."""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of a time that is a number."""
    text_field: str = "message"
    """Field that gets the text where the shipper wrote nothing else (raw, otlp_json)."""
    brokers: str = ""
    """Addresses; empty: Headrace's own brokers."""
    group: str = ""
    """Consumer group, which all gateways share; empty: `headrace-` and the topic."""
    start: Literal["earliest", "latest"] = "earliest"
    """Where a partition begins that the group has never read."""
    in_flight_max: Count = 20_000
    """Most records read and without their receipts."""
    client: dict[str, str] = {}
    """librdkafka's settings of the connection, `security.protocol`, `sasl.*`, `ssl.*`; `$NAME` is the environment's."""

    def __post_init__(self) -> None:
        """Refuse a source whose records could have no tag, and settings that are not the connection's."""
        wrong = [name for name in self.client if not name.startswith(("security.", "sasl.", "ssl.", "client."))]
        if wrong:
            raise ValueError(f"source {self.topic!r}: client may set security.*, sasl.*, ssl.*, client.*, not {wrong}")
        if not (self.tag or self.tag_field):
            raise ValueError(
                f"source {self.topic!r} needs tag or tag_field: a shipper's message does not bring its tag"
            )


class IngestConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[ingest]"""

    batch_ms: Millis = 20
    """Longest time that an event waits for company."""
    batch_rows: Count = 2_000
    batch_bytes: Count = 900_000
    """Most bytes in one Kafka record; below the broker's 1 MB limit."""
    punctuate_ms: Millis = 100
    grace_ms: Annotated[int, Meta(ge=0, le=600_000)] = 2_500
    """Time after its start in which a gateway promises nothing, so that shippers reconnect and hand over what they
    held before the watermark jumps over the outage. More than `headrace.sender`'s longest back-off, 2 s."""
    skew_ms: Millis = 60_000
    """An event time further ahead of the gateway's clock is a dead letter (`future`)."""
    silent_ms: Millis = 10_000
    """A gateway whose punctuation is this far behind the others' no longer holds the watermark."""
    repeat_horizon_ms: Millis = 3_600_000
    """How long a gateway remembers chunks and event ids."""
    chunk_bytes_max: Count = 16_777_216
    """Largest message, compressed or not. 16 MiB."""
    buffer_bytes_max: Count = 134_217_728
    """Bytes read and not yet acked by Kafka, over all connections; beyond it the gateway stops reading."""
    connections_max: Count = 4_096
    """Most open connections. At the bound one that never sent a message gives way, else the new one is refused."""
    handshake_ms: Millis = 10_000
    """Longest time for TLS and the shared-key handshake."""
    message_ms: Millis = 60_000
    """Longest time from a message's first byte to its last, while the gateway reads. Between messages any time may
    pass."""
    tls_cert: str = ""
    """PEM file with the certificate and its chain; with one, the forward port speaks TLS 1.2 or newer and nothing else.
    A relative path begins at the project's folder."""
    tls_key: str = ""
    """PEM file with the private key; empty where it is in `tls_cert`."""
    tls_client_ca: str = ""
    """PEM file with the authorities of client certificates; with one, a shipper must show a certificate."""
    dead_letter_bytes: Count = 16_384
    """Most raw bytes kept of a refused event."""
    dead_letter_share_max: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.5
    """Share of a tag's events (of all events, for tags that nobody declares) that may become dead letters; beyond it
    the tag's chunks stay unacked with their shippers. 1 takes everything."""
    dead_letter_window_ms: Millis = 60_000
    """Time over which the share is counted."""
    dead_letter_events_min: Count = 5_000
    """Fewest events within that time of which a share says something."""
    dead_letter_probe_ms: Millis = 10_000
    """Time between chunks that are taken to see whether a tag is good again."""
    collector_bytes_max: Count = 1_048_576
    """Largest body of `POST /v1/events`, compressed or not. 1 MiB."""
    collector_requests_max: Count = 512
    """Most requests that wait for Kafka at once; beyond it the answer is 503, send again."""
    collector_connections_max: Count = 2_048
    """Most connections to the collector; beyond it the one that idles longest gives way."""
    cors_origins: tuple[str, ...] = ("http://127.0.0.1:*", "http://localhost:*")
    """Origins whose pages may send; `*` in one stands for a part of host or port, alone for every origin."""
    sources: tuple[SourceConfig, ...] = ()
    """Topics of shippers that are read into `events`, each a table of its own."""


class JoinConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[join]"""

    pending_max: Count = 2_000_000
    """Most impressions that wait for feedback in one partition."""
    early_feedback_ms: Millis = 600_000
    """How long feedback that came first waits for its impression, in watermark time. 10 minutes."""
    resolved_ms: Millis = 600_000
    """How long a resolved request is remembered, to know duplicates and late feedback from orphans."""
    repeat_horizon_ms: Millis = 3_600_000
    """How long event ids are remembered, in watermark time. One hour."""
    snapshot_ms: Millis = 5_000
    """Time between snapshots of the state."""
    payload_bytes: Count = 134_217_728
    """Bytes of waiting impressions that one partition keeps in memory; beyond it full pieces lie in a file. 128 MiB."""


class AggregateConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[aggregate]"""

    grid_ms: Millis = 1_000
    """Values are written at multiples of this event time, once all watermarks have passed it."""
    snapshot_ms: Millis = 5_000


class SinkConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[sink]"""

    commit_ms: Millis = 3_000
    """Longest time between commits to the lake while samples come."""
    commit_rows: Count = 200_000


class CrawlConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[crawl]: what all sources share; each source's own bounds are declared with it, see `headrace.contract.crawl`."""

    user_agent: Annotated[str, Meta(min_length=1, max_length=256)] = "headrace"
    """What sites and their robots.txt call us; put an address in it at which you can be asked to stop."""
    requests_max: Annotated[int, Meta(gt=0, le=512)] = 16
    """Most requests at once, over all hosts."""
    redirects_max: Annotated[int, Meta(ge=0, le=20)] = 5
    """Most redirects from an address to its document."""
    robots_ms: Annotated[int, Meta(ge=1_000, le=86_400_000)] = 3_600_000
    """How long a host's robots.txt is good for. One hour."""
    retry_first_ms: Millis = 5_000
    """Time until a document that failed is asked for again; it doubles with every further failure."""
    retry_max_ms: Millis = 600_000
    """Longest such time. 10 minutes."""
    bodies_per_page: Count = 5
    """Newest bodies of an address that are kept for extraction again."""
    outbox_max: Count = 50_000
    """Versions that wait for Kafka; beyond it nothing is fetched."""


class LakeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[lake]"""

    compact_ms: Annotated[int, Meta(ge=0, le=86_400_000)] = 60_000
    """Time between the sink's looks for hours of many small files; 0: only `headrace lake` does it."""
    compact_files: Annotated[int, Meta(ge=2)] = 8
    """Fewest small files of one hour that are worth writing anew as one."""
    target_file_bytes: Count = 134_217_728
    """Size that compaction aims at; a file of at least half of it is not small. 128 MiB."""
    vacuum_ms: Count = 3_600_000
    """How long a file stays that no version needs any more, or that a killed writer left; also the time between
    vacuums. More than the longest commit and the longest read without a lease. One hour."""
    history_ms: Annotated[int, Meta(ge=60_000)] = 86_400_000
    """How long a version's entry in Delta's log stays, for time travel and for leases. One day."""
    retention_ms: Annotated[int, Meta(ge=0)] = 0
    """Hours of event time that ended longer ago are dropped whole; 0 keeps everything."""
    lease_ms: Count = 86_400_000
    """How long a reader's lease of a version holds when it is not given back. One day."""


class TrainConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[train]"""

    wait_ms: Millis = 50
    """Longest time that samples wait for a step to fill."""
    publish_ms: Millis = 200
    """Time between deltas."""
    snapshot_ms: Millis = 30_000
    """Time between full snapshots; a checkpoint is written with each."""
    threads: Count = 1
    """Threads of the math library; part of what bit equality needs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the dense part is learnt. `auto`: CUDA where there is one. Bits are equal on machines of one kind only."""
    device_rows: Annotated[int, Meta(ge=0)] = 1_000_000
    """With CUDA: rows of each kind that are kept on the device, the most recently used; what one row takes is in
    trainer/README.md. 0: all rows stay on the host."""
    slices: Annotated[tuple[str, ...], Meta(max_length=8)] = ()
    """Impression fields by whose values the figures of progressive validation are told apart."""
    slice_values_max: Annotated[int, Meta(gt=0, le=256)] = 16
    """Most values of a field that are slices of their own: the first that are learnt. All others share one."""
    projector_ms: Annotated[int, Meta(ge=0)] = 60_000
    """Time between embeddings for TensorBoard's projector. 0: none."""


class ServeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[serve]"""

    workers: Annotated[int, Meta(gt=0, le=64)] = 1
    candidates_max: Count = 1_000
    rows_max: Count = 1_048_576
    """Rows that one copy of the table can hold."""


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. `module` and `object` name the user's Python file (beside the TOML) and its Project."""

    module: str = "project.py"
    object: str = "PROJECT"
    log: LogConfig = LogConfig()
    ingest: IngestConfig = IngestConfig()
    join: JoinConfig = JoinConfig()
    aggregate: AggregateConfig = AggregateConfig()
    sink: SinkConfig = SinkConfig()
    lake: LakeConfig = LakeConfig()
    crawl: CrawlConfig = CrawlConfig()
    train: TrainConfig = TrainConfig()
    serve: ServeConfig = ServeConfig()


def decode_config(text: bytes, *, where: str = "headrace.toml") -> Config:
    """Return the configuration. Raises `ConfigRejected` with the path of the wrong key."""
    try:
        return msgspec.toml.decode(text, type=Config)
    except msgspec.ValidationError as error:
        raise ConfigRejected(f"{where}: {error}. See README's table of settings.") from error
    except msgspec.DecodeError as error:
        raise ConfigRejected(f"{where} is not TOML: {error}.") from error
