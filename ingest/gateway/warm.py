"""Compile before anyone waits: on a machine's first start the decoders take half a minute, then they are on disk.

Without it the first chunk would wait for the compiler, and with it heartbeats, punctuation and every other shipper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from headrace.contract.config import IngestConfig
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Delivered
from headrace.contract.metrics import Name
from headrace.contract.project import Project
from headrace.ingest.decode.message import encode_record, message_of
from headrace.ingest.decode.validate import declared_types
from headrace.ingest.forward.protocol import Decoder
from headrace.ingest.gateway.gateway import Gateway, Peer


def warm(project: Project, config: IngestConfig, topics: Topics, partitions: int, clock: Clock) -> None:
    """Send one event of each declared type through a gateway of which nothing is kept."""
    gateway = Gateway(project, config, topics, partitions, _Nowhere(), _Uncounted(), clock, "warm")
    for tag, declared in declared_types(project).items():
        record = {field.name: _value(field.type) for field in declared.schema if field.name != "event_time_ms"}
        # Twice: its own bytes, and one whose id and chunk were there before.
        for _ in range(2):
            gateway.offer(message_of(tag, [(clock.now_ms() * 1_000_000, record)], "c"), 0, Peer("warm"), None)
            gateway.drained()
    for frame in (encode_record(["warm", [], {}]), b'["warm",[],{}]'):
        list(Decoder(config.chunk_bytes_max).feed(frame))


def _value(kind: pa.DataType) -> Any:
    """Return some value of a column's type."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "warm"
    if pa.types.is_boolean(kind):
        return True
    if pa.types.is_floating(kind):
        return 1.0
    return 1 if pa.types.is_integer(kind) else None


class _Nowhere:
    """A producer that appends nothing and gives every receipt."""

    def send(
        self,
        topic: str,
        partition: int,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        delivered: Delivered | None = None,
    ) -> None:
        if delivered is not None:
            delivered(None, 0)

    def poll(self, timeout_s: float) -> None:
        """Nothing waits."""

    def flush(self, timeout_s: float) -> int:
        return 0

    def close(self) -> None:
        """Nothing is open."""


class _Uncounted:
    """Metrics of nobody."""

    def add(self, name: Name, amount: float = 1.0, *, reason: str = "") -> None:
        """Count nothing."""

    def set(self, name: Name, value: float, *, reason: str = "") -> None:
        """Show nothing."""

    def observe(self, name: Name, value: float) -> None:
        """Observe nothing."""
