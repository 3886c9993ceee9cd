"""One local stack: where it keeps its files, which of its servers are its own, and on which ports they listen."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from headrace.contract.checks.names import VARIANTS_MAX
from headrace.contract.config import port
from headrace.contract.errors import ConfigRejected

HOST = "127.0.0.1"
STATE_VERSION = 1
"""Raised when state below `.headrace` changes its form. State of another version is refused."""

MARK = "HEADRACE_SUPERVISED"
"""Variable that every process of a stack carries: its home. Orphans are found by it."""

CHECKOUT = Path(__file__).resolve().parents[2]
_SAID = frozenset({"DATA", "RATE", "SHIPPER"})
"""Variables of Headrace's that do not begin with its name."""


class Addresses(msgspec.Struct, frozen=True, kw_only=True):
    """Where the running stack is; `headrace up` writes it, every other verb of the checkout reads it."""

    brokers: str
    store: str
    webhdfs: str | None = None
    port_base: int | None = None
    project: str = ""
    variants: tuple[str, ...] = ()
    """Variants whose trainers the stack runs, in the order of their metrics ports."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One local stack. Everything it writes lies below `home`, but for the jars, which all stacks share."""

    home: Path
    port_base: int | None
    brokers: str
    store: str
    webhdfs: str | None
    project: Path
    own_kafka: bool
    own_hdfs: bool
    shipper: str = ""
    """`fluentd` or `fluent-bit` between shop and gateway; "" for none."""
    own_cephfs: bool = False
    """The store is a CephFS of this stack, mounted below `home`."""
    variants: tuple[str, ...] = ()
    """As in `Addresses`."""

    @classmethod
    def saved(cls, home: Path) -> Self | None:
        """Return the stack that the last `up` started in `home`, or None."""
        at = read_addresses(home)
        if at is None:
            return None
        loopback = f"{HOST}:"
        return cls(
            home=home,
            port_base=at.port_base,
            brokers=at.brokers,
            store=at.store,
            webhdfs=at.webhdfs,
            project=Path(at.project),
            own_kafka=at.brokers.startswith(loopback) and (home / "kafka").is_dir(),
            own_hdfs=at.store.startswith(f"hdfs://{loopback}") and (home / "hdfs").is_dir(),
            own_cephfs=at.store == cephfs_store(home),
            variants=at.variants,
        )

    def port(self, name: str) -> int:
        """Return the port of `name`."""
        return port(name, self.port_base)

    def metrics_port(self, process: str) -> int:
        """Return the metrics port of a stage, or of a variant's trainer, `train@NAME`."""
        stage, _, variant = process.partition("@")
        return self.port(variant_port(variant, self.variants) if variant else f"metrics_{stage}")

    @property
    def logs(self) -> Path:
        """One log file a process."""
        return self.home / "log"

    @property
    def shipper_port(self) -> int:
        """Where a shipper listens; beside the supervisor's, which is no port of a stage."""
        return 24_225 if self.port_base is None else self.port_base - 1

    @property
    def ceph_port(self) -> int:
        """Where the monitor of an own CephFS listens; beside the shipper's, which is no port of a stage."""
        return 6_789 if self.port_base is None else self.port_base - 2

    def prepare(self) -> None:
        """Make the folders and stamp the state. Raises `ConfigRejected` for the state of another version."""
        for folder in (self.home, self.logs, self.home / "run"):
            folder.mkdir(parents=True, exist_ok=True)
        stamp = self.home / "VERSION"
        if not stamp.exists():
            stamp.write_text(f"{STATE_VERSION}\n")
        found = stamp.read_text().strip()
        if found != str(STATE_VERSION):
            raise ConfigRejected(
                f"{self.home} holds state of version {found}; this build writes version {STATE_VERSION}. "
                "`headrace clean` deletes it, or HEADRACE_HOME= puts new state elsewhere and keeps the old."
            )

    def environment(self) -> dict[str, str]:
        """Return the environment of every process of the stack: the caller's, addresses, one thread a math library."""
        env = {name: value for name, value in os.environ.items() if name != "PORT_BASE"}
        env |= {
            MARK: str(self.home),
            "HEADRACE_HOME": str(self.home),
            "HEADRACE_PROJECT": str(self.project),
            "HEADRACE_BROKERS": self.brokers,
            "HEADRACE_STORE": self.store,
            "PYTHONUNBUFFERED": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "HEADRACE_FORWARD_PORT": str(self.port("forward")),
        }
        env |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        if self.webhdfs:
            env["HEADRACE_WEBHDFS"] = self.webhdfs
        if self.port_base is not None:
            env["PORT_BASE"] = str(self.port_base)
        if self.shipper:
            env |= {
                "SHIPPER_PORT": str(self.shipper_port),
                "HEADRACE_SHIPPER_PORT": str(self.shipper_port),
                "HEADRACE_SHIPPER_BUFFER": str(self.home / "shipper"),
            }
        return env

    def save(self) -> None:
        """Write the addresses to `stack.json`, where every other verb of this checkout finds them."""
        addresses = Addresses(
            brokers=self.brokers,
            store=self.store,
            webhdfs=self.webhdfs,
            port_base=self.port_base,
            project=str(self.project),
            variants=self.variants,
        )
        part = self.home / "stack.json.part"
        part.write_bytes(msgspec.json.format(msgspec.json.encode(addresses)))
        part.replace(self.home / "stack.json")


def variant_port(variant: str, known: Sequence[str], declared: Iterable[str] = ()) -> str:
    """Return the name of a variant's metrics port: by its place among those that a stack knows, and behind them among
    the declared ones.

    >>> variant_port("wide", ["deep"], ["wide", "deep"]), variant_port("deep", [], ["wide", "deep"])
    ('metrics_train_2', 'metrics_train_2')
    """
    names = [*known, *(name for name in declared if name not in known), variant]
    return f"metrics_train_{min(names.index(variant) + 1, VARIANTS_MAX)}"


def trainer_of(variant: str) -> str:
    """Return the name of the process that trains a variant."""
    return f"train@{variant}"


def is_ours(variable: str) -> bool:
    """Say whether a variable of the environment is Headrace's: those alone say what a process does."""
    return variable.startswith("HEADRACE_") or variable in _SAID


def read_addresses(home: Path) -> Addresses | None:
    """Return what the last `up` wrote, or None."""
    try:
        return msgspec.json.decode((home / "stack.json").read_bytes(), type=Addresses)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


def cephfs_store(home: Path) -> str:
    """Return the store that STORE=cephfs means: on the CephFS that the stack of `home` mounts."""
    return f"file:{home}/cephfs/mnt/headrace"


def jar_folder(home: Path) -> Path:
    """Return where fetched jars lie: in the checkout for all stacks of it, else in `home` (installed package)."""
    return CHECKOUT / ".headrace" / "jars" if (CHECKOUT / "pyproject.toml").exists() else home / "jars"
