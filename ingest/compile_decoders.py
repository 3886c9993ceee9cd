"""Compiles the decoders of chunks and messages before anyone waits for them.

On a machine's first start that takes half a minute; then they are on disk. Without it the first chunk would wait for
the compiler, and with it heartbeats, punctuation and every other shipper.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa

from headrace.ingest.decode.message import encode_record, message_of
from headrace.ingest.decode.validate import declared_types
from headrace.ingest.forward.protocol import Decoder
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.dry_run import DryRunProducer, NoMetrics
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.gateway.gateway_dependencies import GatewayDependencies


def compile_decoders(deps: GatewayDependencies) -> None:
    """Send one event of each declared type through a gateway of which nothing is kept."""
    producer, clock = DryRunProducer(), deps.clock
    gateway = Gateway(replace(deps, producer=producer, metrics=NoMetrics()), "compile")
    for tag, declared in declared_types(deps.project).items():
        own = declared.known - {"event_time_ms"}
        record = {field.name: _value(field.type) for field in declared.schema if field.name in own}
        # Twice: its own bytes, and one whose id and chunk were there before.
        for _ in range(2):
            gateway.offer(message_of(tag, [(clock.now_ms() * 1_000_000, record)], "c"), 0, Peer("compile"), None)
            gateway.drained()
            producer.poll(0.0)
        if declared.served is not None:
            declared.served.open(pa.array(["compile"]))
    for frame in (encode_record(["compile", [], {}]), b'["compile",[],{}]'):
        list(Decoder(deps.config.chunk_bytes_max).feed(frame))


def _value(kind: pa.DataType) -> Any:
    """Return some value of a column's type."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "compile"
    if pa.types.is_boolean(kind):
        return True
    if pa.types.is_floating(kind):
        return 1.0
    return 1 if pa.types.is_integer(kind) else None
