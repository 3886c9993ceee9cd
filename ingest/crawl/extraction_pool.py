"""Extraction beside the crawler, in a few processes that a page may bring down: the crawler goes on.

1. *turn*: of one source one page is extracted at a time, so that the pages of one site hold up no other.
2. *task*: a process that waits, or a new one, gets the page (`extraction_process`), and extracts it within its bounds.
3. *refused*: a process that ends over a page, or that ran out of memory, is a refusal of the page, with its reason:

   - `extraction_cpu`: it took more CPU time than `crawl.extract_cpu_ms`;
   - `extraction_memory`: it took more memory than `crawl.extract_memory_bytes`;
   - `extraction_crashed`: the process ended by a signal of its own, such as SIGSEGV;
   - `extraction_killed`: somebody, or the kernel, ended the process with SIGKILL. The page may be without blame;
   - `extraction_stalled`: it got no CPU time. The page is without blame.

4. *replaced*: that process, and one that has grown, is ended; the next page gets a new one.

A process that does not even begin is no page's fault: `Unavailable` stops the stage.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from contextlib import suppress
from functools import partial
from typing import IO, cast

import msgspec

from headrace.contract.config import CrawlConfig
from headrace.contract.crawl import Crawl
from headrace.contract.errors import Unavailable
from headrace.ingest.crawl.extract import Document, Extracted
from headrace.ingest.crawl.extraction_process import HEAD_BYTES, Result, Task, packed
from headrace.process.awake import awake_s
from headrace.process.waits import in_thread

log = logging.getLogger("headrace.crawl")

BEGIN_MAX_S = 180.0
"""Longest until a new process says hello: it loads lxml, half a second of CPU time."""
STALL_FACTOR = 20
"""A page may take this many times its CPU time, on a machine that has other things to do, and a minute more."""
RESULT_SHARE_MAX = 0.5
"""Largest result, as a share of the memory that the extraction may take."""
GROWN_BYTES = 134_217_728
"""A process that took more than this for a page is replaced: Python gives little back."""
_LOOK_S = 1.0


class ExtractionPool:
    """Up to `crawl.extract_processes` processes that extract. For one event loop, in the main thread: on Linux a
    process that is told to end with its parent ends with the thread that started it."""

    def __init__(self, config: CrawlConfig) -> None:
        self._config = config
        self._places = asyncio.Semaphore(config.extract_processes)
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()

    def bounds(self) -> tuple[int, int]:
        """Return CPU time in ms and memory in bytes: what was beyond them may be read within others."""
        return self._config.extract_cpu_ms, self._config.extract_memory_bytes

    async def extract(self, document: Document, crawl: Crawl) -> Extracted:
        """Return what a document holds, or its refusal in `left_out`. Raises `Unavailable` where no process begins."""
        async with self._turns[crawl.name], self._places:
            worker = self._idle.pop() if self._idle else self._new()
            try:
                done = await in_thread(f"extraction of {document.url}", partial(worker.work, Task(document, crawl)))
            except BaseException:
                self._end(worker)
                raise
            if worker.is_spent:
                self._end(worker)
            else:
                self._idle.append(worker)
            return Extracted(done.rows, done.links, Counter(done.left_out))

    def close(self) -> None:
        """End all processes, whatever they do."""
        for worker in list(self._all):
            self._end(worker)

    def _new(self) -> _Worker:
        worker = _Worker(self._config)
        self._all.add(worker)
        return worker

    def _end(self, worker: _Worker) -> None:
        self._all.discard(worker)
        worker.end()


class _Worker:
    """One process. `work` is called in a thread, one call at a time."""

    def __init__(self, config: CrawlConfig) -> None:
        cpu_s = -(-config.extract_cpu_ms // 1_000)
        self._memory_bytes = config.extract_memory_bytes
        self._still_max_s = STALL_FACTOR * cpu_s + 60.0
        self.is_spent = False
        """It is to be replaced."""
        self._is_begun = False
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-P", "-m", "headrace.ingest.crawl.extraction_process",
                    str(os.getpid()), str(cpu_s), str(self._memory_bytes),
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            raise Unavailable(
                f"no process for extraction: {error}. See how many processes and files may be."
            ) from error
        self._input, self._output = cast("IO[bytes]", self._process.stdin), cast("IO[bytes]", self._process.stdout)
        for pipe in (self._input, self._output):
            os.set_blocking(pipe.fileno(), False)

    def work(self, task: Task) -> Result:
        """Extract one document. Raises `Unavailable` where the process does not begin."""
        if not self._is_begun:
            self._begin()
        try:
            result = self._asked(packed(task))
        except (TimeoutError, MemoryError, OSError, EOFError, msgspec.MsgspecError) as error:
            self.is_spent = True
            return Result(left_out={self._reason(error): 1})
        self.is_spent = result.peak_bytes > min(GROWN_BYTES, self._memory_bytes // 4)
        return result

    def end(self) -> None:
        """End the process and wait for it: SIGKILL leaves nothing to wait for."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._input, self._output):
            with suppress(OSError):
                pipe.close()

    def _begin(self) -> None:
        try:
            msgspec.msgpack.decode(self._read(awake_s() + BEGIN_MAX_S), type=Result)
        except (TimeoutError, OSError, EOFError, msgspec.MsgspecError) as error:
            self._process.kill()
            raise Unavailable(
                f"the process for extraction does not begin ({type(error).__name__}, status {self._process.wait()}). "
                "What it said stands above. See how much memory there is, and raise crawl.extract_memory_bytes."
            ) from error
        self._is_begun = True

    def _asked(self, message: bytes) -> Result:
        until_s = awake_s() + self._still_max_s
        left = memoryview(message)
        while left:
            self._await(self._input, select.POLLOUT, until_s)
            with suppress(BlockingIOError):
                left = left[os.write(self._input.fileno(), left) :]
        return msgspec.msgpack.decode(self._read(until_s), type=Result)

    def _read(self, until_s: float) -> bytes:
        size = int.from_bytes(self._read_bytes(HEAD_BYTES, until_s), "big")
        if size > RESULT_SHARE_MAX * self._memory_bytes:
            raise MemoryError(f"a result of {size} bytes")
        return self._read_bytes(size, until_s)

    def _read_bytes(self, size: int, until_s: float) -> bytes:
        found = bytearray()
        while len(found) < size:
            self._await(self._output, select.POLLIN, until_s)
            with suppress(BlockingIOError):
                piece = os.read(self._output.fileno(), min(size - len(found), 1_048_576))
                if not piece:
                    raise EOFError("the process has ended")
                found += piece
        return bytes(found)

    def _await(self, pipe: IO[bytes], event: int, until_s: float) -> None:
        """Wait until the pipe is ready. Raises `TimeoutError` at `until_s`, in time that the crawler was awake for."""
        poll = select.poll()
        poll.register(pipe.fileno(), event)
        while not poll.poll(_LOOK_S * 1_000):
            if awake_s() > until_s:
                raise TimeoutError("no answer")

    def _reason(self, error: Exception) -> str:
        """Return why the process gave no result."""
        if isinstance(error, TimeoutError):
            return "extraction_stalled"
        if isinstance(error, MemoryError):
            return "extraction_memory"
        status = self._process.wait()
        return {-signal.SIGXCPU: "extraction_cpu", -signal.SIGKILL: "extraction_killed"}.get(
            status, "extraction_crashed"
        )
