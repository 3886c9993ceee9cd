"""What an entry point hands to a stage: the user's project, the settings, and the backends that were chosen."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.blobs_hdfs import HdfsBlobs
from headrace.backends.clock import SystemClock
from headrace.backends.log_kafka import KafkaAdmin, KafkaProducer, KafkaReader
from headrace.backends.metrics_prometheus import PrometheusMetrics
from headrace.contract.blobs import Blobs
from headrace.contract.config import Config, decode_config
from headrace.contract.config import port as port_of
from headrace.contract.errors import ConfigRejected
from headrace.contract.metrics import Stage
from headrace.contract.project import Project
from headrace.contract.topics import Topics

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


@dataclass(frozen=True)
class Runtime:
    """Everything a stage's entry point needs; made once by `runtime(args)`."""

    project: Project
    config: Config
    project_dir: Path
    home: Path
    brokers: str
    store: str
    webhdfs: str
    port_base: int | None

    @property
    def topics(self) -> Topics:
        """The topics of the configured generation."""
        return Topics(self.config.log.generation)

    def port(self, name: str) -> int:
        """Return the port of `name`, moved by PORT_BASE."""
        return port_of(name, self.port_base)

    def metrics(self, stage: Stage) -> PrometheusMetrics:
        """Return the stage's metrics, served on its port."""
        metrics = PrometheusMetrics(stage)
        metrics.serve(self.port(f"metrics_{stage}"))
        return metrics

    def producer(self, *, linger_ms: float = 2.0, transactional_id: str | None = None) -> KafkaProducer:
        """Return a new idempotent producer."""
        return KafkaProducer(self.brokers, linger_ms=linger_ms, transactional_id=transactional_id)

    def reader(self) -> KafkaReader:
        """Return a new reader."""
        return KafkaReader(self.brokers)

    def admin(self) -> KafkaAdmin:
        """Return a new admin."""
        return KafkaAdmin(self.brokers)

    def clock(self) -> SystemClock:
        """Return the machine's clock."""
        return SystemClock()

    def blobs(self) -> Blobs:
        """Return the blob store below `<store>/blobs`."""
        if self.store.startswith("file:"):
            return FileBlobs(Path(self.store.removeprefix("file:")) / "blobs")
        return HdfsBlobs(self.webhdfs, f"{urlsplit(self.store).path.rstrip('/')}/blobs")

    @property
    def lake_uri(self) -> str:
        """Where the table of samples lies, as deltalake takes it: a path or an hdfs:// address."""
        root = self.store.removeprefix("file:").rstrip("/")
        return f"{root}/lake/samples" + ("" if self.config.log.generation == 1 else f".g{self.config.log.generation}")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every verb takes."""
    parser.add_argument(
        "--project",
        metavar="DIR",
        default=os.environ.get("HEADRACE_PROJECT") or default_project(),
        help="folder with headrace.toml and your Python file (default: $HEADRACE_PROJECT, else the demo shop)",
    )
    parser.add_argument("--log-level", default=os.environ.get("HEADRACE_LOG_LEVEL", "INFO"), help="default: INFO")


def default_project() -> str:
    """Return the demo shop's folder."""
    return str(Path(__file__).resolve().parents[2] / "examples" / "shop")


def setup_logging(level: str) -> None:
    """Log to stderr, one line an event; chatty libraries at WARNING."""
    logging.basicConfig(level=level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    for noisy in ("aiokafka", "faust", "hdfs", "urllib3", "httpx", "uvicorn.access", "mode", "kafka"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def runtime(args: argparse.Namespace) -> Runtime:
    """Load settings and project, read the environment. Raises `ConfigRejected` naming what to change."""
    setup_logging(args.log_level)
    folder = Path(args.project).resolve()
    config, project = load_project(folder)
    base = os.environ.get("PORT_BASE") or None
    try:
        port_base = int(base) if base else None
    except ValueError as error:
        raise ConfigRejected(f"PORT_BASE={base!r} is no number; give one such as 30000.") from error
    home = Path(os.environ.get("HEADRACE_HOME") or ".headrace").resolve()
    brokers = os.environ.get("HEADRACE_BROKERS") or f"127.0.0.1:{port_of('kafka', port_base)}"
    store = os.environ.get("HEADRACE_STORE") or f"hdfs://127.0.0.1:{port_of('namenode', port_base)}/headrace"
    if not store.startswith(("file:/", "hdfs://")):
        raise ConfigRejected(f"HEADRACE_STORE={store!r}: give file:/absolute/path or hdfs://host:port/path.")
    host = urlsplit(store).hostname or "127.0.0.1"
    webhdfs = os.environ.get("HEADRACE_WEBHDFS") or f"http://{host}:{port_of('namenode_http', port_base)}"
    return Runtime(project, config, folder, home, brokers, store, webhdfs, port_base)


def load_project(folder: Path) -> tuple[Config, Project]:
    """Read `headrace.toml` and import the Python file that it names, under a name that meets nobody else's."""
    toml = folder / "headrace.toml"
    if not toml.is_file():
        raise ConfigRejected(f"{toml} is not there. --project takes the folder that holds it; see examples/shop.")
    config = decode_config(toml.read_bytes(), where=str(toml))
    path = folder / config.module
    if not path.is_file():
        raise ConfigRejected(f"{toml} says module = {config.module!r}, and {path} is not there.")
    spec = importlib.util.spec_from_file_location("headrace_user_project", path)
    if spec is None or spec.loader is None:
        raise ConfigRejected(f"{path} cannot be imported: it is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    project = getattr(module, config.object, None)
    if not isinstance(project, Project):
        raise ConfigRejected(f"{path} has no headrace Project named {config.object!r}; see examples/shop/shop.py.")
    return config, project.checked()


def stop_on_signals() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
