"""What should be, where retention took the first records of `events`: what the topic and the lake hold. Pure.

The join of before is not known any more, so nothing says what the gateways read, what the join made of it, and whether
a sample is in neither. What got into either must still be in both, and in the steps, once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import msgspec
import numpy as np
import pyarrow as pa

from headrace.contract.formats.events import PUNCTUATION, decode_punctuation
from headrace.contract.interfaces.log import Record
from headrace.replay.ledger.behind import Watermarks
from headrace.replay.ledger.draw import Expected
from headrace.replay.ledger.keys import JOINED, in_order, sample_ids


def expected_of_kept(lake: pa.Table, topic: pa.Table, events: Iterable[Record], *, silent_ms: int) -> Expected:
    """Return each sample that the lake or the topic holds once, and its age by the punctuation that is left.

    Args:
        lake: with the columns of JOINED, like `topic`.
        events: what is left of the topic, in order within a partition.
    """
    watermarks = Watermarks(silent_ms)
    for record in events:
        if record.value is not None and record.headers.get("kind") == PUNCTUATION:
            with contextlib.suppress(msgspec.DecodeError):
                watermarks.take(record.partition, record.offset, decode_punctuation(record.value))
    held = in_order(pa.concat_tables([each.select(JOINED.names) for each in (lake, topic)])).combine_chunks()
    numbers_N = sample_ids(held).dictionary_encode().indices.to_numpy()
    samples = held.take(pa.array(np.sort(np.unique(numbers_N, return_index=True)[1]))).combine_chunks()
    resolved_ms_N, newest_ms = watermarks.resolved(samples), watermarks.newest_ms
    return Expected(samples, {}, 0, {}, 0, 0, resolved_ms_N=resolved_ms_N, newest_ms=newest_ms)
