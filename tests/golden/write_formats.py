"""Writes every stored format once, small: `python tests/golden/write_formats.py FOLDER`.

The folder of a release (`data/formats-0.1`) was written by that release's code and is never made anew: a later build
opens it (`test_formats.py`), or refuses it by name with the remedy. Run this only to write the folder of a new release.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import sys
from pathlib import Path
from random import Random
from typing import Any

import msgspec

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "tests" / "worlds"))

import join_world  # noqa: E402
import trainer_world  # noqa: E402

from headrace.backends.blobs_file import FileBlobs  # noqa: E402
from headrace.backends.clock import VirtualClock  # noqa: E402
from headrace.backends.delta.leases import Leases  # noqa: E402
from headrace.backends.frontier_sqlite import SqliteFrontier  # noqa: E402
from headrace.backends.lake.delta import DeltaLake  # noqa: E402
from headrace.backends.log.fenced_memory import FencedMemory, WriterEpochs  # noqa: E402
from headrace.backends.log.memory import MemoryLog  # noqa: E402
from headrace.backends.metrics_memory import MemoryMetrics  # noqa: E402
from headrace.contract.config import Config, IngestConfig, JoinConfig, LogConfig, TrainConfig  # noqa: E402
from headrace.contract.formats.dead_letters import (  # noqa: E402
    DeadLetter,
    RetryMark,
    encode_dead_letter,
    encode_retry_mark,
)
from headrace.contract.formats.events import decode_batch, fit  # noqa: E402
from headrace.contract.formats.sample import parse_position, sample_schema  # noqa: E402
from headrace.contract.formats.topics import Topics  # noqa: E402
from headrace.contract.interfaces.frontier import Body, Found, Settled  # noqa: E402
from headrace.contract.project import Recipe  # noqa: E402
from headrace.process.call_watch import CallWatch  # noqa: E402
from headrace.sender import Sender  # noqa: E402
from headrace.stream.aggregate.stage import AggregateStage  # noqa: E402
from headrace.stream.join import state  # noqa: E402
from headrace.stream.rule_changes import apply, ensure_first  # noqa: E402
from headrace.stream.shell.dependencies import StageDependencies  # noqa: E402
from headrace.stream.shell.join_stage import StreamStage  # noqa: E402
from headrace.trainer.dependencies import Dependencies  # noqa: E402
from headrace.trainer.run import Trainer  # noqa: E402

PROJECT = msgspec.structs.replace(
    join_world.PROJECT, name="golden", recipe=Recipe(task="click", dim=4, hidden=(8,), batch_rows=32)
).checked()
TOPICS = Topics()
CONFIG = Config(
    log=LogConfig(partitions=1),
    join=JoinConfig(early_feedback_ms=400, resolved_ms=1_600, repeat_horizon_ms=3_200, snapshot_ms=100),
    ingest=IngestConfig(silent_ms=300),
)
NOW_MS = 1_000_000


def stage_dependencies(producer: Any, blobs: FileBlobs, clock: VirtualClock) -> StageDependencies:
    """Return what the join and the aggregator of this project depend on."""
    return StageDependencies(
        project=PROJECT,
        config=CONFIG,
        topics=TOPICS,
        producer=producer,
        blobs=blobs,
        metrics=MemoryMetrics(),
        clock=clock,
    )


def trainer_dependencies(
    log: MemoryLog,
    blobs: FileBlobs,
    clock: VirtualClock,
    lake: DeltaLake,
    stop: Any,
    epochs: WriterEpochs | None = None,
) -> Dependencies:
    """Return what a trainer of this project depends on."""
    return Dependencies(
        project=PROJECT,
        config=TrainConfig(wait_ms=20, publish_ms=100, snapshot_ms=2_000),
        topics=TOPICS,
        reader=log.reader(),
        producer=log.producer(),
        steps_writer=FencedMemory(log, TOPICS.steps, "steps", epochs or WriterEpochs()),
        blobs=blobs,
        metrics=MemoryMetrics(),
        clock=clock,
        stop=stop,
        calls=CallWatch(clock.monotonic, by_itself=False),
        lake=lake,
        background=False,
    )


async def work(stage: Any, clock: VirtualClock, records: list[Any]) -> None:
    """Let a stage take the records, some at a time, and store its state now and then and at the end."""
    await stage.begin(0)
    for start in range(0, len(records), 6):
        await stage.take_all(records[start : start + 6])
        clock.advance(0.04)
        for _ in range(20):
            await stage.tick()
            await asyncio.sleep(0.001)
    await stage.finish()


def write(folder: Path) -> None:
    """Write all formats below `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log, clock, blobs = MemoryLog(lambda: NOW_MS), VirtualClock(NOW_MS), FileBlobs(folder / "store" / "blobs")
    log.admin().ensure_topics(TOPICS.specs(1))
    epochs = WriterEpochs()
    rules = FencedMemory(log, TOPICS.rules, "rules", epochs)
    ensure_first(rules, PROJECT, now_ms=NOW_MS, pause=lambda _: None)
    for record in join_world.records(join_world.traffic(7, 150), Random(7)):
        log.append(TOPICS.events, 0, record.value, record.key, record.headers)
    changed = msgspec.structs.replace(
        PROJECT, tasks=(*PROJECT.tasks[:-1], msgspec.structs.replace(PROJECT.tasks[-1], window_ms=200))
    )
    apply(rules, log.producer(), TOPICS.events, 1, changed.checked(), now_ms=NOW_MS)

    producer = log.producer()
    deps = stage_dependencies(producer, blobs, clock)
    # So few rows would all lie in the manifest.
    state.INLINE_ROWS = 8
    join = StreamStage(deps)
    asyncio.run(work(join, clock, list(log.partitions(TOPICS.events)[0])))
    aggregator = AggregateStage(deps)
    asyncio.run(work(aggregator, clock, list(log.partitions(TOPICS.events)[0])))

    samples = log.partitions(TOPICS.samples)[0]
    batches = [fit(decode_batch(r.value or b""), sample_schema(PROJECT)) for r in samples]
    leases = Leases(blobs, clock, lease_ms=3_600_000)
    lake = DeltaLake(str(folder / "store" / "lake" / "samples"), partitions=1, leases=leases)
    half = len(samples) // 2
    for part in (slice(0, half), slice(half, len(samples) - 2)):
        last = samples[part][-1]
        lake.append(batches[part], {0: last.offset + 1}, {0: parse_position(last.headers["last"])})
    lake.hold(0, "golden")

    trainer = Trainer(trainer_dependencies(log, blobs, clock, lake, trainer_world.World(), epochs))
    trainer.recover()
    idle = 0
    while idle < 4:
        idle = 0 if trainer.turn() else idle + 1
        clock.advance(0.11)
    trainer.close()

    letter = DeadLetter(
        reason="bad_type", detail="$.item", origin="10.0.0.1", tag="i", event_id="x1", time_ns=1, raw=b"\x80", seen_ms=1
    )
    log.append(TOPICS.dead_letters, 0, encode_dead_letter(letter), b"10.0.0.1", {})
    for mark in (
        RetryMark(step="retrying", run="a", at_ms=1, letters=(0,), ends={0: 7}),
        RetryMark(step="retried", run="a", at_ms=2, outcomes={0: "appended"}),
    ):
        log.append(TOPICS.retries, 0, encode_retry_mark(mark), None, {})

    with (folder / "records.jsonl").open("w") as file:
        for topic in sorted(log.topics):
            for record in log.partitions(topic)[0]:
                body = {"topic": topic, "offset": record.offset, "headers": record.headers}
                for name, data in (("key", record.key), ("value", record.value)):
                    body[name] = None if data is None else base64.b64encode(data).decode()
                file.write(json.dumps(body) + "\n")

    sender = Sender("t", port=1, spool_dir=folder / "spool", flush_ms=1)
    for number in range(3):
        sender.emit_with_time("impression", 1_000 + number, {"event_id": f"e{number}"})
    sender.close(timeout=0.2)

    frontier = SqliteFrontier(folder / "crawl" / "frontier.sqlite")
    frontier.set_starts("site", [Found("http://127.0.0.1:1/a")])
    page = frontier.due(NOW_MS, ["site"], [], 1)[0]
    body = Body("d" * 64, page.url, "text/html")
    told = Settled(at_ms=NOW_MS, due_ms=2 * NOW_MS, etag='"e"', rows=[("7", "v1", '{"price":2.5}')], body=body)
    frontier.settle(page, told, pages_max=10, keys_max=10, depth_max=2)
    frontier.close()

    expected = {
        "learner_digest": trainer.learner.digest(),
        "step": trainer.learner.step,
        "samples": sum(b.num_rows for b in batches),
        "positions": trainer.positions.to_json(),
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
