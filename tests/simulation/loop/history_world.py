"""A history of the ads example: events from a seed, as files, as live log lines, and as the lake has them afterwards.

Events of a turn lie in its first second, impressions in one turn and feedback in the next: so the loop's turns of
seconds, which settle every point of the grid between them, delay nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as parquet
from loop_world import SECRET, START_MS, STEP_MS, Loop, quiet

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.imports import Imports
from headrace.contract.config import Config, LogConfig
from headrace.contract.errors import Unavailable
from headrace.contract.privacy import Privacy
from headrace.contract.project import Project
from headrace.examples.ads.project import PROJECT
from headrace.kernels.sample_ids import id_hashes, seal_of
from headrace.stream.history.importer import Imported, Importer, ImportRequest, Parts, Steps
from headrace.stream.history.mapping import read_mapping

TURN_MS = 10_000
PARTITIONS = 2
CONFIG = Config(log=LogConfig(partitions=PARTITIONS))
MINUTE_MS = 60_000
LONGEST_MS = 31 * MINUTE_MS
POSITIONS = ("partition", "offset", "rank", "impression_offset", "impression_row")
MAPPING = """
[impressions]
files = "shown"
columns = {event_time_ms = "shown_at"}

[feedback.click]
files = "clicks.parquet"
columns = {event_time_ms = "at"}

[feedback.conversion]
files = ["conversions.parquet"]
columns = {event_time_ms = "at", value = "paid"}
"""


def prompt(turn_ms: int) -> Config:
    """Return settings under which the loop's time is told at each of its steps, so that a turn settles all of it."""
    config = quiet(CONFIG, turn_ms)
    return msgspec.structs.replace(config, ingest=msgspec.structs.replace(config.ingest, punctuate_ms=STEP_MS))


Event = tuple[int, str, dict[str, Any]]
"""Time, type, record."""


def traffic(seed: int, turns: int, *, begin_ms: int = START_MS) -> list[Event]:
    """Return events by time: feedback in time, late, repeated and of nothing."""
    random, events, shown = Random(seed), [], []
    for turn in range(turns):
        at_ms = begin_ms + turn * TURN_MS
        for _ in range(random.randint(0, 12)):
            time_ms = at_ms + 1 + random.randrange(998)
            ad = {
                "campaign": random.randrange(4),
                "publisher": random.choice("xy"),
                "device": random.choice(["m", "d"]),
            }
            about = {"cookie": f"c{random.randrange(5)}", **ad}
            if turn % 2 == 0:
                name = f"{begin_ms}-{len(shown)}"
                record = {"event_id": f"i-{name}", "request_id": f"r-{name}", "place": random.randrange(2), **about}
                record |= {"keywords": random.sample(["a", "b", "c"], 2), "bid": random.random()}
                shown.append(record)
                events.append((time_ms, "impression", record))
                continue
            kind = random.choice(["click", "click", "conversion"])
            among = shown if random.random() < 0.4 else shown[-12:]
            of = random.choice(among) if shown and random.random() < 0.9 else {"request_id": "r-none", **about}
            record = {name: of[name] for name in ("request_id", "cookie", *ad)}
            record |= {"event_id": f"{kind}-{begin_ms}-{len(events)}", "place": of.get("place", 0)}
            if kind == "conversion":
                record["value"] = float(random.randrange(1, 9))
            events.append((time_ms, kind, record))
            if random.random() < 0.1:
                events.append((time_ms, kind, record))
    return sorted(events, key=lambda each: each[0])


def sent_live(loop: Loop, events: list[Event]) -> None:
    """Send the events as a shipper would, turn by turn."""
    tags = {"impression": PROJECT.impression.tag, **{f.name: f.tag for f in PROJECT.feedback}}
    end_ms = events[-1][0]
    while loop.clock.now_ms() <= end_ms:
        begin_ms = loop.clock.now_ms()
        for kind in tags:
            ours = [
                {**r, "event_time_ms": at} for at, k, r in events if k == kind and begin_ms < at <= begin_ms + TURN_MS
            ]
            if ours:
                loop.send(tags[kind], *ours)
        loop.turn(TURN_MS)


def write_files(events: list[Event], folder: Path) -> None:
    """Write the history's files and their mapping."""
    (folder / "shown").mkdir(parents=True, exist_ok=True)
    random = Random(1)
    for kind, columns in (("impression", {"at": "shown_at"}), ("click", {}), ("conversion", {"value": "paid"})):
        rows = [{**record, "at": at} for at, name, record in events if name == kind]
        random.shuffle(rows)
        rows = [{columns.get(name, name): value for name, value in row.items()} for row in rows]
        half = len(rows) // 2
        if kind == "impression":
            for name, some in (("a.parquet", rows[:half]), ("b.parquet", rows[half:])):
                parquet.write_table(pa.Table.from_pylist(some), folder / "shown" / name)
        else:
            # A file without a row has columns all the same.
            schema = None if rows else pa.schema([(n, pa.string()) for n in ("request_id", "cookie", "at")])
            parquet.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{kind}s.parquet")
    (folder / "history.toml").write_text(MAPPING)


class Killed(BaseException):
    """The process died here."""


@dataclass
class Flaky:
    """A lake's imports; `fails` says at which calls a commit happens and is told to have failed, `lost` at which it
    does not happen."""

    inner: Imports
    fails: set[int]
    lost: set[int]
    numbers: Iterator[int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def append(self, begun: Any, rows: pa.Table) -> Any:
        number = next(self.numbers)
        if number in self.lost:
            raise Unavailable("the store is away")
        after = self.inner.append(begun, rows)
        if number in self.fails:
            raise Unavailable("the answer was lost")
        return after


@dataclass
class History:
    """A folder with files, a lake, and what imports them."""

    folder: Path
    project: Project = PROJECT
    config: Config = CONFIG
    now_ms: int = START_MS + 100 * 86_400_000
    first_live_ms: int | None = None
    uri: str = ""
    fails: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        # Of calls, over all processes.
        self._numbers = itertools.count(1)
        uri = self.uri or str(self.folder / "lake")
        self.lake = DeltaLake(uri, partitions=PARTITIONS, hash_ids=id_hashes, config=self.config.lake)

    def run(
        self, *, kill_at: int = 0, meanwhile: tuple[int, Callable[[], None]] | None = None, **request: Any
    ) -> Imported:
        """Run the import in a process of its own, killed at its n-th step; or `meanwhile` happens at one."""
        done = 0

        def step(_: str) -> None:
            nonlocal done
            done += 1
            if done == kill_at:
                raise Killed
            if meanwhile is not None and done == meanwhile[0]:
                meanwhile[1]()

        def held(version: int | None, begin_ms: int, end_ms: int) -> pa.Array:
            if self.lake.state() is None:
                return pa.array([], pa.string())
            return self.lake.read(version, ["event_id"], span_ms=(begin_ms, end_ms))["event_id"].combine_chunks()

        parts = Parts(
            project=self.project,
            config=self.config,
            privacy=Privacy(self.project, SECRET),
            imports=Flaky(Imports(self.lake, seal_of), self.fails, self.lost, self._numbers),  # type: ignore[arg-type]
            held_ids=held,
            now_ms=lambda: self.now_ms,
            first_live_ms=lambda: self.first_live_ms,
            steps=Steps(step=step),
        )
        given = {
            "history": read_mapping(self.folder / "history.toml", self.project),
            "folder": self.folder,
            "work": self.folder / "work",
            **request,
        }
        return Importer(parts, ImportRequest(**given)).run()

    def refused(self, found: Imported) -> list[dict[str, Any]]:
        """Return the refused rows that an import wrote."""
        path = self.folder / "work" / found.id / "refused.jsonl"
        return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def content(rows: pa.Table) -> list[dict[str, Any]]:
    """Return samples without their places, by id."""
    kept = [name for name in rows.column_names if name not in (*POSITIONS, "event_date", "event_hour")]
    found = rows.select(sorted(kept)).to_pylist()
    return sorted(found, key=lambda row: (row["event_id"], row["task"], row["label"]))


def whole(lake: DeltaLake) -> list[dict[str, Any]]:
    """Return all rows of a lake in order, with their places."""
    found = lake.read().to_pylist()
    return sorted(found, key=lambda row: (row["offset"], row["rank"]))
