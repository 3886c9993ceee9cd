"""History into the lake: each row once, however often the import is killed and begun again.

1. Which import it is: 63 bits of a digest of the files' contents, the mapping, and what the project declares.
2. The rows are read, checked and sorted onto the disk, below `folder`; what is refused is written beside them.
3. The lake says that the import is open: from when, until when, and from which position on (`imports.begin`).
4. The events go through the join, hour by hour. Samples are committed some at a time, in order of their positions, each
   commit with the position that it goes up to. What the lake holds already is joined again, and not committed again.
5. The lake says that the import is over.

Killed anywhere, the same command goes on: 2 is used again where it was whole, 4 makes the same samples at the same
positions. What 4 skips must be what the lake was given: count and sum of hashes are compared.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.config import Config
from headrace.contract.errors import ConfigRejected, InvariantBroken, Unavailable
from headrace.contract.formats.positions import orders
from headrace.contract.formats.sample import sample_schema
from headrace.contract.formats.seals import Seal, whole
from headrace.contract.privacy import Privacy
from headrace.contract.project import Project
from headrace.contract.rules import rules_of
from headrace.kernels.sample_ids import seal_of
from headrace.process.moved import moved
from headrace.stream.history.mapping import History
from headrace.stream.history.read import Read, read_rows
from headrace.stream.history.rows import Bounds, Refusal, Rows
from headrace.stream.history.sorted_events import SortedEvents, Span
from headrace.stream.history.virtual_log import VirtualLog
from headrace.stream.join.payload import Spill

COMMIT_ROWS = 200_000
REFUSED_SHOWN = 3
HOUR_MS = 3_600_000


class Begun(Protocol):
    """An import that is under way, as `headrace.backends.lake.imports.Begun`."""

    @property
    def id(self) -> int: ...
    @property
    def upto(self) -> int: ...
    @property
    def version(self) -> int: ...
    @property
    def from_ms(self) -> int: ...
    @property
    def until_ms(self) -> int: ...
    @property
    def now_ms(self) -> int: ...
    @property
    def stored(self) -> Seal: ...
    @property
    def first_offset(self) -> int: ...


class Imports(Protocol):
    """The imports of a lake, as `headrace.backends.lake.imports`."""

    def done(self, number: int) -> int | None: ...
    def open(self) -> Any: ...
    def begin(self, number: int, schema: pa.Schema, *, from_ms: int, until_ms: int, now_ms: int) -> Any: ...
    def append(self, begun: Any, rows: pa.Table) -> Any: ...
    def end(self, begun: Any, schema: pa.Schema) -> None: ...


HeldIds = Callable[[int | None, int, int], pa.Array]
"""Gives the event ids that a version of the lake (None: the newest) holds, of impressions with times from one to before
another."""


class Imported(msgspec.Struct, kw_only=True):
    """What came of an import, or would come."""

    id: str
    from_ms: int
    until_ms: int
    rows: dict[str, int] = {}
    """Rows that were read, by input."""
    events: dict[str, int] = {}
    """Events that passed every check, by type."""
    refused: dict[str, int] = {}
    """Rows by reason."""
    examples: dict[str, list[str]] = {}
    """Some of them: file, row, detail."""
    ignored: dict[str, list[str]] = {}
    """Columns that no field takes, by input."""
    first_ms: int | None = None
    last_ms: int | None = None
    samples: int = 0
    positives: dict[str, int] = {}
    """By task, of `labels`."""
    labels: dict[str, int] = {}
    unmatched: dict[str, int] = {}
    """Feedback that met no impression, by task."""
    commits: int = 0
    before: int = 0
    """Samples that an earlier run of this import had stored."""
    version: int | None = None
    is_sample: bool = False
    """Whether only the first rows of each input were looked at."""
    live_ms: int | None = None
    """The first live event, where the import was told to end after it; None where it ends before, or it is unknown."""


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What is to be imported."""

    history: History
    folder: Path
    """To which the mapping's paths are relative."""
    work: Path
    """Where rows are sorted, and refused ones written; a folder of this import's own is made in it."""
    from_ms: int | None = None
    until_ms: int | None = None
    commit_rows: int = COMMIT_ROWS
    dry_run: bool = False
    rows_max: int | None = None
    """Of each input, in a dry run."""


@dataclass
class Steps:
    """What happens between two steps: tests kill here; people see how far it is."""

    step: Callable[[str], None] = lambda _: None
    tell: Callable[[str, int], None] = lambda _, __: None
    """Told what is being done, and how many rows of it are."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an import depends on."""

    project: Project
    config: Config
    privacy: Privacy
    imports: Imports
    held_ids: HeldIds
    now_ms: Callable[[], int]
    first_live_ms: Callable[[], int | None]
    spill: Callable[[int], Spill] | None = None
    steps: Steps = field(default_factory=Steps)


def import_id(project: Project, config: Config, read: Read, request: ImportRequest) -> int:
    """Return the import's id: of what is imported and of all that makes samples of it."""
    parts = [
        msgspec.json.encode(read.digests, order="sorted"),
        msgspec.json.encode(request.history, order="sorted"),
        msgspec.json.encode(rules_of(project), order="sorted"),
        msgspec.json.encode([config.log.partitions, config.aggregate.grid_ms, str(config.ingest.past)]),
        msgspec.json.encode([request.from_ms, request.until_ms]),
        msgspec.json.encode([config.join.early_feedback_ms, config.join.repeat_horizon_ms, config.join.resolved_ms]),
    ]
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    # 0 says that none is under way.
    return (int.from_bytes(total.digest()[:8], "big") >> 1) | 1


class Importer:
    """One run of an import. `run` once."""

    def __init__(self, parts: Parts, request: ImportRequest) -> None:
        self._parts, self._request, self._steps = parts, request, parts.steps
        self._read = Read(request.history, parts.project, request.folder)
        self.id = import_id(parts.project, parts.config, self._read, request)
        self.work = request.work / (f"{self.id:016x}" + ("-dry" if request.dry_run else ""))
        self._refused: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    @property
    def refused_file(self) -> Path:
        """Where refused rows are written, one JSON object a line."""
        return self.work / "refused.jsonl"

    def run(self) -> Imported:
        """Import, or say what would be imported.

        Raises `ConfigRejected` where the import was done before, or another one is under way, or the border is
        refused; `Unavailable` where lake or disk fail: run it again.
        """
        parts, request = self._parts, self._request
        done = parts.imports.done(self.id)
        if done is not None:
            raise ConfigRejected(
                f"import {self.id:016x} is done: the same files with the same mapping gave the lake {done:,} samples. "
                "Nothing is to do."
            )
        begun = parts.imports.open()
        if begun is not None and begun.id != self.id and not request.dry_run:
            raise ConfigRejected(
                f"import {begun.id:016x} is half done, and this one is {self.id:016x}: its files, its mapping, --from, "
                "--until or the project's declarations are others. Run that one to its end first, or let it be over as "
                "it is: `headrace lake import --abandon`."
            )
        mine = begun if begun is not None and begun.id == self.id else None
        bounds = self._bounds(mine)
        found = Imported(id=f"{self.id:016x}", from_ms=bounds.from_ms, until_ms=bounds.until_ms)
        found.live_ms = self._live_before(bounds)
        with self._alone():
            return self._import(mine, bounds, found)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the import's folder. Raises `ConfigRejected` where another process does."""
        self.work.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.work, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise ConfigRejected(f"another process is at work on this import, in {self.work}.") from error
        finally:
            os.close(lock)

    def _import(self, mine: Begun | None, bounds: Bounds, found: Imported) -> Imported:
        parts, request = self._parts, self._request
        events = self._sorted(bounds, found)
        self._steps.step("the rows are sorted")
        if request.dry_run:
            self._join(events, None, bounds, found)
        else:
            schema = sample_schema(parts.project)
            begun: Any = mine
            if begun is None:
                begun = parts.imports.begin(
                    self.id, schema, from_ms=bounds.from_ms, until_ms=bounds.until_ms, now_ms=bounds.now_ms
                )
                self._steps.step("the import is open")
            begun = self._join(events, begun, bounds, found)
            parts.imports.end(begun, schema)
            self._steps.step("the import is over")
        found.refused, found.examples = dict(sorted(self._refused.items())), self._examples
        self._clear()
        return found

    def _bounds(self, mine: Begun | None) -> Bounds:
        """Return the times between which is imported: those of the import's beginning, where it has begun."""
        parts, request = self._parts, self._request
        if mine is not None:
            return Bounds(mine.from_ms, mine.until_ms, mine.now_ms)
        now_ms = parts.now_ms()
        until_ms = request.until_ms
        if until_ms is None:
            live_ms = parts.first_live_ms()
            until_ms = now_ms if live_ms is None else min(live_ms, now_ms)
        from_ms = request.from_ms or 0
        if from_ms >= until_ms:
            raise ConfigRejected(f"--from {from_ms} ms is not before --until {until_ms} ms: nothing lies between.")
        return Bounds(from_ms, until_ms, now_ms)

    def _live_before(self, bounds: Bounds) -> int | None:
        """Return the first live event's time where a stated end lies after it; nobody need be there to say it."""
        if self._request.until_ms is None:
            return None
        try:
            live_ms = self._parts.first_live_ms()
        except Unavailable:
            return None
        return live_ms if live_ms is not None and live_ms < bounds.until_ms else None

    def _sorted(self, bounds: Bounds, found: Imported) -> SortedEvents:
        """Return the checked events in order, from the disk where an earlier run left them whole."""
        parts, request = self._parts, self._request
        names = ["impression", *(f.name for f in parts.project.feedback)]
        rows = Rows(
            parts.project,
            parts.privacy,
            bounds,
            past_ms=parts.config.ingest.past_ms,
            skew_ms=parts.config.ingest.skew_ms,
        )
        events = SortedEvents(self.work, [rows.declared(name).schema for name in names])
        told = None if request.dry_run else events.load()
        if told is None or told["bounds"] != [bounds.from_ms, bounds.until_ms, bounds.now_ms]:
            (self.work / "index").unlink(missing_ok=True)
            events = SortedEvents(self.work, [rows.declared(name).schema for name in names])
            told = self._read_all(rows, events, names, bounds)
        found.rows, found.events, found.ignored = told["rows"], told["events"], told["ignored"]
        found.first_ms, found.last_ms, found.is_sample = told["first_ms"], told["last_ms"], told["is_sample"]
        self._refused, self._examples = Counter(told["refused"]), told["examples"]
        # What the join refuses is told again by each run.
        with self.refused_file.open("ab") as file:
            file.truncate(told["refused_bytes"])
        self._refuse_retained(found, bounds)
        return events

    def _read_all(self, rows: Rows, events: SortedEvents, names: list[str], bounds: Bounds) -> dict[str, Any]:
        counts: Counter[str] = Counter()
        first_ms = last_ms = None
        self.refused_file.unlink(missing_ok=True)
        read = self._read
        for some, refused in read_rows(read, rows, self._request.rows_max):
            moved()
            for each in some:
                if not each.batch.num_rows:
                    continue
                events.add(names.index(each.declared.name), each.batch)
                counts[each.declared.name] += each.batch.num_rows
                if each.declared.name == "impression":
                    least = pc.min_max(each.batch["event_time_ms"]).as_py()
                    first_ms = least["min"] if first_ms is None else min(first_ms, least["min"])
                    last_ms = least["max"] if last_ms is None else max(last_ms, least["max"])
            self._refuse(refused)
            self._steps.tell("reading rows", sum(read.rows.values()))
        told = {
            "bounds": [bounds.from_ms, bounds.until_ms, bounds.now_ms],
            "rows": dict(read.rows),
            "events": {name: counts[name] for name in names},
            "ignored": read.ignored,
            "first_ms": first_ms,
            "last_ms": last_ms,
            "is_sample": read.is_cut,
            "refused": dict(self._refused),
            "examples": self._examples,
            "refused_bytes": self.refused_file.stat().st_size if self.refused_file.exists() else 0,
        }
        events.close(told)
        return told

    def _refuse_retained(self, found: Imported, bounds: Bounds) -> None:
        """Raise `ConfigRejected` where the lake's retention would drop rows as soon as they are there."""
        kept_ms = self._parts.config.lake.retention_ms
        if not kept_ms or found.first_ms is None or found.first_ms >= bounds.now_ms - kept_ms:
            return
        since = -(-(bounds.now_ms - kept_ms) // HOUR_MS) * HOUR_MS
        raise ConfigRejected(
            f"the history begins at {found.first_ms} ms, and lake.retention_ms keeps {kept_ms / HOUR_MS:,.1f} h: "
            f"upkeep would drop what is before {since} ms. Raise lake.retention_ms (0 keeps all), or leave it out: "
            f"--from {since / 1_000:.0f}."
        )

    def _refuse(self, refused: list[Refusal]) -> None:
        if not refused:
            return
        with self.refused_file.open("ab") as file:
            for each in refused:
                file.write(msgspec.json.encode(each, enc_hook=str) + b"\n")
                self._refused[each.reason] += 1
                some = self._examples.setdefault(each.reason, [])
                if len(some) < REFUSED_SHOWN:
                    some.append(f"{each.file}, row {each.row}: {each.detail}")

    # The join

    def _join(self, events: SortedEvents, begun: Any, bounds: Bounds, found: Imported) -> Any:
        """Make samples and commit those that are not in the lake; return how the import stands then."""
        parts = self._parts
        first = 0 if begun is None else begun.first_offset
        log = VirtualLog(parts.project, parts.config, first_offset=first, spill=parts.spill)
        skipped, due = Seal(), Seal() if begun is None else begun.stored
        found.before = due.count
        waiting: list[pa.Table] = []
        done = 0
        for rows in self._samples(log, events, begun, bounds):
            self._count(found, rows)
            done += rows.num_rows
            self._steps.tell("joining, samples", done)
            if begun is None:
                continue
            fresh_N = orders(rows["offset"].to_numpy(), rows["rank"].to_numpy()) > begun.upto
            if not fresh_N.all():
                skipped = skipped.plus(whole(seal_of(rows.filter(pa.array(~fresh_N)))))
                rows = rows.filter(pa.array(fresh_N))
            if rows.num_rows:
                if skipped != due:
                    raise _other_rows(begun.id, skipped, due)
                waiting.append(rows)
            while sum(each.num_rows for each in waiting) >= self._request.commit_rows:
                every = pa.concat_tables(waiting)
                begun = self._commit(begun, every.slice(0, self._request.commit_rows), found)
                waiting = [every.slice(self._request.commit_rows)]
                skipped = due = begun.stored
        if begun is not None and skipped != due:
            raise _other_rows(begun.id, skipped, due)
        if waiting and (left := pa.concat_tables(waiting)).num_rows:
            begun = self._commit(begun, left, found)
        if log.repeats:
            self._refused["repeat"] += log.repeats
        found.unmatched = {task: count for task, count in log.unmatched.items() if count}
        return begun

    def _samples(self, log: VirtualLog, events: SortedEvents, begun: Any, bounds: Bounds) -> Iterator[pa.Table]:
        end_ms = bounds.until_ms
        version = None if begun is None else begun.version
        for span in events.spans():
            moved()
            span = self._without_held(span, version)
            if len(span.time_N):
                end_ms = max(end_ms, int(span.time_N[-1]))
            yield from log.take(span)
        longest_ms = max((t.window_ms + t.correct_ms for t in self._parts.project.tasks), default=0)
        yield from log.end(end_ms + longest_ms + 1)

    def _without_held(self, span: Span, version: int | None) -> Span:
        """Leave out impressions that the lake held before the import."""
        if version == -1 or not span.batches[0].num_rows:
            return span
        impressions = span.batches[0]
        held = self._parts.held_ids(version, int(span.time_N[0]), int(span.time_N[-1]) + 1)
        if not len(held):
            return span
        is_held_R = pc.is_in(impressions["event_id"], value_set=held).to_numpy(zero_copy_only=False)
        if not is_held_R.any():
            return span
        stay_N = ~((span.kind_N == 0) & is_held_R[span.row_N])
        refused = [
            Refusal(file="", row=0, reason="in_lake", detail=f"the lake holds impression {event_id!r}", record=None)
            for event_id in impressions["event_id"].filter(pa.array(is_held_R)).to_pylist()
        ]
        self._refuse(refused)
        return replace(span, kind_N=span.kind_N[stay_N], row_N=span.row_N[stay_N], time_N=span.time_N[stay_N])

    def _commit(self, begun: Any, rows: pa.Table, found: Imported) -> Any:
        begun = self._parts.imports.append(begun, rows)
        found.commits += 1
        self._steps.step(f"commit {found.commits}")
        return begun

    def _count(self, found: Imported, rows: pa.Table) -> None:
        found.samples += rows.num_rows
        for task in pc.unique(rows["task"]).to_pylist():
            ours = pc.equal(rows["task"], task)
            found.labels[task] = found.labels.get(task, 0) + int(pc.sum(ours).as_py())
            positive = pc.and_(ours, pc.greater(rows["label"], 0))
            found.positives[task] = found.positives.get(task, 0) + int(pc.sum(positive).as_py())

    def _clear(self) -> None:
        """Delete what was sorted; what was refused stays, where anything was."""
        for name in ("events", "index", "index.making"):
            (self.work / name).unlink(missing_ok=True)
        shutil.rmtree(self.work / "spill", ignore_errors=True)
        if self.refused_file.exists() and not self.refused_file.stat().st_size:
            self.refused_file.unlink()
        if not any(self.work.iterdir()):
            self.work.rmdir()


def _other_rows(number: int, skipped: Seal, due: Seal) -> InvariantBroken:
    return InvariantBroken(
        f"import {number:016x}: the lake holds {due.count:,} of its samples, and the same rows now make "
        f"{skipped.count:,} others there. Was it begun by another release? `headrace lake import --abandon` "
        "keeps it as it is."
    )
