"""What tests of the lake share: rows of samples with positions, and a commit of a table that is killed at any step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

HOUR_MS = 3_600_000
# 2026-11-25 00:00 UTC.
DAY_MS = 1_795_564_800_000

SCHEMA = pa.schema(
    [
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("event_time_ms", pa.int64(), nullable=False),
        pa.field("slots", pa.list_(pa.int64()), nullable=False),
    ]
)


def samples(partition: int, offset: int, times_ms: Sequence[int]) -> pa.RecordBatch:
    """Return one record's samples, one a time given, ranks from 0."""
    return pa.RecordBatch.from_pylist(
        [
            {"partition": partition, "offset": offset, "rank": rank, "event_time_ms": at, "slots": [at, offset]}
            for rank, at in enumerate(times_ms)
        ],
        schema=SCHEMA,
    )


def hours(*numbers: int) -> list[int]:
    """Return a time within each of these hours of the day."""
    return [DAY_MS + number * HOUR_MS + 17 for number in numbers]


def link_tree(real: Path, copy: Path) -> set[str]:
    """Make a copy by links and return what it holds."""
    shutil.rmtree(copy, ignore_errors=True)
    if real.exists():
        shutil.copytree(real, copy, copy_function=os.link)
    return {str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()} if copy.exists() else set()


def steps(before: set[str], copy: Path) -> list[str]:
    """Return the files that a commit made, in the order in which it makes them: data, the log's entry, a checkpoint."""
    made = [str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()]
    new = (path for path in made if path not in before)
    return sorted(new, key=lambda path: (path.startswith("_delta_log"), "checkpoint" in path, path))


def bring(made: list[str], real: Path, copy: Path, stop_at: int | None) -> None:
    """Bring the first `stop_at` files into the real table, half of the next one under its staged name; None: all."""
    whole = made if stop_at is None else made[:stop_at]
    for path in whole:
        (real / path).parent.mkdir(parents=True, exist_ok=True)
        os.link(copy / path, real / path)  # fails where another one was first, as the store does
    if stop_at is not None and stop_at < len(made):
        half = real / f"{made[stop_at]}#1"
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes((copy / made[stop_at]).read_bytes()[:100])
    for path in [real / p for p in whole] + list(real.rglob("*#1")):
        os.utime(path, (0, 0))
