"""What an entry point needs to start a stage: the user's project, addresses, and the backends chosen from them.

Addresses come from flags, else from the environment, else from what `headrace up` wrote to `.headrace/stack.json`,
else from the defaults of `headrace.contract.config.PORTS`.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.blobs_hdfs import HdfsBlobs
from headrace.backends.clock import SystemClock
from headrace.backends.log.kafka import KafkaAdmin, KafkaProducer, KafkaReader
from headrace.backends.metrics_prometheus import PrometheusMetrics
from headrace.contract.config import PORTS, Config, decode_config, port
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.metrics import Stage
from headrace.contract.project import Project

if TYPE_CHECKING:
    from headrace.backends.lake.delta import DeltaLake

HOST = "127.0.0.1"
CEPHFS = "cephfs"
"""A store by name: a CephFS of the stack's own."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class Addresses(msgspec.Struct, frozen=True, kw_only=True):
    """Where the running stack is; `headrace up` writes it, every other verb of the checkout reads it."""

    brokers: str
    store: str
    webhdfs: str | None = None
    port_base: int | None = None
    project: str = ""


@dataclass(frozen=True)
class Runtime:
    """One started entry point."""

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

    def port(self, name: str) -> int:
        """Return the port of `name` from the table of `headrace.contract.config`."""
        return port(name, self.port_base)

    def metrics(self, stage: Stage) -> PrometheusMetrics:
        """Start the stage's /metrics, /readyz and /healthz."""
        return PrometheusMetrics(stage, self.port(f"metrics_{stage}"))

    def producer(self, *, linger_ms: float = 2.0) -> KafkaProducer:
        """Return a producer of these brokers."""
        return KafkaProducer(self.brokers, linger_ms=linger_ms)

    def reader(self) -> KafkaReader:
        """Return a reader of these brokers."""
        return KafkaReader(self.brokers)

    def admin(self) -> KafkaAdmin:
        """Return an admin of these brokers."""
        return KafkaAdmin(self.brokers)

    def blobs(self) -> Blobs:
        """Return the store's blobs, below `<store>/blobs`."""
        return open_blobs(self.store, self.webhdfs)

    def lake(self) -> DeltaLake:
        """Return the store's lake, with the leases of its readers beside it."""
        # Here, since most verbs have no lake and the library takes half a second to load.
        from headrace.backends.lake.delta import DeltaLake
        from headrace.backends.lake.leases import Leases

        return DeltaLake(
            self.lake_uri,
            generation=self.topics.generation,
            partitions=self.config.log.partitions,
            config=self.config.lake,
            leases=Leases(self.blobs(), self.clock, lease_ms=self.config.lake.lease_ms),
        )

    @property
    def lake_uri(self) -> str:
        """Where the Delta table of samples lies: a path, or an hdfs:// address."""
        return f"{self.store.removeprefix('file:')}/lake/samples"

    @property
    def tensorboard_dir(self) -> Path:
        """Where the trainer writes its scalars and TensorBoard reads them."""
        return self.home / "tensorboard"


def open_blobs(store: str, webhdfs: str | None) -> Blobs:
    """Return the blobs of a store. Raises `ConfigRejected` for an address of another kind."""
    if store.startswith("file:"):
        return FileBlobs(Path(store.removeprefix("file:")) / "blobs")
    if store.startswith("hdfs://"):
        host, _, path = store.removeprefix("hdfs://").partition("/")
        return HdfsBlobs(webhdfs or f"http://{host.partition(':')[0]}:9870", f"{path}/blobs")
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


def cephfs_store(home: Path) -> str:
    """Return the store that STORE=cephfs means: on the CephFS that the stack of `home` mounts."""
    return f"file:{home}/cephfs/mnt/headrace"


def find_home(flag: str | None = None) -> Path:
    """Return the folder of local state: flag, HEADRACE_HOME, or `.headrace` here or in a folder above."""
    told = flag or os.environ.get("HEADRACE_HOME")
    if told:
        return Path(told).absolute()
    here = Path.cwd()
    return next((p / ".headrace" for p in (here, *here.parents) if (p / ".headrace").is_dir()), here / ".headrace")


def find_addresses(args: argparse.Namespace, home: Path) -> Addresses:
    """Return addresses from flags, environment, the last `up`, or defaults, in this order."""
    saved = read_addresses(home)
    told_base = getattr(args, "port_base", None) or _number("PORT_BASE")
    base = told_base if told_base is not None or saved is None else saved.port_base
    if saved is not None and told_base is not None and told_base != saved.port_base:
        saved = None  # its addresses belong to other ports

    def pick(flag: str, variable: str, before: str | None, default: str | None) -> str | None:
        return getattr(args, flag, None) or os.environ.get(variable) or before or default

    store = pick("store", "HEADRACE_STORE", saved.store if saved else None, None)
    store = store or f"hdfs://{HOST}:{port('namenode', base)}/headrace"
    return Addresses(
        brokers=pick("brokers", "HEADRACE_BROKERS", saved.brokers if saved else None, None)
        or f"{HOST}:{port('kafka', base)}",
        store=store,
        webhdfs=pick(
            "webhdfs",
            "HEADRACE_WEBHDFS",
            saved.webhdfs if saved and saved.store == store else None,
            f"http://{HOST}:{port('namenode_http', base)}" if store.startswith(f"hdfs://{HOST}:") else None,
        ),
        port_base=base,
        project=pick("project", "HEADRACE_PROJECT", saved.project if saved else None, "") or "",
    )


def read_addresses(home: Path) -> Addresses | None:
    """Return what the last `up` wrote, or None."""
    try:
        return msgspec.json.decode((home / "stack.json").read_bytes(), type=Addresses)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


def find_project(told: str) -> Path:
    """Return the user's folder: the one told, `examples/shop` here, or the shop that is installed."""
    if told:
        return Path(told).absolute()
    here = Path.cwd() / "examples" / "shop"
    if (here / "headrace.toml").exists():
        return here
    return Path(__file__).parents[2] / "examples" / "shop"


def load_project(folder: Path) -> tuple[Config, Project]:
    """Return the decoded headrace.toml and the checked Project that it names. Raises `ConfigRejected`."""
    file = folder / "headrace.toml"
    if not file.exists():
        raise ConfigRejected(f"{file} does not exist; --project or HEADRACE_PROJECT names the folder that holds it.")
    config = decode_config(file.read_bytes(), where=str(file))
    module_file = folder / config.module
    spec = importlib.util.spec_from_file_location("headrace_project", module_file)
    if spec is None or spec.loader is None or not module_file.exists():
        raise ConfigRejected(f"{file}: module {config.module!r} is no Python file in {folder}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("headrace_project", module)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    spec.loader.exec_module(module)
    project = getattr(module, config.object, None)
    if not isinstance(project, Project):
        raise ConfigRejected(f"{module_file} has no Project named {config.object!r}, but {type(project).__name__}.")
    return config, project.checked()


def set_logging(level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO") -> None:
    """Log to stderr, one line an event."""
    logging.basicConfig(level=level, format=LOG_FORMAT, stream=sys.stderr, force=True)
    logging.getLogger("hdfs").setLevel(logging.WARNING)  # It tells each request at INFO.


def stop_event() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set: the stage then has 5 s to stop cleanly."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    if not text.isdigit() or not 1_024 <= int(text) <= 65_535 - len(PORTS):
        raise ConfigRejected(f"{variable}={text!r}: a number from 1024 to {65_535 - len(PORTS)} is wanted.")
    return int(text)
