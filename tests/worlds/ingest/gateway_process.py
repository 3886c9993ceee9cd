"""A gateway as a process of its own: `python gateway_process.py FILE PORT NAME RECEIPT_S [setting=number ...]`.

It appends each record to FILE as a line and gives the receipt RECEIPT_S later. It prints its port when it is ready, and
at the end the most memory that it ever had, in KiB.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from gateway_world import WallClock
from ingest_world import Counts, dependencies

from headrace.contract.config import IngestConfig
from headrace.contract.formats.events import PUNCTUATION, decode_batch, decode_punctuation
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Delivered
from headrace.ingest.forward.endpoint import Endpoint
from headrace.ingest.run import run


class FileLog:
    """A producer whose log is a file."""

    def __init__(self, path: Path, receipt_s: float) -> None:
        self._file, self._receipt_s = path.open("a"), receipt_s
        self._due: deque[tuple[float, Delivered | None]] = deque()

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
        line = {"topic": topic, "partition": partition, **(headers or {})}
        if topic == Topics().events and line["kind"] == PUNCTUATION:
            line["bye"] = decode_punctuation(value or b"").bye
        elif topic == Topics().events:
            line["ids"] = decode_batch(value or b"").column("event_id").to_pylist()
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._due.append((time.monotonic() + self._receipt_s, delivered))

    def poll(self, timeout_s: float) -> None:
        while self._due and self._due[0][0] <= time.monotonic():
            _, delivered = self._due.popleft()
            if delivered is not None:
                delivered(None, 0)

    def flush(self, timeout_s: float) -> int:
        self.poll(timeout_s)
        return len(self._due)

    def close(self) -> None:
        self._file.close()


def main(path: str, port: str, name: str, receipt_s: str, *settings: str) -> None:
    """Serve until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    numbers = {key: int(value) for key, value in (setting.split("=") for setting in settings)}
    config = IngestConfig(grace_ms=0, **numbers)  # type: ignore[arg-type]
    endpoint = Endpoint(port=int(port), name=name, share_port=True)
    producer, counts = FileLog(Path(path), float(receipt_s)), Counts()
    deps = dependencies(producer, counts, WallClock(), config=config)
    run(deps, endpoint, stop, ready=lambda bound: print(bound, flush=True))
    producer.close()
    print(json.dumps({"peak_kib": _peak_kib(), "counts": counts.totals}), flush=True)


def _peak_kib() -> int:
    """Return the most memory this process had; not `ru_maxrss` where it can be helped: it begins with the parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main(*sys.argv[1:])
