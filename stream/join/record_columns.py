"""The columns of a record of events: checked, as keys, as numbers. Pure.

Legend: N rows, 2 the halves of a key, E entries of a counter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.errors import EventRejected
from headrace.contract.formats.events import EPOCH_MAX
from headrace.contract.hashing import hash_text
from headrace.contract.spec import Counter
from headrace.kernels.arrays import I64s, U64s
from headrace.kernels.hashes import hash128_texts, with_numbers
from headrace.stream.features.counters import key_texts

_BOUNDED = ("as_of_ms", "crawl_time_ms", "epoch")


def checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch, or raise `EventRejected` when one of its first five columns has nulls, or an epoch or time
    beyond `EPOCH_MAX`.

    They are the envelope of an event, or what every row of an aggregate and of a crawled version has.
    """
    for i in range(5):
        if batch.column(i).null_count:
            raise EventRejected("bad_batch", f"column {batch.schema.names[i]!r} has nulls")
        if batch.schema.names[i] in _BOUNDED and not _is_within(numbers_of(batch, i)):
            # Taken, it would put every later one behind it, for ever.
            raise EventRejected("bad_batch", f"column {batch.schema.names[i]!r} has a number of more than 62 bits")
    return batch


def _is_within(numbers_N: I64s) -> bool:
    return bool(((numbers_N > -EPOCH_MAX) & (numbers_N < EPOCH_MAX)).all())


def keys_of(batch: pa.RecordBatch, salt: str) -> tuple[U64s, U64s]:
    """Return the keys of the event ids and of what they answer: (request, place)."""
    return hash128_texts(batch.column(0), hash_text(salt)), with_numbers(
        hash128_texts(batch.column(1), 0), numbers_of(batch, 2)
    )


def numbers_of(batch: pa.RecordBatch, column: int) -> I64s:
    """Return an integer column without a copy."""
    numbers_N: I64s = batch.column(column).to_numpy()
    return numbers_N


def local_keys(
    counters: Iterable[Counter], batch: pa.RecordBatch
) -> dict[tuple[str, ...], tuple[U64s, npt.NDArray[np.bool_]]]:
    """Return, by key fields, the keys under which a partition counts the rows itself, and which rows have one."""
    keys = {}
    for fields in {counter.key_fields for counter in counters}:
        # The partition key is in the envelope as text, and never null.
        texts = batch.column(3) if len(fields) == 1 else key_texts([batch.column(field) for field in fields])
        keys[fields] = hash128_texts(texts, 0), texts.is_valid().to_numpy(zero_copy_only=False)
    return keys


def as_columns(names: tuple[str, ...], known_NE: npt.NDArray[Any], batch: pa.RecordBatch) -> dict[str, pa.Array]:
    """Return counter columns: as they were served, else as known."""
    columns = {}
    for i, name in enumerate(names):
        served = batch.column(name)
        known = pa.array(known_NE[:, i].astype(np.float32))
        columns[name] = known if served.null_count == batch.num_rows else pc.coalesce(served, known)
    return columns
