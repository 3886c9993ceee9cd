"""A consumer group's member on Kafka: a thread that polls, a bounded queue of what it read, positions that it commits.

Partitions move one by one (cooperative-sticky), so a new gateway disturbs only what it takes over. Where the group has
no position, or one that retention deleted, the first record kept (or, for `latest` and no position, the end) is where
reading begins; records deleted unread are counted and logged.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import confluent_kafka as ck

from headrace.contract.errors import Unavailable
from headrace.contract.interfaces.group import Claim, Fetched, MemberStatus

log = logging.getLogger("headrace.kafka")

_POLL_S = 0.05
"""Longest wait of the thread: positions, pauses and the end are seen this late."""
_COMMIT_S = 0.5
"""Time between commits: what a crash makes the next holder read again."""
_ASK_S = 2.0
"""Longest question to a broker; shorter than the 5 s in which a stage must stop."""
_RECORDS_ONCE = 500
_LAG_S = 1.0
_QUEUE_BYTES_MAX = 16_777_216
"""Bytes that wait to be taken before fetching pauses. 16 MiB."""

_CLIENT: dict[str, Any] = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    # A position that is gone is an error here: it is counted and logged, never skipped in silence.
    "auto.offset.reset": "error",
    "partition.assignment.strategy": "cooperative-sticky",
    "isolation.level": "read_committed",
    "broker.address.family": "v4",
    "reconnect.backoff.ms": 50,
    "reconnect.backoff.max.ms": 2_000,
    "retry.backoff.ms": 100,
    "session.timeout.ms": 10_000,
    "heartbeat.interval.ms": 2_000,
    # A topic that is created later, or partitions that are added, are seen within 10 s.
    "topic.metadata.refresh.interval.ms": 10_000,
    "fetch.wait.max.ms": 100,
    "fetch.error.backoff.ms": 100,
    # 16 MiB read ahead by the client itself, beside the queue of this class.
    "queued.max.messages.kbytes": 16_384,
    "queued.min.messages": 10_000,
    "log_level": 2,
}


class KafkaGroup:
    """Reads `topic` as one member of `group`; at most `queue_max` records wait to be taken. Safe between threads.

    `client` has librdkafka's settings of the connection, such as `security.protocol`; it cannot change what the group's
    protocol depends on.
    """

    def __init__(
        self,
        brokers: str,
        topic: str,
        group: str,
        *,
        start: Literal["earliest", "latest"] = "earliest",
        queue_max: int = 10_000,
        client: Mapping[str, str] | None = None,
    ) -> None:
        self._topic, self._start, self._queue_max = topic, start, queue_max
        self._lock = threading.Lock()
        self._queue: deque[Fetched] = deque()
        self._claims: dict[int, Claim] = {}
        self._settled: dict[int, int] = {}
        self._committed: dict[int, int] = {}
        self._paused: frozenset[Claim] = frozenset()
        self._again: dict[int, int] = {}
        """By partition, the first record that was read and dropped because its claim is paused."""
        self._began: dict[int, int] = {}
        """Where the reading of a partition began: an offset, or librdkafka's number for the log's begin or end."""
        self._claimed = 0
        self._lag: int | None = None
        self._is_assigned = False
        """The group has said which partitions are this member's, be it none."""
        self._gap = self._bytes = 0
        self._failed: BaseException | None = None
        self._away_since: float | None = None
        self._told: set[str] = set()
        self._stop = threading.Event()
        settings = {
            **(client or {}),
            **_CLIENT,
            "bootstrap.servers": brokers,
            "group.id": group,
            "error_cb": self._on_error,
            "on_commit": self._on_commit,
        }
        self._consumer = ck.Consumer(settings)
        self._thread = threading.Thread(target=self._run, name=f"source {topic}", daemon=True)
        self._thread.start()

    # -- the source's calls

    def take(self, records_max: int) -> Sequence[Fetched]:
        """Return up to `records_max` records, in order within a claim.

        Raises `Unavailable` once the client is broken for good: a new process makes a new one.
        """
        if self._failed is not None:
            raise Unavailable(f"source {self._topic!r}: the Kafka client stopped: {self._failed}") from self._failed
        taken: list[Fetched] = []
        with self._lock:
            while self._queue and len(taken) < records_max:
                one = self._queue.popleft()
                self._bytes -= len(one.value or b"")
                # Once a record of a partition was dropped, so are those behind it until it is read again from there.
                if one.claim in self._paused or one.claim.partition in self._again:
                    self._again.setdefault(one.claim.partition, one.offset)
                else:
                    taken.append(one)
        return taken

    def pause(self, claims: Collection[Claim]) -> None:
        """Return no more records of these claims; the thread stops fetching them, or goes on where `take` dropped."""
        with self._lock:
            self._paused = frozenset(claims)

    def settle(self, claim: Claim, offset: int) -> None:
        """Let the group's position be `offset`, committed by the thread; nothing for a claim that is not held."""
        with self._lock:
            if self._claims.get(claim.partition) == claim:
                self._settled[claim.partition] = offset

    def held(self, claim: Claim) -> bool:
        """Say whether the claim is still held."""
        with self._lock:
            return self._claims.get(claim.partition) == claim

    def status(self) -> MemberStatus:
        """Return the member's status."""
        with self._lock:
            return MemberStatus(len(self._claims), self._lag, self._gap, self._away_since is not None)

    def close(self, timeout_s: float) -> None:
        """Commit and leave the group; a broker that is away is not waited for beyond `timeout_s`."""
        self._stop.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("source %s: not out of the group in %.1f s; its session ends by itself", self._topic, timeout_s)

    # -- the thread

    def _run(self) -> None:
        try:
            self._poll()
        except BaseException as error:
            # Nothing else would report it: `take` raises it where the source runs.
            self._failed = error
            log.exception("source %s ended", self._topic)

    def _poll(self) -> None:
        self._consumer.subscribe(
            [self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )
        next_commit_s = next_lag_s = 0.0
        is_held = False
        while not self._stop.is_set():
            full = len(self._queue) >= self._queue_max or self._bytes >= _QUEUE_BYTES_MAX
            # Again in every turn while something is held: a partition may have been added.
            if full or self._paused or self._again or is_held:
                is_held = self._hold(full)
            before = dict(self._claims)
            self._read(self._consumer.consume(_RECORDS_ONCE, _POLL_S), before)
            now_s = time.monotonic()
            if now_s >= next_commit_s:
                next_commit_s = now_s + _COMMIT_S
                self._commit(wait=False)
            if now_s >= next_lag_s:
                next_lag_s = now_s + _LAG_S
                self._measure()
        self._commit(wait=self._away_since is None)
        self._consumer.close()

    def _hold(self, full: bool) -> bool:
        """Stop fetching, or go on, and say whether anything is held.

        Polling goes on either way, so that the group keeps this member.
        """
        with self._lock:
            paused = {claim.partition for claim in self._paused if self._claims.get(claim.partition) == claim}
            again = {p: at for p, at in self._again.items() if p not in paused}
            for partition in again:
                del self._again[partition]
            if again:
                self._queue = deque(one for one in self._queue if one.claim.partition not in again)
                self._bytes = sum(len(one.value or b"") for one in self._queue)
            parts = {p: ck.TopicPartition(self._topic, p) for p in self._claims}
        for partition, at in again.items():
            if partition in parts:
                self._consumer.incremental_unassign([parts[partition]])
                self._consumer.incremental_assign([ck.TopicPartition(self._topic, partition, at)])
        held = [part for p, part in parts.items() if full or p in paused]
        free = [part for p, part in parts.items() if not full and p not in paused]
        if held:
            self._consumer.pause(held)
        if free:
            self._consumer.resume(free)
        return full or bool(paused)

    def _read(self, messages: Sequence[Any], before: dict[int, Claim]) -> None:
        """Queue what was fetched. `before` is what was held when the fetch began: a partition that was given away and
        given back meanwhile may have records of both claims here, so it is read again from the group's position."""
        fetched = []
        mixed = {p for p, claim in before.items() if self._claims.get(p, claim) != claim}
        for partition in mixed:
            self._begin_again(partition)
        for message in messages:
            if message.error() is not None:
                self._on_record_error(message)
                continue
            claim = self._claims.get(message.partition())
            if claim is not None and claim.partition not in mixed:
                kind, at_ms = message.timestamp()
                at_ms = at_ms if kind != ck.TIMESTAMP_NOT_AVAILABLE else None
                fetched.append(Fetched(claim, message.offset(), message.value(), at_ms))
        if fetched:
            self._back()
            with self._lock:
                self._queue.extend(fetched)
                self._bytes += sum(len(one.value or b"") for one in fetched)

    def _commit(self, *, wait: bool) -> None:
        with self._lock:
            due = {p: at for p, at in self._settled.items() if self._committed.get(p) != at and p in self._claims}
        if not due:
            return
        parts = [ck.TopicPartition(self._topic, p, at) for p, at in due.items()]
        how: dict[str, Any] = {"offsets": parts, "asynchronous": not wait}
        try:
            self._consumer.commit(**how)
        except ck.KafkaException as error:
            # What is not committed is read again and dropped by its ids.
            self._tell(f"positions are not committed: {error}")
            return
        self._committed.update(due)

    def _on_commit(self, error: Any, parts: list[Any]) -> None:
        """Note how a commit ended; one that failed is tried again with the next."""
        if error is None:
            self._back()
            return
        self._tell(f"positions are not committed: {error}")
        for part in parts:
            self._committed.pop(part.partition, None)

    def _measure(self) -> None:
        """Count what lies beyond what was read; not known where one partition is not."""
        lags = [self._lag_of(partition) for partition in list(self._claims)]
        known = [lag for lag in lags if lag is not None]
        is_known = self._is_assigned and self._away_since is None and len(known) == len(lags)
        self._lag = sum(known) if is_known else None

    def _lag_of(self, partition: int) -> int | None:
        part = ck.TopicPartition(self._topic, partition)
        try:
            begin, end = self._consumer.get_watermark_offsets(part, cached=True)
            (at,) = self._consumer.position([part])
        except (ck.KafkaException, TypeError):
            # The latter for no answer at all, where the client gives None in place of a pair.
            return None
        return _lag(begin, end, at.offset if at.offset >= 0 else self._began.get(partition, ck.OFFSET_STORED))

    # -- the client's callbacks, in the thread

    def _on_assign(self, consumer: Any, parts: list[Any]) -> None:
        """Begin each partition at the group's position, else where the source says."""
        found = self._positions(consumer, parts)
        if found is None:
            # No answer: begin where the broker says once it speaks, by the error that a missing position is.
            found = [ck.TopicPartition(self._topic, p.partition, ck.OFFSET_STORED) for p in parts]
        self._is_assigned = True
        with self._lock:
            for part in found:
                self._claimed += 1
                self._claims[part.partition] = Claim(self._topic, part.partition, self._claimed)
                self._settled.pop(part.partition, None)
                self._committed.pop(part.partition, None)
                self._began[part.partition] = part.offset
        consumer.incremental_assign(found)
        log.info("source %s: %d partitions more, %d held", self._topic, len(found), len(self._claims))

    def _positions(self, consumer: Any, parts: list[Any]) -> list[Any] | None:
        try:
            stored = consumer.committed(parts, timeout=_ASK_S)
        except ck.KafkaException as error:
            self._tell(f"the group's positions are not told: {error}")
            return None
        begin = ck.OFFSET_BEGINNING if self._start == "earliest" else ck.OFFSET_END
        return [ck.TopicPartition(self._topic, p.partition, p.offset if p.offset >= 0 else begin) for p in stored]

    def _on_revoke(self, consumer: Any, parts: list[Any]) -> None:
        """Commit what is settled, then let the partitions go: what is in flight the next holder reads again."""
        self._commit(wait=True)
        self._on_lost(consumer, parts)
        consumer.incremental_unassign(parts)

    def _on_lost(self, _consumer: Any, parts: list[Any]) -> None:
        gone = {part.partition for part in parts}
        with self._lock:
            for partition in gone:
                self._claims.pop(partition, None)
                self._settled.pop(partition, None)
                self._committed.pop(partition, None)
                self._again.pop(partition, None)
            self._queue = deque(one for one in self._queue if one.claim.partition not in gone)
            self._bytes = sum(len(one.value or b"") for one in self._queue)
        log.info("source %s: %d partitions less, %d held", self._topic, len(gone), len(self._claims))

    def _on_record_error(self, message: Any) -> None:
        error, partition = message.error(), message.partition()
        if error.code() == ck.KafkaError._AUTO_OFFSET_RESET and partition is not None and partition >= 0:
            self._begin_again(partition)
        elif error.code() != ck.KafkaError._PARTITION_EOF:
            self._on_error(error)

    def _begin_again(self, partition: int) -> None:
        """Go on where a partition's log begins, after a position that is missing or no longer kept."""
        part = ck.TopicPartition(self._topic, partition)
        try:
            (stored,) = self._consumer.committed([part], timeout=_ASK_S)
            low, high = self._consumer.get_watermark_offsets(part, timeout=_ASK_S)
        except (ck.KafkaException, TypeError) as error:
            self._tell(f"partition {partition}: its offsets are not told: {error}")
            low, high, stored = ck.OFFSET_STORED, ck.OFFSET_STORED, part
        wanted = max(stored.offset, self._settled.get(partition, -1))
        at = low if wanted >= 0 or self._start == "earliest" else high
        if 0 <= wanted < low:
            with self._lock:
                self._gap += low - wanted
            log.error(
                "source %s/%d: retention deleted offsets %d to %d before they were read; reading goes on at %d",
                *(self._topic, partition, wanted, low - 1, low),
            )
        elif 0 <= wanted <= high:
            at = wanted
        elif 0 <= high < wanted:
            log.error(
                "source %s/%d: the group's position is %d and the log ends at %d: made anew? It is read from %d",
                *(self._topic, partition, wanted, high, low),
            )
        # A partition without a usable position is not fetched, and what is not fetched cannot seek: assign it anew.
        try:
            self._consumer.incremental_unassign([part])
            self._consumer.incremental_assign([ck.TopicPartition(self._topic, partition, at)])
            self._began[partition] = at
        except ck.KafkaException as error:
            self._tell(f"partition {partition} cannot go on at {at}: {error}")

    def _on_error(self, error: Any) -> None:
        if error.code() in (ck.KafkaError._ALL_BROKERS_DOWN, ck.KafkaError._TRANSPORT):
            if self._away_since is None and error.code() == ck.KafkaError._ALL_BROKERS_DOWN:
                self._away_since = time.monotonic()
                log.warning("source %s: no broker answers; trying again until one does", self._topic)
        else:
            self._tell(str(error))

    def _back(self) -> None:
        self._told.clear()
        if self._away_since is not None:
            log.info("source %s: a broker answers after %.1f s", self._topic, time.monotonic() - self._away_since)
            self._away_since = None

    def _tell(self, what: str) -> None:
        """Log a problem once until records come again: a broker that is away causes it every second."""
        if what not in self._told and len(self._told) < 100:
            self._told.add(what)
            log.warning("source %s: %s", self._topic, what)


def _lag(begin: int, end: int, at: int) -> int | None:
    """Return how many records of [begin, end) lie at and beyond `at`: an offset, or librdkafka's number for a place. A
    place that nobody has told yet counts as the log's begin. None where the client has not heard where the log ends.

    >>> _lag(10, 30, 25), _lag(10, 30, 5), _lag(10, 30, ck.OFFSET_BEGINNING), _lag(10, 30, ck.OFFSET_END)
    (5, 20, 20, 0)
    >>> _lag(10, 30, ck.OFFSET_STORED), _lag(-1001, -1001, ck.OFFSET_STORED)
    (20, None)
    """
    if end < 0:
        return None
    return 0 if at == ck.OFFSET_END else max(0, end - max(at, begin, 0))
