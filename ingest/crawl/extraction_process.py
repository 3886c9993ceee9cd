"""The process that extracts, which a page may bring down: it holds nothing but the page that it reads.

1. It says hello when it has loaded what extraction needs.
2. It reads a task from its standard input and writes a result to its standard output: each a length, 8 bytes, and
   msgpack. Then the next one, until its input ends.
3. For each task it has so much CPU time: the kernel ends it beyond that (SIGXCPU). It has so much memory beyond what
   it had at its hello, for all tasks together.
4. It ends with its parent: by the end of its input, on Linux by a signal too.

`python -m headrace.ingest.crawl.extraction_process PARENT CPU_S MEMORY_BYTES`; `extraction_pool` starts it.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from headrace.contract.crawl import Crawl
from headrace.ingest.crawl.extract import Document, Link, Row, extract

HEAD_BYTES = 8
MEMORY_SHARE_MAX = 0.75
"""Share of the memory beyond which a page is refused though it was read: some of libxml2's calls were perhaps refused
memory, and it goes on with half a document."""
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


class Task(msgspec.Struct, frozen=True):
    """A document and its source."""

    document: Document
    crawl: Crawl


class Result(msgspec.Struct, frozen=True):
    """What a document holds, as `extract.Extracted`."""

    rows: list[Row] = []
    links: list[Link] = []
    left_out: dict[str, int] = {}
    peak_bytes: int = 0
    """Most memory that the process has taken since its hello."""


def packed(message: msgspec.Struct) -> bytes:
    """Return a message as it is written."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(HEAD_BYTES, "big") + body


def main(parent: int, cpu_s: int, memory_bytes: int) -> None:
    """Extract until the input ends."""
    _end_with(parent)
    # Whoever stops the crawler's group or its whole unit means the crawler, which ends this process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    before_bytes = _memory_bytes("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (before_bytes + memory_bytes, before_bytes + memory_bytes))
    _write(sink, Result())
    while (head := source.read(HEAD_BYTES)) and len(head) == HEAD_BYTES:
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + cpu_s, resource.RLIM_INFINITY))
        _write(sink, _result(source, int.from_bytes(head, "big"), before_bytes, memory_bytes))


def _result(source: BinaryIO, size: int, before_bytes: int, memory_bytes: int) -> Result:
    refused = {"extraction_memory": 1}
    try:
        task = msgspec.msgpack.decode(source.read(size), type=Task)
        found = extract(task.document, task.crawl)
    except MemoryError:
        return Result(left_out=refused, peak_bytes=memory_bytes)
    peak_bytes = max(0, _memory_bytes("VmPeak") - before_bytes)
    if peak_bytes > MEMORY_SHARE_MAX * memory_bytes:
        return Result(left_out=refused, peak_bytes=peak_bytes)
    return Result(found.rows, found.links, dict(found.left_out), peak_bytes)


def _write(sink: BinaryIO, result: Result) -> None:
    left = memoryview(packed(result))
    while left:
        left = left[sink.write(left) :]


def _memory_bytes(name: str) -> int:
    """Return `VmSize` or `VmPeak` of this process; 0 where there is no such file."""
    with suppress(OSError), Path("/proc/self/status").open() as lines:
        return next((int(line.split()[1]) * 1_024 for line in lines if line.startswith(f"{name}:")), 0)
    return 0


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        # Where memory is short the kernel ends this process, not the crawler.
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    if os.getppid() != parent:
        sys.exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
