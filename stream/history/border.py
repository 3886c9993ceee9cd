"""Where live events begin: imported history ends before them.

Of the lake that is the least event time of its live rows. Of the log it is that of the first impressions of each
partition: what lies further on came later. An old event that came late may lie there all the same; `--until` says it by
hand.
"""

from __future__ import annotations

import pyarrow.compute as pc

from headrace.contract.errors import EventRejected
from headrace.contract.formats.events import IMPRESSION, decode_batch
from headrace.contract.formats.positions import imported
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.lake import LakeReader
from headrace.contract.interfaces.log import Reader, read_range

LOOKED_RECORDS = 20_000
"""So many records of a partition are looked at: before the first impression lie punctuation and aggregates."""


def first_in_lake(lake: LakeReader) -> int | None:
    """Return the least event time of the live rows; None where there is none. Raises as `LakeReader.read`."""
    state = lake.state()
    if state is None or not state.positions.by_partition:
        return None
    for hour in lake.layout(state.version).hours:
        span_ms = hour.begin_ms, hour.begin_ms + 3_600_000
        rows = lake.read(state.version, ["offset", "event_time_ms"], span_ms=span_ms)
        live_N = ~imported(rows["offset"].to_numpy())
        if live_N.any():
            return int(rows["event_time_ms"].to_numpy()[live_N].min())
    return None


def first_in_log(reader: Reader, topics: Topics) -> int | None:
    """Return the least event time of each partition's first impressions; None where there is none. Raises as
    `read_range`."""
    begins, ends = reader.begin_offsets(topics.events), reader.end_offsets(topics.events)
    found: list[int] = []
    for partition, begin in begins.items():
        end = min(ends[partition], begin + LOOKED_RECORDS)
        if end <= begin:
            continue
        for record in read_range(reader, topics.events, begins={partition: begin}, ends={partition: end}):
            if record.value is None or record.headers.get("kind") != IMPRESSION:
                continue
            try:
                least = pc.min(decode_batch(record.value)["event_time_ms"]).as_py()
            except (EventRejected, KeyError):
                continue
            if least is not None:
                found.append(int(least))
                break
    return min(found, default=None)


def first_live_ms(lake: LakeReader, reader: Reader, topics: Topics) -> int | None:
    """Return the time of the first live event, of lake and log; None where nothing is live."""
    known = [each for each in (first_in_lake(lake), first_in_log(reader, topics)) if each is not None]
    return min(known, default=None)
