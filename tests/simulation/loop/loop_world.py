"""The whole loop in this process under virtual time: every stage's own code, one after the other, on a log in memory.

A log line goes through the gateway's core to the log, the join and the aggregator, the sink's Delta table, the trainer,
its snapshots and deltas, serving's shared memory, and comes back as the answer of POST /v1/rank. Nothing waits: a turn
moves the clock by hand, then lets each stage take all that lies before it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pyarrow as pa
import pytest
import torch
import trainer_world
from ingest_world import message
from starlette.requests import Request
from stream_world import Blobs
from trainer_world import QuickLog

from headrace.backends.clock import VirtualClock
from headrace.backends.frontier_sqlite import SqliteFrontier
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.log.fenced_memory import FencedMemory, WriterEpochs
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import Config
from headrace.contract.crawl import Crawl
from headrace.contract.formats.dead_letters import DeadLetter, decode_dead_letter
from headrace.contract.formats.events import PUNCTUATION, decode_batch
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.frontier import Found, Settled
from headrace.contract.interfaces.log import Record
from headrace.contract.privacy import Privacy
from headrace.contract.project import Project
from headrace.ingest.compile_decoders import compile_decoders
from headrace.ingest.crawl.extract import Document, extract
from headrace.ingest.crawl.outbox_sender import OutboxSender
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.gateway.gateway_dependencies import GatewayDependencies
from headrace.kernels.sample_ids import id_hashes
from headrace.process import waits
from headrace.replay.as_trained import Result, as_trained
from headrace.replay.ledger.ledger import Ledger
from headrace.replay.ledger.take_stock import Mode, take_stock
from headrace.serving.api.app import ServingApp
from headrace.serving.api.dependencies import ServingDependencies
from headrace.serving.features import FeatureMemory
from headrace.serving.model.shared_region import SharedModel
from headrace.serving.model.updater import Updater
from headrace.stream.aggregate.stage import AggregateStage
from headrace.stream.rule_changes import ensure_first
from headrace.stream.shell.dependencies import StageDependencies
from headrace.stream.shell.join_stage import StreamStage
from headrace.stream.sink.stage import SinkStage
from headrace.trainer.dependencies import Dependencies
from headrace.trainer.run import Trainer

START_MS = 1_700_000_000_000
SECRET = "a secret of a test, longer than 16 bytes"
ROWS_MAX = 200_000
HOUR_MS = 3_600_000
STEP_MS = 500
TAKEN = 2_000
"""Most records that a stage takes at once."""
T = TypeVar("T")


def quiet(config: Config, turn_ms: int) -> Config:
    """Return settings under which a turn of seconds costs little: states and commits are written at the end alone, and
    time is told once a turn."""
    far = {"snapshot_ms": 24 * HOUR_MS}
    return msgspec.structs.replace(
        config,
        log=msgspec.structs.replace(config.log, partitions=2),
        ingest=msgspec.structs.replace(config.ingest, grace_ms=0, punctuate_ms=turn_ms),
        join=msgspec.structs.replace(config.join, **far),
        aggregate=msgspec.structs.replace(config.aggregate, **far),
        sink=msgspec.structs.replace(config.sink, commit_ms=24 * HOUR_MS),
        # One step takes all that has come: no batch waits for another turn.
        train=msgspec.structs.replace(
            config.train, wait_ms=1, publish_ms=1, snapshot_ms=24 * HOUR_MS, checkpoint_ms=24 * HOUR_MS
        ),
    )


class Pages:
    """What a crawler does behind its requests: a page's entities through the frontier into the log."""

    def __init__(self, folder: Path, crawls: Sequence[Crawl], loop: Loop) -> None:
        self._frontier, self._crawls = SqliteFrontier(folder / "frontier.sqlite"), {c.name: c for c in crawls}
        for crawl in crawls:
            self._frontier.set_starts(crawl.name, [Found(url) for url in (*crawl.start, *crawl.sitemaps)])
        partitions = loop.config.log.partitions
        self._clock = loop.clock
        self._outbox = OutboxSender(
            self._frontier, loop.log.producer(), loop.topics, partitions, MemoryMetrics(), 5, loop.clock
        )

    def crawled(self, name: str, body: bytes, content_type: str) -> None:
        """Take the answer to a request for the source's page."""
        crawl = self._crawls[name]
        page = self._frontier.due(2**60, [name], [], 1)[0]
        rows = extract(Document(page.url, body, content_type), crawl).rows
        now_ms = self._clock.now_ms()
        settled = Settled(at_ms=now_ms, due_ms=now_ms, rows=[(row.key, row.version, row.values) for row in rows])
        self._frontier.settle(page, settled, pages_max=10, keys_max=1_000, depth_max=1)
        for _ in range(2):
            self._outbox.turn()

    def close(self) -> None:
        self._frontier.close()


class Loop:
    """All stages of one project; see the module. `opened` makes one and closes it."""

    def __init__(self, project: Project, config: Config, folder: Path, run: Callable[[Awaitable[Any]], Any]) -> None:
        self.project, self.config, self.topics, self._run = project, config, Topics(), run
        self.clock, self.log = VirtualClock(START_MS), QuickLog(lambda: self.clock.now_ms())
        partitions = config.log.partitions
        self.log.admin().ensure_topics(self.topics.specs(partitions))
        rules = FencedMemory(self.log, self.topics.rules, "rules", WriterEpochs())
        ensure_first(rules, project, now_ms=START_MS, pause=lambda _: None)
        self.blobs, self.metrics = Blobs(), MemoryMetrics()
        self.privacy = Privacy(project, SECRET)
        gateway = GatewayDependencies(
            project=project,
            config=config.ingest,
            topics=self.topics,
            partitions=partitions,
            producer=self.log.producer(),
            metrics=MemoryMetrics(),
            clock=self.clock,
            privacy=self.privacy,
            instance="loop",
        )
        # As the stage begins: `headrace.ingest.run`.
        compile_decoders(gateway)
        self.gateway = Gateway(gateway, "g")
        self.lake = DeltaLake(str(folder / "lake"), partitions=partitions, config=config.lake, hash_ids=id_hashes)
        deps = StageDependencies(
            project=project,
            config=config,
            topics=self.topics,
            producer=self.log.producer(),
            blobs=self.blobs,
            metrics=MemoryMetrics(),
            clock=self.clock,
            open_reader=self.log.reader,
        )
        sink = SinkStage(config, self.lake, MemoryMetrics(), self.clock)
        self.stages: tuple[Any, ...] = (StreamStage(deps), AggregateStage(deps), sink)
        self._next = {id(stage): dict.fromkeys(range(partitions), 0) for stage in self.stages}
        for stage in self.stages:
            for partition in range(partitions):
                self._next[id(stage)][partition] = self._run(stage.begin(partition)) or 0
        # As the stage does: `headrace.trainer.run.train`.
        torch.set_num_threads(config.train.threads)
        self.trainer = Trainer(self._training())
        self.trainer.recover()
        self._serve(folder)
        self.pages = Pages(folder, project.crawls, self) if project.crawls else None
        self._chunks = 0

    def _training(self) -> Dependencies:
        world = trainer_world.World.__new__(trainer_world.World)
        world.lake, world.log, world.blobs, world.clock = None, self.log, self.blobs, self.clock  # type: ignore[assignment]
        world.epochs, world.stopped = WriterEpochs(), False
        writer = FencedMemory(self.log, self.topics.steps, "steps", world.epochs)
        return world.deps(project=self.project, config=self.config.train, lake=self.lake, steps_writer=writer)

    def _serve(self, folder: Path) -> None:
        recipe = self.project.recipe
        self.shared = SharedModel(folder / "model", dim=recipe.row_dim, rows_max=ROWS_MAX, create=True)
        self.updater = Updater(
            project=self.project,
            topics=self.topics,
            shared=self.shared,
            reader=self.log.reader(),
            blobs=self.blobs,
            metrics=self.metrics,
            clock=self.clock,
            stop=_Never(),
        )
        self.features, self._features_reader = FeatureMemory(self.project.crawls), self.log.reader()
        self._features_reader.assign({(self.topics.features, 0): 0})
        self.app = ServingApp(
            ServingDependencies(
                project=self.project,
                config=self.config.serve,
                shared=self.shared,
                features=self.features,
                metrics=self.metrics,
                metrics_text=lambda: b"",
                clock=self.clock,
                impressions=_NoLog(),
                privacy=self.privacy,
            )
        )

    # -- what a user does

    def send(self, tag: str, *records: Mapping[str, Any]) -> None:
        """Give the gateway a chunk, as a shipper does."""
        self._chunks += 1
        chunk = message(tag, [dict(record) for record in records], f"c{self._chunks}", self.clock.now_ms() // 1_000)
        self.gateway.offer(chunk, 0, Peer("shipper"), None)

    def rank(self, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """Ask POST /v1/rank; None where the answer is not 200."""
        status, answer = self.ask(body)
        return answer if status == 200 else None

    def ask(self, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Ask POST /v1/rank; return status and answer."""
        response = self._run(self.app.rank(_request(msgspec.json.encode(body))))
        return response.status_code, json.loads(response.body)

    # -- time

    def turn(self, milliseconds: int) -> None:
        """Let time pass, and every stage do what is due."""
        # A gateway that had no turn for a second takes it for an outage.
        while milliseconds > 0:
            self.clock.advance(min(milliseconds, STEP_MS) / 1_000)
            self.gateway.tick()
            milliseconds -= STEP_MS
        # The join waits for no aggregate, and the aggregator reads what the join reads.
        for stage in self.stages:
            self._take(stage)
        while self.trainer.turn():
            pass
        self.updater.step(0.0)
        for record in self._features_reader.poll(10**6, 0.0):
            self.features.take(record)
        self.features.is_caught_up, self.features.current_s = True, self.clock.monotonic()

    def _take(self, stage: Any) -> None:
        places = self._next[id(stage)]
        for partition, records in enumerate(self.log.partitions(stage.topic)):
            while some := records[places[partition] : places[partition] + TAKEN]:
                self._run(stage.take_all(some))
                places[partition] = some[-1].offset + 1
        self._run(stage.tick())

    def settle(self, milliseconds: int, turn_ms: int) -> None:
        """Let time pass until every window is over, and longer than anything may lag behind; then store all states and
        samples, and a snapshot of the model."""
        for _ in range(0, milliseconds, turn_ms):
            self.turn(turn_ms)
        self.clock.advance(1.1 * self.config.ledger.behind_max_ms / 1_000)
        for _ in range(3):
            self.turn(turn_ms)
        for stage in self.stages:
            self._run(stage.finish())
        self.trainer.close()
        for _ in range(4):
            self.updater.step(0.0)
        assert ("replica_digest_wrong_total", "") not in self.metrics.counters, "serving has what the trainer has not"

    def train_anew(self, seed: int) -> None:
        """Begin another run, of another seed, which learns the lake as a new recipe does; serving goes over to it."""
        self.project = msgspec.structs.replace(
            self.project, recipe=msgspec.structs.replace(self.project.recipe, seed=seed)
        )
        self.trainer = Trainer(self._training())
        self.trainer.recover()
        # What it held back while it learnt the lake is published in the turns after that.
        quiet = 0
        while quiet < 3:
            self.clock.advance(1.0)
            quiet = 0 if self.trainer.turn() else quiet + 1
        self.trainer.close()
        for _ in range(4):
            self.updater.step(0.0)
        assert ("replica_digest_wrong_total", "") not in self.metrics.counters, "serving has what the trainer has not"

    # -- what there is then

    def records(self, topic: str) -> list[Record]:
        """Return all records of a topic."""
        return [record for records in self.log.partitions(topic) for record in records]

    def letters(self) -> list[DeadLetter]:
        """Return the dead letters."""
        return [decode_dead_letter(record.value or b"") for record in self.records(self.topics.dead_letters)]

    def samples(self) -> pa.Table:
        """Return the lake's rows."""
        return self.lake.read()

    def stored_text(self) -> str:
        """Return all that is stored of what users sent, as text: the log's events, samples, letters, and features."""
        found = [str(letter) for letter in self.letters()]
        found += [f"{record.key!r} {record.value!r}" for record in self.records(self.topics.features)]
        for topic in (self.topics.events, self.topics.samples):
            for record in self.records(topic):
                if record.headers.get("kind") != PUNCTUATION:
                    found.append(str(decode_batch(record.value or b"").to_pydict()))
        return "\n".join([*found, str(self.samples().to_pydict())])

    def ledger(self, mode: Mode) -> Ledger:
        """Draw the ledger."""
        reader, lake = self.log.reader(), self.lake
        return take_stock(self.project, self.config, self.topics, reader, lake, blobs=self.blobs, mode=mode)  # type: ignore[arg-type]

    def replay(self) -> Result:
        """Train again as trained."""
        return as_trained(self.project, self.topics, self.log.reader(), self.lake, train=self.config.train)

    def check(self) -> Ledger:
        """Fail unless the ledger closes, from log and seals, nothing is lost or twice, and a replay is equal."""
        full, sealed = self.ledger("full"), self.ledger("seals")
        for ledger in (full, sealed):
            told = msgspec.json.encode(ledger)
            assert ledger.closes and (ledger.lost, ledger.twice) == (0, 0), told
            assert (ledger.waiting, ledger.pending) == (0, 0), told
            assert ledger.in_flight == 0, told
            assert ledger.stored == ledger.samples and not ledger.seals_wrong and not ledger.overdue, told
        assert sealed.drawn_from == "seals", sealed.not_sealed
        replayed = self.replay()
        assert replayed.equal is True and replayed.digest == self.trainer.learner.digest(), replayed
        return full


@contextmanager
def opened(project: Project, config: Config, folder: Path) -> Iterator[Loop]:
    """Yield the loop of a project, with its files in `folder`. Calls that a stage makes in a thread are made at once:
    no thread races the clock."""

    async def at_once(what: str, work: Callable[[], T]) -> T:
        return work()

    runner = asyncio.Runner()
    with runner, pytest.MonkeyPatch.context() as patch:
        patch.setattr(waits, "in_thread", at_once)
        loop = Loop(project, config, folder, runner.run)
        try:
            yield loop
        finally:
            if loop.pages is not None:
                loop.pages.close()


def _request(body: bytes) -> Request:
    """Return a request as the server hands it to the application, its body in one piece."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return Request({"type": "http", "method": "POST", "path": "/v1/rank", "headers": headers}, receive)


class _NoLog:
    def log(self, **call: Any) -> None:
        raise AssertionError("nobody asked serving to log")


class _Never:
    def is_set(self) -> bool:
        return False

    def wait(self, seconds: float) -> bool:
        return False
