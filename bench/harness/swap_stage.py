"""The serving stage of bench/serving/swap.py in processes of its own: real workers, updater; the log is a memory.

    python swap_stage.py FOLDER WORKERS PORT

Prints the port and the region. Each line of its standard input is a file of FOLDER: the record that the updater gets
then, headers first. For each it prints when it came and when the version was served, in seconds of the monotonic clock.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import pyarrow as pa
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.backends.clock import SystemClock
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import ServeConfig
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Record
from headrace.contract.project import FeedbackType, ImpressionType, Project, Recipe, Task
from headrace.contract.spec import Categorical, Counter, FeatureSpec, Numeric, Rate
from headrace.serving.api.app import ServingApp, make_app
from headrace.serving.api.dependencies import ServingDependencies
from headrace.serving.compile_ranking import compile_ranking
from headrace.serving.features import FeatureMemory
from headrace.serving.gate.admit import can_serve
from headrace.serving.model.growth import Room
from headrace.serving.model.region_file import forget_region, open_region, region_path
from headrace.serving.model.shared_region import SharedModel
from headrace.serving.model.updater import Updater
from headrace.serving.processes import Workers, answer_requests, listen, run_processes

DIM = 16
TOPICS = Topics()
PROJECT = Project(
    name="swap",
    impression=ImpressionType(
        tag="t.impression", key="user", fields={"user": "int64", "item": "int64", "price": "float64"}
    ),
    feedback=(FeedbackType(name="click", tag="t.click", fields={"item": "int64"}),),
    tasks=(Task(name="click", feedback="click", window_ms=1_000),),
    features=FeatureSpec(
        counters=(Counter(name="item", key="item", window_ms=4_000, buckets=4),),
        features=(
            Categorical(field="user"),
            Categorical(field="item"),
            Numeric(field="price", scale=0.1),
            Rate(of="counter.item.click", over="counter.item.impression"),
        ),
    ),
    recipe=Recipe(dim=DIM),
).checked()


class Files:
    """Blobs that are files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, data: object) -> None:
        """Serving writes none."""

    def get(self, name: str) -> bytes | None:
        """Return the file."""
        return (self.folder / name).read_bytes()

    def list(self, prefix: str) -> list[str]:
        """Serving lists none."""
        return []

    def delete(self, name: str) -> None:
        """Serving deletes none."""


class Nothing:
    """Logs no impressions."""

    def log(self, **_: object) -> None:
        """Do nothing."""


class Timed(Updater):
    """Says when a version was served."""

    def take(self, records: Sequence[Record]) -> None:
        """Take them, and say when."""
        began = time.monotonic()
        super().take(records)
        if records:
            print(f"{began} {time.monotonic()}", flush=True)


class Named:
    """Says in each answer which reader it is of."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app, self.name = app, name.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""

        async def named(message: dict) -> None:  # type: ignore[type-arg]
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-reader", self.name)]
            await send(message)

        await self.app(scope, receive, named)  # type: ignore[arg-type]


def work(shared: SharedModel, workers: Workers | None, listener: object, folder: Path) -> int:
    """Answer until SIGTERM."""
    stop, metrics, clock = threading.Event(), MemoryMetrics(), SystemClock()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    features = FeatureMemory()
    features.is_caught_up = True
    app = make_app(
        ServingApp(
            ServingDependencies(
                project=PROJECT,
                config=ServeConfig(),
                shared=shared,
                features=features,
                metrics=metrics,
                metrics_text=lambda: b"",
                clock=clock,
                impressions=Nothing(),
            )
        )
    )
    app.add_middleware(Named, name=str(shared._reader))

    def warm() -> None:
        while not stop.wait(0.05):
            shared.warm()

    jobs: dict[str, Callable[[], None]] = {"warm": warm}
    if workers is not None:
        log = MemoryLog()
        log.admin().ensure_topics(TOPICS.specs(1))

        def feed() -> None:
            for line in sys.stdin:
                headers, _, data = (folder / line.strip()).read_bytes().partition(b"\n")
                said = msgspec.json.decode(headers, type=dict[str, str])
                topic = TOPICS.model if said.get("kind") == "snapshot" else TOPICS.deltas
                key = b"swap" if topic == TOPICS.deltas else b"swap/snapshot"
                log.append(topic, 0, data, key, said)
            stop.wait()

        updater = Timed(
            project=PROJECT, topics=TOPICS, shared=shared, reader=log.reader(), blobs=Files(folder), metrics=metrics,
            clock=clock, stop=stop,
        )  # fmt: skip
        jobs |= {"updater": updater.run, "feed": feed}
    return answer_requests(app, listener, stop, jobs=jobs, workers=workers)  # type: ignore[arg-type]


def main() -> int:
    """Run the stage."""
    # One thread for Arrow, as there is one process a core.
    pa.set_cpu_count(1)
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    listener = listen("127.0.0.1", int(sys.argv[3]))
    path = region_path(folder, dim=DIM, rows_max=1_024)
    print(listener.getsockname()[1], path, flush=True)
    compile_ranking()  # As `serve` does, before the fork.
    try:
        return run_processes(
            count,
            open_region=lambda: open_region(
                path, dim=DIM, rows_max=1_024, is_good=partial(can_serve, project=PROJECT), room=Room()
            ),
            work=lambda shared, workers: work(shared, workers, listener, folder),
        )
    finally:
        forget_region(folder)


if __name__ == "__main__":
    sys.exit(main())
