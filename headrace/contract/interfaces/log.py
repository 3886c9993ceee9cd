"""What the pipeline needs of a log: append with a receipt, read by offset. Kafka and memory implement it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from headrace.contract.errors import ConfigRejected, InvariantBroken, Unavailable

DAY_MS = 86_400_000


class Record(msgspec.Struct, frozen=True):
    """One record as it lies in the log."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: dict[str, str]
    timestamp_ms: int


class TopicSpec(msgspec.Struct, frozen=True):
    """A topic as `ensure_topics` creates it. `retention_ms` -1 keeps for ever; it is ignored when compacted.

    `append_time`: a record's time is the broker's own when it appended the record, not what its writer says.
    `outlasts`: the topic that this one says something of, and whose records it must keep for longer than that keeps
    them; "" for none.
    """

    name: str
    partitions: int
    compacted: bool = False
    retention_ms: int = -1
    append_time: bool = False
    outlasts: str = ""


Delivered = Callable[[Exception | None, int], None]
"""Called once per record with (None, offset) when all replicas have it, or (error, -1)."""


class Producer(Protocol):
    """Appends in call order per partition, idempotent, acks=all. Not thread-safe unless the backend says so."""

    def send(
        self,
        topic: str,
        partition: int,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        delivered: Delivered | None = None,
    ) -> None:
        """Queue one record. Raises `Overloaded` when the local queue is full; nothing was queued then."""

    def poll(self, timeout_s: float) -> None:
        """Run delivery callbacks that are due, waiting at most `timeout_s`."""

    def flush(self, timeout_s: float) -> int:
        """Wait for receipts; return how many records still have none after `timeout_s`."""

    def close(self) -> None:
        """Flush for a short time, then free what the producer holds."""


class Reader(Protocol):
    """Reads assigned partitions by offset; owns no group and commits nothing: positions travel with the data."""

    def assign(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Read on from these offsets (each the next one to read); replaces the former assignment."""

    def poll(self, records_max: int, timeout_s: float) -> Sequence[Record]:
        """Return up to `records_max` records, in order within a partition; empty after `timeout_s` without any.

        Raises `Unavailable` on a broker that stays away, `InvariantBroken` when an assigned offset was deleted
        by retention (reading on would skip events in silence).
        """

    def position(self, topic: str, partition: int) -> int:
        """Return the offset that an assigned partition is read to: every record below it that a reader may see was
        returned. It moves past offsets without such a record too, in a `poll` that waits for the next one."""

    def begin_offsets(self, topic: str) -> dict[int, int]:
        """Return the first kept offset of every partition. Raises `Unavailable` where the log does not tell all."""

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Return, a partition, the offset that a reader can read up to now: the one that the next record will get, or
        that of the first record of the oldest open transaction. Every partition is told, or it raises `Unavailable`:
        a log that does not know a topic does not say that there is nothing to read."""

    def close(self) -> None:
        """Stop reading and free what the reader holds."""


class Admin(Protocol):
    """Creates topics; never deletes one."""

    def ensure_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Create what is missing, and set `append_time` where an older topic lacks it.

        Raises `ConfigRejected` where a topic exists with another partition count, may not be set, or is kept for no
        longer than what it `outlasts`; `Unavailable` where the log does not answer. What it had created by then stays,
        and the next call goes on from there.
        """

    def topic_id(self, topic: str) -> str:
        """Return the id that a topic of this name got when it was made; "" where the log tells none.

        A topic that was deleted and made anew has another one: offsets of the old mean nothing in it. Raises
        `Unavailable` where the log does not answer or knows no such topic: that is never "".
        """

    def retention_ms(self, topic: str) -> int:
        """Return for how long the log keeps a topic's records, as it is set now; -1 for ever. Raises `Unavailable`."""

    def delete_before(self, topic: str, offsets: Mapping[int, int]) -> None:
        """Delete for good what lies before these offsets, by partition; what is not there any more is no error. Raises
        `Unavailable`, also where the log refuses."""


def check_topic(stored_id: str, topic_id: str, topic: str) -> None:
    """Raise `InvariantBroken` where something stored was made of a topic of the same name that is no more."""
    if stored_id and topic_id and stored_id != topic_id:
        raise InvariantBroken(
            f"what is stored is of topic {topic!r} with id {stored_id}, and the topic has id {topic_id}: it was "
            "deleted and made anew. Its offsets begin at 0 again, and what comes would be taken for what was read "
            "already. Raise log.generation to begin anew beside what is stored."
        )


def check_outlasts(spec: TopicSpec, kept_ms: int, others_ms: int) -> None:
    """Raise `ConfigRejected` where a topic's records may go before those of the topic that it says something of.

    Args:
        spec: a topic with `outlasts`.
        kept_ms: how long the log keeps its records; -1 for ever.
        others_ms: the longest that the log keeps a record of `spec.outlasts`; -1 for ever.
    """
    if kept_ms < 0 or 0 <= others_ms < kept_ms:
        return
    others = f"up to {others_ms / DAY_MS:g} days" if others_ms >= 0 else "for ever"
    wanted = f"more than {others_ms}, or to -1" if others_ms >= 0 else "-1"
    raise ConfigRejected(
        f"topic {spec.name!r} keeps its records {kept_ms / DAY_MS:g} days and {spec.outlasts!r} keeps its own "
        f"{others}: what was done of one would be forgotten while it is still there, and be done twice. Set "
        f"retention.ms of {spec.name!r} to {wanted} (kafka-configs.sh --alter --entity-type topics), or that of "
        f"{spec.outlasts!r} lower; then start again."
    )


SILENT_S = 10.0
"""How long `read_range` waits for the next record: a broker that restarts takes 2 to 5 s."""
_POLL_RECORDS, _POLL_S = 2_000, 0.1


def read_range(
    reader: Reader,
    topic: str,
    *,
    begins: Mapping[int, int] | None = None,
    ends: Mapping[int, int] | None = None,
    latest_ms: int | None = None,
    silent_s: float = SILENT_S,
) -> Iterator[Record]:
    """Yield a topic's records from `begins` to below `ends`, in order within a partition.

    It ends when the reader's position has reached every end, for offsets may belong to no record that a reader sees:
    transactions write markers, and leave aborted records behind. Silence is never taken for the end.

    Args:
        begins: the first offset to read, by partition; the first kept offset where none is given.
        ends: the offset to stop before, by partition, for the partitions to read; by default, for all partitions, the
            present ends.
        latest_ms: a partition also ends before its first record of a later timestamp.
        silent_s: how long nothing may come before an end.

    Raises:
        Unavailable: when nothing came for `silent_s` before an end, or no broker answers. Read again later.
        InvariantBroken: when a first offset was deleted by retention.
    """
    ends = reader.end_offsets(topic) if ends is None else ends
    begins = reader.begin_offsets(topic) | dict(begins or {})
    left = {p: end for p, end in ends.items() if begins[p] < end}
    if not left:
        return
    reader.assign({(topic, p): begins[p] for p in left})
    positions, quiet_s = {p: begins[p] for p in left}, 0.0
    while left:
        records = reader.poll(_POLL_RECORDS, _POLL_S)
        for record in records:
            if record.offset >= left.get(record.partition, 0):
                continue
            if latest_ms is not None and record.timestamp_ms > latest_ms:
                del left[record.partition]
                continue
            yield record
        reached = {p: reader.position(topic, p) for p in left}
        if any(reached[p] > positions[p] for p in left):
            quiet_s = 0.0
        elif records:
            # Only partitions that are read to their end move on: they must not hide that the others stand still.
            reader.assign({(topic, p): reached[p] for p in left})
        else:
            quiet_s += _POLL_S
        positions, left = reached, {p: end for p, end in left.items() if reached[p] < end}
        if left and quiet_s >= silent_s:
            raise Unavailable(
                f"{topic}: nothing came for {silent_s:g} s and the end is not reached, in partition "
                + ", ".join(f"{p} at offset {positions[p]} of {end}" for p, end in left.items())
                + ". `headrace status` shows the broker; read again when it answers."
            )
