"""`headrace dead-letters retry` in the fault matrix. It goes on after one that was killed between mark and receipts.

A command has no watchdog: who runs it ends one whose call never returns, as the matrix does.
"""

from __future__ import annotations

from random import Random

from fault_matrix import Process, StageRow
from fault_stages import LaggingProducer, asked_of_log
from letters_world import Dying, DyingProducer, DyingWriter, Killed, P, World, fill

from headrace.contract.interfaces.fenced import FencedWriter
from headrace.contract.interfaces.log import Admin, Producer, Reader
from headrace.ingest.dead_letters.letters import Filter
from headrace.ingest.dead_letters.retry import Retry


class RetryStage:
    """One run of the command."""

    def __init__(self, retry: Retry) -> None:
        self.retry, self.is_done = retry, False

    async def work(self) -> None:
        if not self.is_done:
            self.retry.retry(Filter())
            self.is_done = True

    async def tick(self) -> None:
        """All is done in `work`."""

    async def finish(self) -> None:
        """Nothing is left."""

    def is_busy(self) -> bool:
        return not self.is_done


class RetryWorld:
    """Letters of every kind, some of which an earlier run had marked."""

    def __init__(self) -> None:
        self.letters = World()
        self.clock = self.letters.clock
        random = Random(7)
        self.wanted = fill(self.letters, random)
        dying = Dying(4, random)
        producer = DyingProducer(self.letters.log.producer(), dying)
        writer = DyingWriter(self.letters.log, self.letters.epochs, dying)
        try:
            self.letters.retry(producer=producer, writer=writer).retry(Filter())
        except Killed:
            return
        raise AssertionError("it was to be killed")

    def start(self, process: Process) -> RetryStage:
        world = self.letters
        asked_of_log(process, world.log, partitions=P)
        retry = world.retry(
            producer=process.wrap(Producer, LaggingProducer(world.log)),
            reader=process.wrap(Reader, world.log.reader()),
            writer=process.wrap(FencedWriter, world.writer()),
        )
        return RetryStage(retry)

    def trouble(self) -> str:
        # The stream counts one of two under the same id.
        once = {row["event_id"]: row["request_id"] for row in self.letters.rows()}
        have = list(once.values())
        wrong = {name: have.count(name) for name, times in self.wanted.items() if have.count(name) != times}
        states = set(self.letters.states().values()) - {"retried", "refused", "open"}
        return f"{wrong or ''} {states or ''}".strip()

    def close(self) -> None:
        """What lies in memory goes by itself."""


_BY_COMMAND = "the command closes it when the retry has ended"
RETRY = StageRow(
    "retry",
    (Admin, FencedWriter, Producer, Reader),
    RetryWorld,
    {
        "Admin.topic_id": "it stores nothing that was made of a topic",
        "Admin.retention_ms": "the sink alone asks it: the row sink",
        "Admin.delete_before": "the trainer alone deletes: tests/simulation/trainer/test_steps_archive.py",
        "FencedWriter.close": _BY_COMMAND,
        "Producer.close": _BY_COMMAND,
        "Producer.flush": "a retry waits for each receipt itself",
        "Reader.close": _BY_COMMAND,
    },
)
