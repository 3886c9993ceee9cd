"""The lake on each store: commits, compaction, a day read back, beside plain Parquet files and PyIceberg.

Method: the same commits of samples (28 columns, event times over four hours, 2 % of them late) go through
`DeltaLake.append`, one after the other, as the sink makes them. Stores: a folder, a real HDFS that is started for it
(WebHDFS has no part in this), a real CephFS where one can run (root, ceph, /dev/fuse). Then the lake is compacted, and
one day is read back as columns by `DeltaLake.read` and by DuckDB from the files, before and after. Peers on the folder:
pyarrow's `write_dataset` with the same partitions, which has no commit, no positions and is half there when it is
killed; and PyIceberg with a catalog in SQLite, in an environment of its own (bench/peers/lake.py). Sides take turns,
each round on an empty folder; figures are medians of all commits and of the rounds. Files are in the page cache when
they are read. What rate the sink itself follows is bench/store/sink.py's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow import feather

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.figures import Figure, show

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.hour_files import with_hours
from headrace.backends.lake.upkeep import Done, Upkeep
from headrace.contract.config import LakeConfig, port
from headrace.contract.formats.positions import Position
from headrace.deploy.local import readiness
from headrace.deploy.local.doctor import free_port
from headrace.deploy.local.layout import HOST, Layout, jar_folder
from headrace.deploy.local.readiness import quiet_clients
from headrace.deploy.local.servers import cephfs, hdfs
from headrace.deploy.local.servers.jars import ensure_jars
from headrace.deploy.local.servers.java import find_java

DAY, DAY_MS, HOUR_MS = date(2026, 11, 25), 1_795_564_800_000, 3_600_000
SLOTS, NUMBERS, FIELDS = 16, 4, 10
BASE = 23_300


def commit_rows(number: int, rows: int, commits: int) -> pa.RecordBatch:
    """Return one commit's samples: time moves over four hours, one row in fifty is up to three hours late."""
    rng = np.random.default_rng(number)
    at_N = DAY_MS + 8 * HOUR_MS + (number + rng.random(rows)) * 4 * HOUR_MS / commits
    at_N -= (rng.random(rows) < 0.02) * rng.random(rows) * 3 * HOUR_MS
    ids = pa.array([f"{number:08x}-{i:08x}" for i in range(rows)])
    columns: dict[str, Any] = {
        "partition": pa.array(np.zeros(rows, np.int32)),
        "offset": pa.array(np.full(rows, number, np.int64)),
        "rank": pa.array(np.arange(rows, dtype=np.int32)),
        "event_id": ids,
        "request_id": ids,
        "key": pa.array(rng.integers(0, 100_000, rows).astype(str)),
        "event_time_ms": pa.array(at_N.astype(np.int64)),
        "task": pa.array(["click"] * rows),
        "label": pa.array((rng.random(rows) < 0.1).astype(np.float32)),
        "weight": pa.array(np.ones(rows, np.float32)),
        "spec": pa.array(["0123456789abcdef"] * rows),
    }
    for field in range(FIELDS):
        columns[f"field_{field}"] = pa.array(rng.integers(0, 10 ** (field + 1), rows))
    for counter in range(5):
        columns[f"counter_{counter}"] = pa.array(rng.poisson(3, rows).astype(np.float32))
    slots = pa.array(rng.integers(0, 2**40, rows * SLOTS))
    numbers = pa.array(rng.random(rows * NUMBERS).astype(np.float32))
    columns["slots"] = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * SLOTS), slots)
    columns["numeric"] = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * NUMBERS), numbers)
    return pa.RecordBatch.from_pydict(columns)


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long it took, in seconds, and what it gave."""
    begin = time.monotonic()
    result = act()
    return time.monotonic() - begin, result


def read_again(read: Callable[[], pa.Table]) -> tuple[float, pa.Table]:
    """Return the median of three reads, of which the first finds memory and caches as others left them; and rows."""
    reads = [timed(read) for _ in range(3)]
    return statistics.median(took_s for took_s, _ in reads), reads[-1][1]


@contextmanager
def own_hdfs(home: Path) -> Iterator[str]:
    """Yield the address of an HDFS of our own."""
    layout = Layout(
        home=home,
        port_base=BASE,
        brokers="",
        store=f"hdfs://{HOST}:{port('namenode', BASE)}/bench",
        webhdfs=f"http://{HOST}:{port('namenode_http', BASE)}",
        project=home,
        own_kafka=False,
        own_hdfs=True,
    )
    layout.prepare()
    java = find_java()
    jars = ensure_jars(jar_folder(home), java, print)
    hdfs.format_once(layout, java, jars["hdfs"])
    commands = hdfs.start_commands(layout, java, jars["hdfs"]).values()
    servers = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for c in commands]
    try:
        until = time.monotonic() + 60
        while (trouble := readiness.hdfs_trouble(layout)) and time.monotonic() < until:
            time.sleep(0.2)
        if trouble:
            raise RuntimeError(trouble)
        yield layout.store
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(20)


@contextmanager
def own_cephfs(home: Path) -> Iterator[str]:
    """Yield the mount of a CephFS of our own."""
    cluster = cephfs.CephFs(home / "cluster", next(n for n in range(6_790, 6_890) if free_port(n)))
    try:
        cluster.start()
        yield str(cluster.mount)
    finally:
        cluster.stop()


Took = dict[str, list[float]]
"""What one side needed: `commit` in seconds a commit, everything else one value a round."""


def ours(uri: str, batches: list[pa.RecordBatch]) -> Took:
    """Commit, read, compact and read again."""
    lake = DeltaLake(uri, partitions=1, config=LakeConfig(compact_files=2))
    took_s = [
        timed(lambda b=batch, n=number: lake.append([b], {0: n + 1}, {0: Position(n, len(b) - 1)}))[0]
        for number, batch in enumerate(batches)
    ]
    keeper, before, after = Upkeep(lake), Done(), Done()
    keeper.look(before)
    read_small_s, rows = read_again(lambda: lake.read(day=DAY))
    duck_small_s = by_duckdb(lake.open().file_uris(), batches) if "://" not in uri else 0.0
    compact_s, _ = timed(lambda: keeper.compact(after))
    keeper.look(after)
    read_s, again = read_again(lambda: lake.read(day=DAY))
    if rows.num_rows != again.num_rows or again.num_rows != sum(len(b) for b in batches):
        raise RuntimeError(f"{rows.num_rows} rows before, {again.num_rows} after compaction")
    found = {
        "files_before": before.files,
        "files_after": after.files,
        "bytes_before": before.bytes,
        "bytes_after": after.bytes,
        "compaction": compact_s,
        "read_day_before": read_small_s,
        "read_day": read_s,
    }
    if duck_small_s:
        found |= {"duckdb_day_before": duck_small_s, "duckdb_day": by_duckdb(lake.open().file_uris(), batches)}
    return {"commit": took_s, **{name: [value] for name, value in found.items()}}


def by_duckdb(paths: list[str], batches: list[pa.RecordBatch]) -> float:
    """Return how long DuckDB needs for the day as columns."""
    query = "select * from read_parquet($paths, hive_partitioning = true) where event_date = $day"
    took_s, rows = read_again(lambda: duckdb.sql(query, params={"paths": paths, "day": DAY}).to_arrow_table())
    if rows.num_rows != sum(len(b) for b in batches):
        raise RuntimeError(f"DuckDB found {rows.num_rows} rows")
    return took_s


def plain_files(folder: Path, batches: list[pa.RecordBatch]) -> Took:
    """Write plain Parquet files and read them."""
    took_s = []
    for number, batch in enumerate(batches):
        rows = with_hours(pa.Table.from_batches([batch]))
        write = lambda rows=rows, n=number: ds.write_dataset(  # noqa: E731
            *(rows, folder),
            basename_template=f"{n}-{{i}}.parquet",
            format="parquet",
            partitioning=["event_date", "event_hour"],
            partitioning_flavor="hive",
            existing_data_behavior="overwrite_or_ignore",
        )
        took_s.append(timed(write)[0])
    day = ds.field("event_date") == DAY.isoformat()
    parts = ds.partitioning(pa.schema([("event_date", pa.string()), ("event_hour", pa.int32())]), flavor="hive")
    read_s, _ = read_again(lambda: ds.dataset(folder, partitioning=parts).to_table(filter=day))
    duck_s = by_duckdb([str(path) for path in folder.rglob("*.parquet")], batches)
    return {"commit": took_s, "read_day": [read_s], "duckdb_day": [duck_s], **sizes(folder)}


def iceberg(python: str, folder: Path, batches: list[pa.RecordBatch]) -> Took:
    """Run PyIceberg's side, in the environment of `python`."""
    source = folder / "commits.arrow"
    folder.mkdir()
    feather.write_feather(pa.Table.from_batches(batches), source, chunksize=len(batches[0]), compression="uncompressed")
    program = Path(__file__).parents[1] / "peers" / "lake.py"
    ran = subprocess.run([python, str(program), str(source), str(folder)], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"PyIceberg: {ran.stderr[-800:]}")
    told: Took = json.loads(ran.stdout.splitlines()[-1])
    return {**told, **sizes(folder)}


def sizes(folder: Path) -> Took:
    """Return how many data files there are, and their bytes."""
    files = [path.stat().st_size for path in folder.rglob("*.parquet")]
    return {"files_before": [len(files)], "bytes_before": [sum(files)]}


UNITS = {"compaction": "s", "files_before": "files", "files_after": "files", "bytes_before": "B", "bytes_after": "B"}
PEERS = {"plain": ("pyarrow files", ""), "iceberg": ("PyIceberg", "_vs_iceberg")}
"""Each with what its figures' names end in."""


def figures(rounds: dict[str, Took], rows: int) -> Iterator[Figure]:
    """Yield each store's medians, those of the folder beside the peers', which lie there too."""

    def of(took: Took) -> dict[str, float]:
        commit_s = took["commit"]
        return {
            "rows_per_second": rows / statistics.median(commit_s),
            "commit_p50": statistics.median(commit_s) * 1000,
            "commit_p99": float(np.quantile(commit_s, 0.99)) * 1000,
            **{name: statistics.median(values) for name, values in took.items() if name != "commit"},
        }

    units = {"rows_per_second": "rows/s", "commit_p50": "ms", "commit_p99": "ms", **UNITS}
    peers = {PEERS[name]: of(took) for name, took in rounds.items() if name in PEERS}
    for store, took in rounds.items():
        if store in PEERS:
            continue
        for name, value in of(took).items():
            whole, unit = f"lake_{store}_{name}", units.get(name, "s")
            beside = {p: found[name] for p, found in peers.items() if name in found} if store == "file" else {}
            if not beside:
                yield Figure(whole, round(value, 3), unit)
            for (peer, ending), against in beside.items():
                yield Figure(whole + ending, round(value, 3), unit, peer, round(against, 3), round(value / against, 2))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 round of 8 commits of 20,000 rows")
    parser.add_argument("--stores", default="file,hdfs,cephfs", help="those of file, hdfs, cephfs to measure")
    parser.add_argument("--iceberg", metavar="PYTHON", help="the Python that has pyiceberg")
    args = parser.parse_args()
    # 75,000 rows are what comes at 25,000 events/s within sink.commit_ms, 3 s.
    rounds, commits, rows = (1, 8, 20_000) if args.quick else (3, 10, 75_000)
    batches = [commit_rows(number, rows, commits) for number in range(commits)]
    quiet_clients()
    home = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    took: dict[str, Took] = {}
    try:
        with ExitStack() as stack:
            sides = dict(_sides(stack, home, args.stores.split(","), args.iceberg, batches))
            for number in range(rounds):
                for name in _turned(list(sides), number):
                    for what, values in sides[name](number).items():
                        took.setdefault(name, {}).setdefault(what, []).extend(values)
                print(f"round {number + 1} of {rounds} done", flush=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    show(list(figures(took, rows)))


def _turned(names: list[str], number: int) -> list[str]:
    return names[number % len(names) :] + names[: number % len(names)]


def _sides(
    stack: ExitStack, home: Path, stores: list[str], python: str | None, batches: list[pa.RecordBatch]
) -> Iterator[tuple[str, Callable[[int], Took]]]:
    """Yield what runs one round of each side, by its name; servers run until `stack` ends."""
    roots = {"hdfs": own_hdfs, "cephfs": own_cephfs}
    for store in stores:
        if store == "cephfs" and (lacking := cephfs.missing()):
            print(f"CephFS takes no part: {lacking}")
            continue
        root = stack.enter_context(roots[store](home / store)) if store in roots else str(home)
        yield store, lambda number, root=root: ours(f"{root}/lake-{number}", batches)
    yield "plain", lambda number: plain_files(home / f"plain-{number}", batches)
    if python:
        yield "iceberg", lambda number: iceberg(python, home / f"iceberg-{number}", batches)
    else:
        print("PyIceberg takes no part: --iceberg PYTHON names one that has it")


if __name__ == "__main__":
    main()
