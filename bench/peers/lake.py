"""PyIceberg's side of bench/store/lake.py, run by the Python that has it: the same commits, by hour, and a day.

Prints one JSON object: the seconds of each commit, and of reading the day back.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import ipc
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.transforms import HourTransform

DAY = ("2026-11-25T00:00:00+00:00", "2026-11-26T00:00:00+00:00")


def main(source: str, folder: str) -> None:
    """Commit each batch of the file, then read the day."""
    with pa.memory_map(source) as file:
        batches = ipc.open_file(file).read_all().to_batches()
    catalog = SqlCatalog("bench", uri=f"sqlite:///{folder}/catalog.db", warehouse=Path(folder).as_uri())
    catalog.create_namespace("bench")
    timed = [with_time(batch) for batch in batches]
    table = catalog.create_table("bench.samples", schema=timed[0].schema)
    with table.update_spec() as update:
        update.add_field("at", HourTransform(), "hour")
    took_s = []
    for rows in timed:
        begin = time.monotonic()
        table.append(rows)
        took_s.append(time.monotonic() - begin)
    reads_s = []
    for _ in range(3):
        begin = time.monotonic()
        found = table.scan(row_filter=f"at >= '{DAY[0]}' and at < '{DAY[1]}'").to_arrow()
        reads_s.append(time.monotonic() - begin)
        if found.num_rows != sum(len(b) for b in batches):
            raise SystemExit(f"{found.num_rows} rows were read back")
    print(json.dumps({"commit": took_s, "read_day": [statistics.median(reads_s)]}))


def with_time(batch: pa.RecordBatch) -> pa.Table:
    """Return the rows with their event time as a timestamp, which Iceberg's partitions want."""
    rows = pa.Table.from_batches([batch])
    at = pc.cast(rows["event_time_ms"], pa.timestamp("ms", "UTC")).cast(pa.timestamp("us", "UTC"))
    return rows.append_column("at", at)


if __name__ == "__main__":
    main(*sys.argv[1:])
