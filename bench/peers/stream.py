"""The job of `headrace stream` as one writes it plainly: per event, JSON, a dict of what waits, in an engine's agent.

Same events, same features, same labels; no repeats dropped, no positions, no state that outlives the process. What
bench/stream.py compares with: `stream.py faust|quix|bytewax BROKERS TOPIC PARTITIONS OUT`.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import xxhash

WINDOW_MS, COUNTER_MS = 10_000, 3_600_000


class Job:
    """One partition: what waits, and what each user did."""

    def __init__(self) -> None:
        self.waiting: dict[str, dict[str, Any]] = {}
        self.expiries: list[tuple[int, str]] = []
        self.shown: dict[int, deque[int]] = {}
        self.clicked: dict[int, deque[int]] = {}
        self.watermark_ms = 0

    def take(self, event: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the samples that an event resolves."""
        kind = event["kind"]
        if kind == "impression":
            self._featurize(event)
            self.waiting[event["request_id"]] = event
            heapq.heappush(
                self.expiries, (max(event["event_time_ms"], self.watermark_ms) + WINDOW_MS, event["request_id"])
            )
            self.shown.setdefault(event["user_id"], deque()).append(event["event_time_ms"])
        elif kind == "click":
            self.clicked.setdefault(event["user_id"], deque()).append(event["event_time_ms"])
            found = self.waiting.pop(event["request_id"], None)
            if found is not None:
                yield {**found, "label": 1.0, "feedback_id": event["event_id"]}
        else:
            self.watermark_ms = event["time_ms"]
            while self.expiries and self.expiries[0][0] <= self.watermark_ms:
                found = self.waiting.pop(heapq.heappop(self.expiries)[1], None)
                if found is not None:
                    yield {**found, "label": 0.0}

    def _count(self, times: dict[int, deque[int]], user: int, now_ms: int) -> int:
        found = times.get(user)
        if not found:
            return 0
        while found and found[0] <= now_ms - COUNTER_MS:
            found.popleft()
        return len(found)

    def _featurize(self, event: dict[str, Any]) -> None:
        user, now_ms = event["user_id"], event["event_time_ms"]
        shown, clicked = self._count(self.shown, user, now_ms), self._count(self.clicked, user, now_ms)
        names = ("user_id", "item_id", "category", "device", "query")
        slots = [xxhash.xxh64_intdigest(f"{name}={event[name]}".encode()) for name in names]
        slots.append(xxhash.xxh64_intdigest(f"{event['user_id']}x{event['category']}".encode()))
        event["slots"] = slots
        event["numeric"] = [
            math.log1p(max(0.0, event["price"])), (clicked + 5.0) / (shown + 10.0), math.log1p(shown),
        ]  # fmt: skip


def faust_app(brokers: str, topic: str, partitions: int, out: str) -> None:
    """Run in Faust."""
    import faust

    app = faust.App(
        os.environ.get("BENCH_GROUP", "plain"), broker=f"kafka://{brokers}", store="memory://", value_serializer="raw",
        key_serializer="raw", topic_partitions=partitions, topic_disable_leader=True, topic_allow_declare=False,
        stream_wait_empty=False, consumer_auto_offset_reset="earliest", web_enabled=False, broker_commit_interval=1.0,
        consumer_max_fetch_size=8 * 1024 * 1024,
    )  # fmt: skip
    channel = app.topic(topic, partitions=partitions, value_type=bytes)
    sample_topic = app.topic(out, partitions=partitions, value_type=bytes)
    jobs = [Job() for _ in range(partitions)]

    async def run() -> None:
        @app.agent(channel)
        async def agent(stream: Any) -> None:
            async for event in stream.events():
                for sample in jobs[event.message.partition].take(json.loads(event.message.value)):
                    await sample_topic.send(value=json.dumps(sample).encode(), partition=event.message.partition)

        app.finalize()
        await app.start()
        await asyncio.sleep(3600)

    asyncio.run(run())


def quix_app(brokers: str, topic: str, partitions: int, out: str) -> None:
    """Run in Quix Streams."""
    from quixstreams import Application

    app = Application(
        broker_address=brokers,
        consumer_group=os.environ.get("BENCH_GROUP", "plain"),
        auto_offset_reset="earliest",
        loglevel=None,
    )
    jobs: dict[int, Job] = {}
    source = app.topic(topic, value_deserializer="json")
    target = app.topic(out, value_serializer="json")

    def expand(value: dict[str, Any]) -> list[dict[str, Any]]:
        from quixstreams import message_context

        partition = message_context().partition
        return list(jobs.setdefault(partition, Job()).take(value))

    app.dataframe(source).apply(expand, expand=True).to_topic(target)
    app.run()


def bytewax_app(brokers: str, topic: str, partitions: int, out: str) -> None:
    """Run in Bytewax."""
    import bytewax.operators as op
    from bytewax.connectors.kafka import KafkaSinkMessage
    from bytewax.connectors.kafka import operators as kop
    from bytewax.dataflow import Dataflow
    from bytewax.testing import cluster_main

    flow = Dataflow("plain")
    jobs = [Job() for _ in range(partitions)]
    source = kop.input("in", flow, brokers=[brokers], topics=[topic])

    def expand(message: Any) -> list[Any]:
        samples = jobs[message.partition].take(json.loads(message.value))
        return [KafkaSinkMessage(None, json.dumps(sample).encode(), partition=message.partition) for sample in samples]

    kop.output("out", op.flat_map("job", source.oks, expand), brokers=[brokers], topic=out)
    cluster_main(flow, [], 0)


if __name__ == "__main__":
    ENGINES: dict[str, Callable[[str, str, int, str], None]] = {
        "faust": faust_app,
        "quix": quix_app,
        "bytewax": bytewax_app,
    }
    ENGINES[sys.argv[1]](sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
