"""A crawler as a process of its own: `python crawl_process.py FOLDER once|serve|probed|again RECEIPT_S`.

FOLDER has crawls.json; the log is FOLDER/log.jsonl, a line a record, written RECEIPT_S after it was sent, and then its
receipt comes. At the end it prints its counters. `probed` serves, and answers /readyz and /healthz on the port in
FOLDER/port.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import msgspec

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.clock import SystemClock
from headrace.backends.frontier_sqlite import SqliteFrontier
from headrace.backends.health import BeatingStop
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.backends.metrics_prometheus import PrometheusMetrics
from headrace.cli.runtime import set_logging
from headrace.cli.stages.crawl import _quiet_scrapy
from headrace.contract.config import CrawlConfig
from headrace.contract.crawl import Crawl
from headrace.contract.formats.events import decode_batch
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Delivered
from headrace.ingest.crawl.crawl_dependencies import CrawlDependencies
from headrace.ingest.crawl.crawl_stage import CrawlStage
from headrace.ingest.crawl.extraction_pool import ExtractionPool

PARTITIONS = 3


class Declared(msgspec.Struct):
    """crawls.json"""

    crawls: tuple[Crawl, ...]
    config: CrawlConfig


class FileLog:
    """A producer whose log is a file."""

    def __init__(self, path: Path, receipt_s: float) -> None:
        self._file, self._receipt_s = path.open("a"), receipt_s
        self._due: deque[tuple[float, str, Delivered | None]] = deque()

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
        line = {"topic": topic, "partition": partition, "key": key and key.decode(), **(headers or {})}
        if topic == "events":
            line["rows"] = decode_batch(value or b"").to_pylist()
        else:
            line["value"] = value and json.loads(value)
        self._due.append((time.monotonic() + self._receipt_s, json.dumps(line), delivered))

    def poll(self, timeout_s: float) -> None:
        while self._due and self._due[0][0] <= time.monotonic():
            _, line, delivered = self._due.popleft()
            # Not before: what has no receipt is lost with the process, as in a client's buffer.
            self._file.write(line + "\n")
            self._file.flush()
            if delivered is not None:
                delivered(None, 0)

    def flush(self, timeout_s: float) -> int:
        return 0

    def close(self) -> None:
        self._file.close()


def main() -> None:
    folder, mode, receipt_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    set_logging("INFO")
    _quiet_scrapy()
    declared = msgspec.json.decode((folder / "crawls.json").read_bytes(), type=Declared)
    stop = BeatingStop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    metrics, ready = MemoryMetrics(), lambda _: None
    if mode == "probed":
        probed = PrometheusMetrics("crawl", 0)
        stop.attach(probed.health)
        ready = probed.ready
        (folder / "port").write_text(str(probed.port))
    frontier = SqliteFrontier(folder / "state" / "g1.sqlite", bodies_per_page=declared.config.bodies_per_page)
    empty = MemoryLog()
    empty.admin().ensure_topics(Topics().specs(PARTITIONS))
    pool = ExtractionPool(declared.config)
    stage = CrawlStage(
        CrawlDependencies(
            crawls=declared.crawls,
            config=declared.config,
            topics=Topics(),
            partitions=PARTITIONS,
            frontier=frontier,
            bodies=FileBlobs(folder / "store"),
            producer=FileLog(folder / "log.jsonl", receipt_s),
            metrics=metrics,
            clock=SystemClock(),
            extraction=pool,
            open_reader=empty.reader,
        )
    )
    changed = 0
    if mode == "again":
        changed = stage.extract_again()
    else:
        stage.run(stop, ready, once=mode == "once")
    pool.close()
    frontier.close()
    counts = {f"{name}/{reason}" if reason else name: value for (name, reason), value in metrics.counters.items()}
    print(json.dumps({**counts, "changed": changed}))


if __name__ == "__main__":
    main()
