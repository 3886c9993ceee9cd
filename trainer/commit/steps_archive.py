"""Steps that no checkpoint needs any more, moved from their topic to the store, where replay and ledger read them.

One file holds the records of `steps` from one offset to below another, of all models and as they were written:
`steps/<topic>-<id of the topic>/<begin>-<end>.<digest>.parquet`. The records' bytes are the truth; model, run, step and
recipe stand beside them for whoever looks at the file with pandas or DuckDB. The digest is that of the file.

Order of a move: 1. put a file, 2. read it back, 3. delete the records from the topic. A crash leaves records in both
places, and they are the same; two trainers that move at once put files that overlap and say the same. A reader takes
the files first and the topic from where they end.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.steps import Step, decode_step
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.log import Admin, Reader, read_range
from headrace.contract.metrics import Metrics

logger = logging.getLogger("headrace.train")

COLUMNS = pa.schema(
    {
        "offset": pa.int64(),
        "model": pa.string(),
        "run": pa.string(),
        "step": pa.int64(),
        "recipe": pa.string(),
        "record": pa.binary(),
    }
)
"""The first five are null beside a record that is no step."""
RECORDS_MAX = 50_000
"""Of one file: some 30 MB of records, which a file holds in a tenth."""
CHECKPOINTS_PASSED = 3
"""Records stay in the topic until so many checkpoints do not need them: as many as a recovery tries in turn."""

_NAME = re.compile(r"(?P<begin>\d{20})-(?P<end>\d{20})\.(?P<digest>[0-9a-f]{32})\.parquet")


class _File(NamedTuple):
    begin: int
    end: int
    digest: str
    name: str


class StepsArchive:
    """The moved steps of one topic. For one thread."""

    def __init__(self, blobs: Blobs, topic: str, topic_id: str = "") -> None:
        """`topic_id`, as `Admin.topic_id`, keeps the steps of a topic apart from those of one that was made anew."""
        self._blobs, self._folder = blobs, f"steps/{topic}-{topic_id or 'unknown'}"

    def span(self, begin: int = 0) -> tuple[int, int]:
        """Return from which offset, at or above `begin`, and to below which one the records are here without a gap;
        both are `begin` where none of it is. Raises `Unavailable`."""
        return _span(self._files(), begin)

    def read(self, begin: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yield offsets and records of `span(begin)`.

        Raises `Unavailable`, and `InvariantBroken` where every file of an offset is damaged.
        """
        files = self._files()
        at, end = _span(files, begin)
        while at < end:
            holding = sorted((f for f in files if f.begin <= at < f.end), key=lambda f: -f.end)
            found = next(((f, rows) for f in holding if (rows := self._intact(f)) is not None), None)
            if found is None:
                names = ", ".join(f.name for f in holding)
                raise InvariantBroken(
                    f"steps from offset {at} on are damaged in the store ({names}) and no longer in the topic. Bring "
                    "the file back from a copy of the store; a new recipe begins without them."
                )
            file, rows = found
            offsets, records = rows["offset"].to_pylist(), rows["record"].to_pylist()
            yield from ((o, r) for o, r in zip(offsets, records, strict=True) if o >= at)
            at = file.end

    def put(self, begin: int, end: int, records: Sequence[tuple[int, bytes]]) -> None:
        """Store what the topic has from `begin` to below `end`, and return when it was read back.

        Raises `Unavailable`, also where other bytes came back.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(_rows(records), sink, compression="zstd")
        data = bytes(sink.getvalue())
        name = f"{self._folder}/{begin:020d}-{end:020d}.{_digest(data)}.parquet"
        self._blobs.put(name, data)
        if self._blobs.get(name) != data:
            raise Unavailable(f"{name} was stored and other bytes came back; the steps stay in their topic.")

    def _files(self) -> list[_File]:
        names = [(name, _NAME.fullmatch(name.rpartition("/")[2])) for name in self._blobs.list(self._folder)]
        return [_File(int(m["begin"]), int(m["end"]), m["digest"], name) for name, m in names if m is not None]

    def _intact(self, file: _File) -> pa.Table | None:
        data = self._blobs.get(file.name)
        if data is None or _digest(data) != file.digest:
            logger.warning("%s is damaged or gone", file.name)
            return None
        return pq.read_table(pa.BufferReader(data), columns=["offset", "record"])


class StepsMover:
    """Moves steps to the archive as checkpoints pass them. For one thread, that which writes the checkpoints."""

    def __init__(
        self,
        archive: StepsArchive,
        topic: str,
        open_reader: Callable[[], Reader],
        admin: Admin,
        metrics: Metrics,
        *,
        records_min: int,
    ) -> None:
        """Move nothing yet.

        Args:
            open_reader: makes a reader, which is closed after a move.
            records_min: so many records are moved at once, or none; 0 never moves any.
        """
        self._archive, self._topic, self._open_reader, self._admin = archive, topic, open_reader, admin
        self._metrics, self._records_min = metrics, records_min
        self._passed: deque[int] = deque(maxlen=CHECKPOINTS_PASSED)
        self._is_trimmed = False
        """Whether this process has deleted from the topic what the archive holds."""

    def checkpointed(self, steps_offset: int) -> None:
        """Note that a checkpoint was stored that contains all steps before this offset, and move what is due.

        What the log or the store cannot do now is done after a later checkpoint.
        """
        self._passed.append(steps_offset)
        if not self._records_min or len(self._passed) < CHECKPOINTS_PASSED:
            return
        try:
            self._move(self._passed[0])
        except Unavailable as error:
            logger.warning("steps stay in their topic for now: %s", error)
            self._metrics.add("errors_total", kind="steps_archive")

    def _move(self, upto: int) -> None:
        moved = self._archive.span()[1]
        if self._is_trimmed and upto - moved < self._records_min:
            return
        reader = self._open_reader()
        try:
            first = reader.begin_offsets(self._topic)[0]
            if first > moved > 0:
                raise InvariantBroken(
                    f"steps from offset {moved} to below {first} are neither in topic {self._topic!r} nor in the "
                    "store: somebody deleted them, and no replay can tell what they learnt."
                )
            if upto - max(moved, first) >= self._records_min:
                moved = self._put(reader, max(moved, first), upto)
        finally:
            reader.close()
        if moved > first:
            self._admin.delete_before(self._topic, {0: moved})
            logger.info("steps before offset %d lie in the store", moved)
        self._is_trimmed = True

    def _put(self, reader: Reader, begin: int, end: int) -> int:
        records = read_range(reader, self._topic, begins={0: begin}, ends={0: end})
        while some := list(islice(records, RECORDS_MAX)):
            upto = some[-1].offset + 1 if len(some) == RECORDS_MAX else end
            self._archive.put(begin, upto, [(r.offset, r.value) for r in some if r.value is not None])
            self._metrics.add("steps_archived_total", len(some))
            begin = upto
        return begin


def read_all_steps(
    reader: Reader,
    topic: str,
    archive: StepsArchive | None = None,
    *,
    begin: int | None = None,
    end: int | None = None,
) -> Iterator[tuple[int, Step]]:
    """Yield offset and content of all models' steps, first of the archive and then of the topic, from `begin`, or from
    the first that is kept, to below `end`, or to the present end. What is no step is passed over.

    Raises as `read_range` and `StepsArchive.read`, and `InvariantBroken` where some of them are in neither.
    """
    at, end = begin or 0, reader.end_offsets(topic)[0] if end is None else end
    while at < end:
        archived = archive.span(at) if archive is not None else (at, at)
        for offset, record in archive.read(at) if archive is not None and archived[1] > at else ():
            if offset < end:
                yield from _decoded(offset, record)
        has_some, at = archived[1] > archived[0], max(at, archived[1])
        first = reader.begin_offsets(topic)[0]
        if at < first and archive is not None and archive.span(at)[1] > at:
            continue  # A trainer moved some while the files were read.
        if at < first and (has_some or begin is not None):
            raise InvariantBroken(
                f"steps from offset {at} to below {first} are neither in topic {topic!r} nor in the store: somebody "
                "deleted them."
            )
        try:
            for one in read_range(reader, topic, begins={0: max(at, first)}, ends={0: end}):
                if one.value is not None:
                    yield from _decoded(one.offset, one.value)
                at = one.offset + 1
        except InvariantBroken:
            if reader.begin_offsets(topic)[0] <= at:
                raise
            continue  # Likewise, while the topic was read.
        return


def _decoded(offset: int, record: bytes) -> Iterator[tuple[int, Step]]:
    try:
        yield offset, decode_step(record)
    except msgspec.DecodeError:
        return


def _span(files: Sequence[_File], begin: int) -> tuple[int, int]:
    after = [f for f in files if f.end > begin]
    if not after:
        return begin, begin
    first = at = max(begin, min(f.begin for f in after))
    while further := [f.end for f in after if f.begin <= at < f.end]:
        at = max(further)
    return first, at


def _rows(records: Sequence[tuple[int, bytes]]) -> pa.Table:
    steps = [next((step for _, step in _decoded(offset, record)), None) for offset, record in records]
    columns = {
        "offset": [offset for offset, _ in records],
        **{name: [getattr(step, name, None) for step in steps] for name in ("model", "run", "step", "recipe")},
        "record": [record for _, record in records],
    }
    return pa.table(columns, COLUMNS)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
