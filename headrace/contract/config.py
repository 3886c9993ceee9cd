"""`headrace.toml`, decoded once into frozen structs that reject unknown keys. Every default is safe to run.

Each field has a docstring. That of a number ends in its unit, and `make docs` writes docs/settings.md from them.
The environment is read by entry points only, for addresses: HEADRACE_BROKERS, HEADRACE_STORE, HEADRACE_WEBHDFS,
PORT_BASE, HEADRACE_HOME (where local state lies, `.headrace`).
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time
from ipaddress import ip_network
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from headrace.contract.checks.settings import setting_words, wrong_settings
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
    "metrics_watch": 9109,
    "serving_grpc": 8081,
    **{f"metrics_train_{n}": 9109 + n for n in range(1, 5)},
}
"""Every port, loopback by default. With PORT_BASE=n the i-th of this table moves to n + i; so a new one comes last.
`console` and `lighthouse` are reserved: nothing listens on them yet. `metrics_train_1` to 4: variants' trainers."""


def port(name: str, base: int | None = None) -> int:
    """Return the port of `name`, moved by `base`.

    >>> port("serving"), port("serving", 30_000)
    (8080, 30002)
    """
    return PORTS[name] if base is None else base + list(PORTS).index(name)


class LogConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[log]"""

    partitions: Annotated[int, Meta(gt=0, le=256)] = 4
    """Partitions of `events` and of `samples`. Fixed for a generation. Unit: partitions."""
    generation: Count = 1
    """Number of the set of topics. From 2 on it is part of their names (`events.g2`). Raise it to begin anew with
    another number of partitions or another partition key. Unit: none."""
    replication: Annotated[int, Meta(ge=0, le=16)] = 0
    """How many brokers have each record of the topics that are created. 0: 3 where three brokers answer, else 1. A
    topic that has fewer is warned of; one that has fewer than asked for here is refused. Unit: brokers."""
    min_insync_replicas: Annotated[int, Meta(ge=0, le=16)] = 0
    """How many brokers must have a record before it is acknowledged. 0: 2 where `replication` is 3 or more, else 1.
    Unit: brokers."""


class SourceConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[[ingest.sources]]: a Kafka topic that a shipper writes by itself, read into Headrace's own."""

    topic: Annotated[str, Meta(min_length=1, max_length=249)]
    """Name of the topic."""
    format: Literal["json", "msgpack", "gelf", "raw", "otlp_json"] = "json"
    """How the shipper writes its messages."""
    tag: str = ""
    """Tag of every record, or of those without `tag_field`."""
    tag_field: str = ""
    """Field of the record that holds its tag. It is taken out of the record."""
    time_field: str = "@timestamp"
    """Field that holds the time (`json`, `msgpack`). It is taken out of the record. Without it Kafka's timestamp
    counts."""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of a time that is a number."""
    text_field: str = "message"
    """Field that gets the text where the shipper wrote nothing else (`raw`, `otlp_json`)."""
    brokers: str = ""
    """Addresses of the topic's brokers. Empty: Headrace's own."""
    group: str = ""
    """Consumer group, which all gateways share. Empty: `headrace-` and the topic."""
    start: Literal["earliest", "latest"] = "earliest"
    """Where reading begins in a partition for which the group has no position."""
    in_flight_max: Count = 20_000
    """Most records that are read and do not have their receipts yet. Unit: records."""
    client: dict[str, str] = {}
    """Settings of librdkafka for the connection: `security.*`, `sasl.*`, `ssl.*` and `client.*`. A value `$NAME` is
    read from the environment."""

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
    """Longest time that an event waits until its batch is written. More means fewer and larger records; each costs a
    stage about a millisecond. Unit: ms."""
    batch_rows: Count = 2_000
    """Most events in one Kafka record. Unit: rows."""
    batch_bytes: Count = 900_000
    """Most bytes in one Kafka record; below the broker's limit of 1 MB. Unit: bytes."""
    punctuate_ms: Millis = 100
    """Time between the punctuations that a gateway writes into every partition. Unit: ms."""
    grace_ms: Annotated[int, Meta(ge=0, le=600_000)] = 2_500
    """Time after its start in which a gateway promises nothing, so that shippers reconnect and hand over what they held
    before the watermark passes the outage. More than the longest back-off of `headrace.sender`, 2 s. Unit: ms."""
    skew_ms: Millis = 60_000
    """An event whose time is further ahead of the gateway's clock becomes a dead letter (`future`). Unit: ms."""
    past: date = date(2000, 1, 1)
    """An event whose time lies before this day, in UTC, becomes a dead letter (`past`): most are times in seconds that
    were sent as milliseconds."""
    silent_ms: Millis = 10_000
    """A gateway no longer holds the watermark when its promise stood still while another's went on by this much.
    Unit: ms."""
    repeat_horizon_ms: Millis = 3_600_000
    """How long a gateway remembers chunks and event ids. One hour. Unit: ms."""
    chunk_bytes_max: Count = 16_777_216
    """Largest message, compressed or not. 16 MiB. Unit: bytes."""
    buffer_bytes_max: Count = 134_217_728
    """Most bytes that are read and not yet confirmed by Kafka, over all connections. Beyond it the gateway stops
    reading. 128 MiB. Unit: bytes."""
    connections_max: Count = 4_096
    """Most open connections. At the bound a connection that never sent a message gives way, else the new one is
    refused. The soft limit of open files is raised to fit. Unit: connections."""
    handshake_ms: Millis = 10_000
    """Longest time for TLS and the shared-key handshake. At the bound of connections it is also how long one that never
    sent a message is safe. Unit: ms."""
    message_ms: Millis = 60_000
    """Longest time from a message's first byte to its last, while the gateway reads. Between messages any time may
    pass. Unit: ms."""
    tls_cert: str = ""
    """PEM file with the certificate and its chain. With one, the forward port and the collector speak TLS 1.2 or newer
    and nothing else. A relative path begins at the project's folder."""
    tls_key: str = ""
    """PEM file with the private key. Empty where it is in `tls_cert`."""
    tls_client_ca: str = ""
    """PEM file with the authorities of client certificates. With one, a shipper must show a certificate."""
    dead_letter_bytes: Count = 16_384
    """Most raw bytes that are kept of a refused event. Unit: bytes."""
    dead_letter_share_max: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.5
    """Largest share of a tag's events that may become dead letters (of all events, for tags that nobody declares).
    Beyond it the gateway does not ack the tag's chunks of those origins whose own share is larger, and shippers keep
    them. 1 takes everything. Unit: share of events."""
    dead_letter_window_ms: Millis = 60_000
    """Time over which the share is counted. Unit: ms."""
    dead_letter_events_min: Count = 5_000
    """Fewest events within that time from which a share is taken to say something. Unit: events."""
    dead_letter_probe_ms: Millis = 10_000
    """Time between chunks that are taken to see whether a tag is good again. Unit: ms."""
    collector_bytes_max: Count = 1_048_576
    """Largest body of `POST /v1/events`, compressed or not. 1 MiB. Unit: bytes."""
    collector_requests_max: Count = 512
    """Most requests that wait for Kafka at once. Beyond it the answer is 503: send the same again. Unit: requests."""
    collector_connections_max: Count = 2_048
    """Most connections to the collector. Beyond it the one that has been idle longest gives way. Unit: connections."""
    cors_origins: tuple[str, ...] = ("http://127.0.0.1:*", "http://localhost:*")
    """Origins whose pages may send. `*` in one stands for a part of the host or for the port; alone it stands for every
    origin."""
    trusted_proxies: Annotated[tuple[str, ...], Meta(max_length=64)] = ()
    """Addresses or networks, such as `10.0.0.0/8` or `2001:db8::/32`, of the proxies before the collector. A request
    from one has the origin that the proxies name: the last address in `forwarded_header` that is none of theirs. From
    others the header is ignored. None: it is ignored from all, and a proxy is one origin with all its clients."""
    forwarded_header: Literal["x-forwarded-for", "forwarded"] = "x-forwarded-for"
    """The header that these proxies append to. The other one is never read: they hand it on as a client wrote it."""
    sources: tuple[SourceConfig, ...] = ()
    """Topics that shippers write and gateways read into `events`. Each is a table of its own."""

    def __post_init__(self) -> None:
        """Refuse proxies that are no network, and the network of all addresses: everybody could name any origin."""
        for text in self.trusted_proxies:
            if ip_network(text).prefixlen == 0:
                raise ValueError(f"trusted_proxies: {text} trusts everybody; name the proxies' own addresses")

    @property
    def past_ms(self) -> int:
        """The earliest event time that is taken."""
        return max(0, int(datetime.combine(self.past, time(), UTC).timestamp()) * 1_000)


class JoinConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[join]"""

    pending_max: Count = 2_000_000
    """Most impressions that wait for feedback in one partition, and most early feedback that waits there for its
    impression. Unit: rows a partition."""
    early_feedback_ms: Millis = 600_000
    """How long feedback that came first waits for its impression, in watermark time. 10 minutes. Unit: ms."""
    resolved_ms: Millis = 600_000
    """How long a resolved request is remembered, to tell duplicate and late feedback from orphans. 10 minutes. Unit:
    ms."""
    repeat_horizon_ms: Millis = 3_600_000
    """How long event ids are remembered, in watermark time. One hour. Unit: ms."""
    snapshot_ms: Millis = 5_000
    """Time between snapshots of the state; 20 times as long as one takes, where that is more. Unit: ms."""
    payload_bytes: Count = 134_217_728
    """Most bytes of waiting impressions that one partition keeps in memory. Beyond it, whole pieces lie in a file. 128
    MiB. Unit: bytes a partition."""


class AggregateConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[aggregate]"""

    grid_ms: Millis = 1_000
    """Event time between two points of the grid. Values are written at its points, once all watermarks have passed
    them. Unit: ms."""
    snapshot_ms: Millis = 5_000
    """Time between snapshots of the state; 20 times as long as one takes, where that is more. Unit: ms."""


class SinkConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[sink]"""

    commit_ms: Millis = 3_000
    """Longest time between commits to the lake while samples come. Unit: ms."""
    commit_rows: Count = 200_000
    """Samples from which on a commit does not wait for `commit_ms`. Unit: rows."""


class CrawlConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[crawl]: what all sources share; each source's own bounds are declared with it, see `headrace.contract.crawl`."""

    user_agent: Annotated[str, Meta(min_length=1, max_length=256)] = "headrace"
    """What sites and their robots.txt call the crawler. Put an address in it at which you can be asked to stop."""
    requests_max: Annotated[int, Meta(gt=0, le=512)] = 16
    """Most requests at once, over all hosts. Unit: requests."""
    redirects_max: Annotated[int, Meta(ge=0, le=20)] = 5
    """Most redirects from an address to its document. Unit: redirects."""
    robots_ms: Annotated[int, Meta(ge=1_000, le=86_400_000)] = 3_600_000
    """How long a host's robots.txt is good for. One hour. Unit: ms."""
    retry_first_ms: Millis = 5_000
    """Time until a document that failed is asked for again. It doubles with every further failure. Unit: ms."""
    retry_max_ms: Millis = 600_000
    """Longest time until a document that failed is asked for again. 10 minutes. Unit: ms."""
    bodies_per_page: Count = 5
    """Newest bodies of an address that are kept, so that they can be extracted again. Unit: bodies an address."""
    outbox_max: Count = 50_000
    """Most versions that wait for Kafka. Beyond it nothing is fetched. Unit: versions."""
    extract_processes: Annotated[int, Meta(gt=0, le=64)] = 2
    """Most processes that extract. Of one source one page is extracted at a time. Unit: processes."""
    extract_cpu_ms: Annotated[int, Meta(ge=1_000, le=3_600_000)] = 30_000
    """Most CPU time that the extraction of one page takes, in whole seconds. Beyond it the page is refused. A page of
    4 MB, a large shop's, takes 2 s. Unit: ms."""
    extract_memory_bytes: Annotated[int, Meta(ge=67_108_864)] = 1_073_741_824
    """Most memory of a process that extracts, beyond what it has at its start. Beyond it the page is refused. 1 GiB.
    Unit: bytes."""


class LakeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[lake]"""

    compact_ms: Annotated[int, Meta(ge=0, le=86_400_000)] = 60_000
    """Time between two looks of the sink for hours of many small files. 0: only `headrace lake` compacts. Unit: ms."""
    compact_files: Annotated[int, Meta(ge=2)] = 8
    """Fewest small files of one hour that are worth writing anew as one. Unit: files."""
    target_file_bytes: Count = 134_217_728
    """Size that compaction aims at. A file of at least half of it is not small. 128 MiB. Unit: bytes."""
    vacuum_ms: Count = 3_600_000
    """How long a file stays that no version needs any more, or that a killed writer left; also the time between two
    vacuums. It must be longer than the longest commit and the longest read without a lease. One hour. Unit: ms."""
    history_ms: Annotated[int, Meta(ge=60_000)] = 86_400_000
    """How long a version's entry in Delta's log stays, for time travel and for leases. One day. Unit: ms."""
    retention_ms: Annotated[int, Meta(ge=0)] = 0
    """Hours of event time that ended longer ago are dropped whole. 0 keeps everything. Unit: ms."""
    lease_ms: Count = 86_400_000
    """How long a reader's lease of a version holds when it is not given back. One day. Unit: ms."""


class ArchiveConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[archive]: records of `events`, as they lay in the topic, in the store"""

    events: bool = True
    """Whether the sink archives `events`. Off, nothing more is written; what is there goes with `retention_ms`."""
    commit_ms: Annotated[int, Meta(ge=1_000, le=600_000)] = 60_000
    """Time between two commits while events come. One minute. Unit: ms."""
    commit_bytes: Annotated[int, Meta(ge=1_048_576, le=536_870_912)] = 67_108_864
    """Keys and values that one commit takes at most, and one record more. 64 MiB. Unit: bytes."""
    retention_ms: Annotated[int, Meta(ge=0)] = 2_592_000_000
    """Hours of the broker's time that ended longer ago are dropped whole. 0 keeps everything. 30 days. Unit: ms."""


class TrainConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[train]"""

    wait_ms: Millis = 50
    """Longest time that samples wait for a step to fill. Unit: ms."""
    group_steps: Annotated[int, Meta(ge=0, le=1_024)] = 16
    """Most full steps that one transaction records while those before are learnt. 0: each by itself. Unit: steps."""
    publish_ms: Millis = 200
    """Time between deltas. Unit: ms."""
    snapshot_ms: Millis = 30_000
    """Time between full snapshots. Unit: ms."""
    checkpoint_ms: Millis = 4_000
    """Time between checkpoints: what a restart learns again at most, and what it takes to store one. Unit: ms."""
    publish_values: Literal["float32", "float16"] = "float32"
    """How the values of rows travel to serving. `float16` halves them: three digits of each stay. Learning and
    progressive validation go on with float32 all the same."""
    threads: Count = 1
    """Threads of the math library. Equal bits need an equal number. Unit: threads."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the dense part of `deepfm`, `dcn` and a module of your own is learnt. `auto`: CUDA where there is one.
    `logistic` and `fm` stay on the CPU. Bits are equal on machines of one kind only."""
    device_rows: Annotated[int, Meta(ge=0)] = 1_000_000
    """With CUDA: how many rows of each kind are kept on the device, those most recently used. docs/models.md says what
    one row takes. 0: all rows stay on the host. Unit: rows."""
    slices: Annotated[tuple[str, ...], Meta(max_length=8)] = ()
    """Impression fields by whose values the figures of progressive validation are told apart."""
    slice_values_max: Annotated[int, Meta(gt=0, le=256)] = 16
    """Most values of a field that are slices of their own: the first that are learnt. All others share one slice. Unit:
    values."""
    lake_bytes: Annotated[int, Meta(ge=1_048_576)] = 1_073_741_824
    """About how much memory stored samples may take while the lake is learnt, however big it is. 1 GiB. Unit: bytes."""
    live_share: Annotated[float, Meta(ge=0, le=0.9)] = 0.0
    """Which part of each step live samples take while the lake is learnt; what either side lacks the other fills. 0:
    they wait for its end. Unit: share."""
    steps_moved: Annotated[int, Meta(ge=0)] = 20_000
    """So many records of topic `steps` that the three newest checkpoints do not need are moved to the store at once;
    replay and ledger read them there. 0: they stay in the topic, which grows for ever. Unit: records."""
    projector_ms: Annotated[int, Meta(ge=0)] = 60_000
    """Time between two sets of embeddings for TensorBoard's projector. 0: none. Unit: ms."""


class ServeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[serve]"""

    workers: Annotated[int, Meta(gt=0, le=64)] = 1
    """Processes that share the port and answer; all read one model in shared memory. Unit: processes."""
    connections_max: Count = 2_048
    """Most connections to one process. Beyond it the one that has been idle longest gives way. Unit: connections."""
    candidates_max: Count = 1_000
    """Most candidates in one request. Unit: candidates."""
    queue_ms: Annotated[int, Meta(gt=0, le=60_000)] = 100
    """Longest estimated wait for a turn at which a request is still taken. Beyond it, it is answered 429 at once, with
    `Retry-After`. Unit: ms."""
    drain_ms: Annotated[int, Meta(ge=0, le=60_000)] = 1_000
    """How long a process that was told to end still answers. It is not ready meanwhile, and each answer ends its
    connection, so that clients and load balancers go elsewhere. Unit: ms."""
    stale_ms: Millis = 600_000
    """Age of the served version beyond which each answer says `stale`. 10 minutes. Unit: ms."""
    fallback: Literal["last_good", "constant", "order"] = "last_good"
    """What answers where no model is loaded yet, or its counters are not read: `last_good` 503, for the last good
    version is all that is served; `constant` the score `fallback_score` for every candidate; `order` scores that fall
    from it evenly, so that the order given stays. Such an answer says `fallback`."""
    fallback_score: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """The score of a fallback, the first candidate's in `order`. Unit: probability."""
    grpc: bool = False
    """Answer the Open Inference Protocol over gRPC too, on the port `serving_grpc`. It takes `headrace[grpc]`."""
    rows_max: Count = 1_048_576
    """Rows that one copy of the model's tables has room for at first; it grows within `memory_bytes`. Unit: rows."""
    memory_bytes: Annotated[int, Meta(ge=0)] = 0
    """Most memory of the model while it grows: two copies, and two larger ones beside them. What needs more is refused.
    0: what the machine, or the memory limit of its control group, has left. Unit: bytes."""
    counters_behind_ms: Annotated[int, Meta(ge=2_000)] = 10_000
    """How far the counters of a process may be behind the end of `features` before it is not ready. While no broker
    answers for longer than that, serving goes on from what it knows and says so in each answer. Unit: ms."""
    stuck_ms: Annotated[int, Meta(ge=10_000)] = 120_000
    """Longest time that one call of the updater may take, such as reading a snapshot's blob. Then the stage ends, and
    the next one takes its model over. Unit: ms."""


class LedgerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[ledger]"""

    behind_max_ms: Count = 600_000
    """How old the oldest sample may be that is not in the lake, or not learnt, in the log's own time: `headrace ledger`
    exits with 1 beyond it. It must be longer than a restart of `sink` and of `train` takes. 10 minutes. Unit: ms."""
    full_records_max: Count = 20_000
    """Most records of `events` that `headrace ledger` joins once more by itself; beyond that, or where retention took
    the first of them, it draws from seals. Unit: records."""


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    module: str = "project.py"
    """Python file of the project, beside the TOML file."""
    object: str = "PROJECT"
    """Name of the `Project` in that file."""
    log: LogConfig = LogConfig()
    ingest: IngestConfig = IngestConfig()
    join: JoinConfig = JoinConfig()
    aggregate: AggregateConfig = AggregateConfig()
    sink: SinkConfig = SinkConfig()
    lake: LakeConfig = LakeConfig()
    archive: ArchiveConfig = ArchiveConfig()
    crawl: CrawlConfig = CrawlConfig()
    train: TrainConfig = TrainConfig()
    serve: ServeConfig = ServeConfig()
    ledger: LedgerConfig = LedgerConfig()


def decode_config(text: bytes, *, where: str = "headrace.toml") -> Config:
    """Return the configuration. Raises `ConfigRejected` with the line and the path of the first wrong key, and the
    `others` beside it.

    A byte order mark, which some editors write, does no harm.
    """
    text = text.removeprefix(b"\xef\xbb\xbf")
    try:
        return msgspec.toml.decode(text, type=Config)
    except msgspec.ValidationError as error:
        said = [*wrong_settings(msgspec.toml.decode(text), Config, "")] or [str(error)]
        first, *others = (ConfigRejected(setting_words(each, text, where, Config)) for each in said)
        raise ConfigRejected(str(first), others=others) from error
    except UnicodeDecodeError as error:
        number = text[: error.start].count(b"\n") + 1
        raise ConfigRejected(f"{where}, line {number}: this is not UTF-8. Save the file as UTF-8.") from error
    except msgspec.DecodeError as error:
        at = re.search(r"^(.*) \(at line (\d+), column (\d+)\)$", str(error))
        line = f", line {at[2]}, column {at[3]}" if at else ""
        raise ConfigRejected(
            f"{where}{line} is not TOML: {at[1] if at else error}. A setting is written NAME = VALUE, a text in "
            '"quotes", below the [TABLE] that it is of; docs/settings.md lists every setting.'
        ) from error
