"""Goal: an impression's external columns are what was known: earlier in the log, crawled no later. Method: random logs
against a search of the whole log, with repeats, ghosts, restarts from a snapshot, and any cut into batches."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from headrace.contract.crawl import Crawl, Extract
from headrace.contract.formats.events import EXTERNAL_SCHEMA, batch_from_rows
from headrace.stream.join.external_lookup import KEEP, ExternalLookup

CRAWLS = tuple(
    Crawl(
        name=name,
        kind="json",
        joins=joins,
        start=("https://x.example/",),
        key=Extract(at="id"),
        fields={"n": Extract(at="n", type="int64"), "x": Extract(at="x", type="float64"), "t": Extract(at="t")},
    )
    for name, joins in (("one", "item"), ("two", "shop"))
)
COLUMNS = [name for crawl in CRAWLS for name in crawl.columns()]


def log_of(random: Random, length: int) -> list[dict[str, Any]]:
    """External rows as a crawler writes them that is killed now and then: sent again, under a higher epoch."""
    rows: list[dict[str, Any]] = []
    epoch, now, newest = 1, 1_000, {}
    for _ in range(length):
        now += random.randrange(0, 30)
        source, key = random.choice(["one", "two"]), str(random.randrange(4))
        values: dict[str, Any] | None = {"n": random.randrange(3), "x": random.random(), "t": random.choice("ab")}
        if random.random() < 0.1:
            values = None
        at_ms = max(now, newest.get((source, key), 0) + 1)
        newest[source, key] = at_ms
        version = f"v{random.randrange(10**9)}" if values else "gone"
        text = None if values is None else json.dumps(values)
        row = {"source": source, "key": key, "crawl_time_ms": at_ms, "epoch": epoch, "version": version}
        rows.append({**row, "values": text, "url": "u"})
        if random.random() < 0.1:
            again = rows[-random.randrange(1, 6) :]
            if random.random() < 0.5:
                epoch += 1
            rows += [{**one, "epoch": epoch} for one in again]
        if random.random() < 0.05:
            rows.append(
                {**row, "epoch": epoch - 1, "crawl_time_ms": at_ms + 1, "version": "ghost", "values": '{"n": 9}'}
            )
    return rows


def expected(before: list[dict[str, Any]], source: str, key: str | None, time_ms: int) -> tuple[Any, ...]:
    """Search the log before the impression, row by row."""
    epoch, versions = -1, []
    for row in before:
        if row["epoch"] < epoch:
            continue
        epoch = row["epoch"]
        if (row["source"], row["key"]) != (source, key):
            continue
        if versions and (
            row["version"] == versions[-1]["version"] or row["crawl_time_ms"] <= versions[-1]["crawl_time_ms"]
        ):
            continue
        versions.append(row)
    known = [row for row in versions[-KEEP:] if row["crawl_time_ms"] <= time_ms]
    if not known:
        return (None, None, None, 0)
    values = json.loads(known[-1]["values"] or "{}")
    return (values.get("n"), values.get("x"), values.get("t"), known[-1]["crawl_time_ms"])


def impressions(random: Random, now: int, count: int) -> tuple[dict[str, pa.Array], Any]:
    times = [now - random.randrange(-50, 600) for _ in range(count)]
    items = [random.choice([0, 1, 2, 3, 9, None]) for _ in range(count)]
    shops = [random.choice(["0", "1", "2", "3", None]) for _ in range(count)]
    columns = {"item": pa.array(items, pa.int64()), "shop": pa.array(shops, pa.string())}
    return columns, np.array(times, np.int64)


@pytest.mark.parametrize("seed", range(60))
def test_what_was_known_and_nothing_else(seed: int) -> None:
    random = Random(seed)
    rows = log_of(random, 80)
    memory, at = ExternalLookup(CRAWLS), 0
    while at < len(rows):
        step = random.randrange(1, 9)
        memory.take(batch_from_rows(rows[at : at + step], EXTERNAL_SCHEMA))
        at += step
        if random.random() < 0.2:
            plain = memory.to_plain()
            memory = ExternalLookup(CRAWLS)
            memory.load_plain(json.loads(json.dumps(plain)))
            assert memory.to_plain() == plain
        columns, times = impressions(random, max(r["crawl_time_ms"] for r in rows[:at]), 20)
        got = memory.columns(columns, times)
        assert list(got) == COLUMNS
        for n in range(20):
            for crawl in CRAWLS:
                key = columns[crawl.joins][n].as_py()
                key = None if key is None else str(key)
                found = tuple(got[name][n].as_py() for name in crawl.columns())
                assert found == expected(rows[:at], crawl.name, key, int(times[n])), (seed, at, n, crawl.name)


def test_the_same_rows_cut_anyhow_are_the_same_state() -> None:
    rows = log_of(Random(3), 200)
    whole, one_by_one = ExternalLookup(CRAWLS), ExternalLookup(CRAWLS)
    whole.take(batch_from_rows(rows, EXTERNAL_SCHEMA))
    for row in rows:
        one_by_one.take(batch_from_rows([row], EXTERNAL_SCHEMA))
    assert whole.to_plain() == one_by_one.to_plain()


def test_what_was_served_is_what_is_learnt() -> None:
    memory = ExternalLookup(CRAWLS[:1])
    row = {"source": "one", "key": "1", "crawl_time_ms": 10, "epoch": 1, "version": "v", "values": '{"n": 5, "x": 1.5}'}
    memory.take(batch_from_rows([row], EXTERNAL_SCHEMA))
    batch = {
        "item": pa.array([1, 1, 1], pa.int64()),
        "external.one.n": pa.array([4, None, None], pa.int64()),
        "external.one.x": pa.array([None, None, None], pa.float64()),
        "external.one.t": pa.array(["a", None, None]),
        "external.one.crawl_time_ms": pa.array([9, 0, None], pa.int64()),
    }
    got = memory.columns(batch, np.array([20, 20, 20], np.int64))
    assert got["external.one.n"].to_pylist() == [4, None, 5]
    assert got["external.one.x"].to_pylist() == [None, None, 1.5]
    assert got["external.one.crawl_time_ms"].to_pylist() == [9, 0, 10]


def test_a_value_of_another_type_is_null_and_a_new_source_finds_what_came_before() -> None:
    memory = ExternalLookup(())
    row = {"source": "one", "key": "1", "crawl_time_ms": 10, "epoch": 1, "version": "v"}
    memory.take(batch_from_rows([{**row, "values": '{"n": "5", "x": 2, "t": 3}'}], EXTERNAL_SCHEMA))
    later = ExternalLookup(CRAWLS)
    later.load_plain(memory.to_plain())
    got = later.lookup(CRAWLS[0], pa.array(["1"]), np.array([10], np.int64))
    assert [column[0].as_py() for column in got.values()] == [None, 2.0, None, 10]
