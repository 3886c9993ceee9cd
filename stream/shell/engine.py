"""The Faust shell of every consumer: group, assignment and polling are Faust's; where to go on from is the state's.

1. At the first record of a partition after an assignment the stage restores its state, which says the next offset.
   Without a state it begins at offset 0, and only where nothing was ever acknowledged: else the state is lost.
2. Records before it are skipped; when Faust is beyond it, the consumer seeks back.
3. Records are handed on in order, those of a partition that wait together at once; none is acknowledged before the
   stage says that its effect is durable.
4. A revoked partition's state is dropped: its new owner restores its own.
5. Once a second it looks whether Kafka's client still works and the group has an assignment for it; if not, it stops.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import faust
import faust.transport.drivers.aiokafka as aiokafka_driver
from faust.types import TP

from headrace.contract.errors import HeadraceError, InvariantBroken, Unavailable
from headrace.contract.interfaces.log import Reader, Record
from headrace.process.awake import awake_s
from headrace.process.watchdog import Watchdog
from headrace.stream.shell.assignor import Assignor
from headrace.stream.shell.group_watch import GroupWatch, last_words
from headrace.stream.shell.log_ends import LogEnds
from headrace.stream.shell.one_owner import OneOwner

log = logging.getLogger("headrace.engine")

TICK_S = 0.005
SEEK_WAIT_S = 20.0
"""After a seek the wanted record comes within a fetch; longer means that the log does not have it."""
STOP_S = 3.0
LOOK_S = 1.0
WAITING_MAX = 256
"""Most records that wait to be handed on."""
TURNS = 4
"""Turns of the event loop in which another record comes, if there is one."""
TAKEN_BYTES = 2 * 1024 * 1024
"""No more records are handed on at once when they have so many bytes: a second of work at most."""
FETCH_WAIT_MS = 50
"""Longest time that the broker holds a fetch. A partition that was left out of it, since it had records waiting, is
asked for in the next one: Faust's own 1,500 ms would be seen as delay wherever other partitions are idle."""


class Stage(Protocol):
    """What a stage does with its partitions; called from one event loop."""

    async def begin(self, partition: int) -> int | None:
        """Restore the partition's state and return the next offset that it wants; None for the earliest."""

    async def take_all(self, records: Sequence[Record]) -> None:
        """Apply records of one partition, in order."""

    async def tick(self) -> None:
        """Do what is due; called every 5 ms. Raises to stop the process with exit status 1."""

    def drop(self, partitions: set[int]) -> None:
        """Forget these partitions' state."""

    async def finish(self) -> None:
        """Make what is possible durable within 2 seconds: the process stops. Raises what kept it from that."""


class _Thread(aiokafka_driver.AIOKafkaConsumerThread):
    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        # Read when the consumer starts; Faust has no setting for it.
        consumer._fetch_max_wait_ms = FETCH_WAIT_MS
        return consumer


class _ReadOffsets(defaultdict[TP, int | None]):
    """What Faust has read, which it drops no record by. A record that it holds while the consumer seeks back, or while
    the client goes back to the log's begin, would make it drop all that was sought. What was taken, `Engine` knows."""

    def __init__(self) -> None:
        super().__init__(lambda: None)

    def __getitem__(self, tp: TP) -> int | None:
        return None


class _Consumer(aiokafka_driver.Consumer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read_offset = _ReadOffsets()

    def _new_consumer_thread(self) -> Any:
        return _Thread(self, loop=self.loop, beacon=self.beacon)


class _Transport(aiokafka_driver.Transport):
    Consumer = _Consumer


class Engine:
    """One Faust app over one topic, run until `stop` is set."""

    def __init__(
        self,
        name: str,
        brokers: str,
        topic: str,
        partitions: int,
        datadir: Path,
        *,
        open_reader: Callable[[], Reader],
        begin_afresh: bool = False,
        has_one_owner: bool = False,
    ) -> None:
        """`open_reader` makes the reader that tells how far the log goes. `begin_afresh` takes a partition without a
        state from its beginning, whatever was acknowledged. `has_one_owner` gives all partitions to one member.
        """
        datadir.mkdir(parents=True, exist_ok=True)
        for noisy in ("faust", "aiokafka", "mode"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self.app = faust.App(
            name,
            broker=[f"kafka://{address}" for address in brokers.split(",")],
            store="memory://",
            datadir=str(datadir),
            key_serializer="raw",
            value_serializer="raw",
            topic_partitions=partitions,
            topic_disable_leader=True,
            topic_allow_declare=False,
            stream_wait_empty=False,
            stream_buffer_maxsize=1_024,
            broker_commit_interval=0.5,
            broker_session_timeout=10.0,
            broker_heartbeat_interval=2.0,
            broker_request_timeout=30.0,
            consumer_auto_offset_reset="earliest",
            consumer_max_fetch_size=8 * 1024 * 1024,
            web_enabled=False,
            PartitionAssignor=OneOwner if has_one_owner else Assignor,
        )
        self.topic, self.begin_afresh, self._brokers = topic, begin_afresh, brokers
        self.channel = self.app.topic(topic, partitions=partitions, key_type=bytes, value_type=bytes)
        self.next: dict[int, int] = {}
        self._unbegun: dict[int, int | None] = {}
        """Where the group stands in the partitions from which no record came yet; None: at the topic's first."""
        self._durable: dict[int, int] = {}
        self._revoked: set[int] = set()
        self._held: dict[int, deque[Any]] = {}
        self._last: dict[int, tuple[int, float, int]] = {}
        """Of each partition the offset, time and length of the record that was taken last."""
        self._seeking: dict[int, float] = {}
        self._waiting: deque[Record] = deque()
        self._came = asyncio.Event()
        self._taken = asyncio.Event()
        self._failure: BaseException | None = None
        self._group = GroupWatch()
        self._ends = LogEnds(topic, open_reader, self._standing, lambda: dict(self.next))
        self._look_due_s = 0.0
        self._beginning = False
        self._watchdog = Watchdog()

    def acknowledge(self, partition: int, upto: int) -> None:
        """Let Faust commit the partition's records up to offset `upto`, whose effects are durable."""
        if partition in self._durable:
            self._durable[partition] = max(self._durable[partition], upto + 1)
        held = self._held.get(partition)
        while held and held[0].offset <= upto:
            held.popleft().ack(self.app.consumer)

    def lag(self) -> float:
        """Return how many records lie in the log beyond what was taken, over all partitions; NaN while not known."""
        return self._ends.lag({**self._unbegun, **self.next})

    @property
    def assigned(self) -> frozenset[int]:
        """The partitions that the group has given this process, as of the last second."""
        return frozenset(self._unbegun) | frozenset(self.next)

    def end(self, partition: int) -> int | None:
        """Return the partition's end as of the last look, which is seconds old; None before the first."""
        return self._ends.ends.get(partition)

    def oldest_unread_ms(self) -> int | None:
        """Return when the oldest record was written that the stage stands still before; None while it moves."""
        return self._ends.oldest_ms

    def _standing(self) -> dict[int, int | None]:
        """Return where the stage waits for records; nowhere while some wait for it, or a partition begins."""
        return {} if self._waiting or self._beginning else {**self._unbegun, **self.next}

    def run(self, stage: Stage, stop: threading.Event, ready: Callable[[bool, str], None]) -> int:
        """Run until `stop`; return the exit status: 0, or 1 after a failure that a restart may cure."""
        self._watchdog.start()
        self._ends.start()
        status = asyncio.run(self._main(stage, stop, ready))
        self._ends.stop()
        if status == 0:
            self._watchdog.stop()
        # Else it stays: a thread of a client that failed may not end, and the process must.
        return status

    async def _main(self, stage: Stage, stop: threading.Event, ready: Callable[[bool, str], None]) -> int:
        app = self.app
        app.transport = _Transport(app.conf.broker_consumer, app, loop=asyncio.get_running_loop())

        @app.agent(self.channel, name=f"{app.conf.id}-agent")
        async def agent(stream: Any) -> None:
            async for event in stream.noack().events():
                try:
                    await self._take(stage, event)
                except asyncio.CancelledError:
                    raise
                except BaseException as error:
                    self._failure = self._failure or error
                    await asyncio.sleep(3600)

        async def revoked(_app: Any, *partitions: Any, **_: Any) -> None:
            try:
                self._group.revoked()
                self._forget(stage, {tp.partition for tp in partitions[0] if tp.topic == self.topic})
            except Exception as error:
                # Raised into Kafka's client, it would end the client's own task instead of the stage.
                self._failure = self._failure or error

        async def assigned(_app: Any, *_: Any, **__: Any) -> None:
            self._group.assigned()

        async def hand_on() -> None:
            try:
                while True:
                    await self._hand_on(stage)
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                self._failure = self._failure or error

        hooks: list[Any] = [revoked, assigned]
        app.on_partitions_revoked.connect(hooks[0], weak=False)
        app.on_partitions_assigned.connect(hooks[1], weak=False)
        ready(False, "waiting for Kafka's group")
        app.finalize()
        starting, handing = asyncio.ensure_future(app.start()), asyncio.ensure_future(hand_on())
        try:
            while not stop.is_set() and self._failure is None:
                await asyncio.sleep(TICK_S)
                self._watchdog.beat()
                if starting.done() and starting.exception() is not None:
                    self._failure = starting.exception()
                elif app.crashed:
                    self._failure = app.crash_reason
                else:
                    await stage.tick()
                    self._look()
                    if self._group.has_assignment:
                        ready(True, "")
                    else:
                        ready(False, "waiting for Kafka's group")
        except Exception as error:
            self._failure = self._failure or error
        ready(False, "stopping")
        handing.cancel()
        await asyncio.wait([handing])
        return await self._end(stage, starting)

    async def _end(self, stage: Stage, starting: asyncio.Future[Any]) -> int:
        """Make durable what is possible unless something failed, and end Faust; return the exit status."""
        if self._failure is None:
            self._failure = await _bounded(stage.finish(), "durable state")
        if self._failure is not None:
            log.error(
                "stopping: %s",
                last_words(self._failure, self._client(), self._brokers, awake_s() - self._ends.answered_s),
                exc_info=None if isinstance(self._failure, HeadraceError) else self._failure,
            )
        starting.cancel()
        if (unstopped := await _bounded(self.app.stop(), "Faust")) is not None:
            log.warning("Faust: %s", unstopped)
        return 0 if self._failure is None else 1

    def _client(self) -> Any:
        """Return Faust's thread with Kafka's consumer; None before it is made."""
        # Asked for too early, Faust would make one.
        return getattr(self.app.__dict__.get("_consumer"), "_thread", None)

    def _look(self) -> None:
        """Look once a second whether Kafka's client works."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._look_due_s:
            self._look_due_s = now_s + LOOK_S
            consumer: Any = self.app.consumer
            self._group.look(consumer._thread)
            # Faust knows where a partition's reading begins once it has asked the group.
            mine = [tp for tp in list(consumer._read_offset) if tp.topic == self.topic]
            self._unbegun = {tp.partition: consumer._committed_offset.get(tp) for tp in mine}
            self._ends.look()

    def _forget(self, stage: Stage, partitions: set[int]) -> None:
        stage.drop(partitions)
        self._waiting = deque(record for record in self._waiting if record.partition not in partitions)
        self._revoked |= partitions
        for partition in partitions:
            self.next.pop(partition, None)
            self._unbegun.pop(partition, None)
            self._durable.pop(partition, None)
            self._held.pop(partition, None)
            self._last.pop(partition, None)
            self._seeking.pop(partition, None)

    async def _take(self, stage: Stage, event: Any) -> None:
        message = event.message
        partition, offset = message.partition, message.offset
        if partition not in self.next:
            self._beginning = True
            self._revoked.discard(partition)
            wanted = await self._begin(stage, partition, offset)
            self._beginning = False
            if partition in self._revoked:
                # It was taken away meanwhile. This record is of an assignment that is no more; it comes again.
                stage.drop({partition})
                return
            self.next[partition] = self._durable[partition] = wanted
        following = self.next[partition]
        if offset < following:
            # A repeat of what was taken and is not durable yet is acknowledged with it: the group must not be ahead.
            self._check_repeat(partition, message)
            if offset < self._durable[partition]:
                message.ack(self.app.consumer)
            return
        if offset > following:
            await self._seek(partition, offset, following)
            return
        self._seeking.pop(partition, None)
        record = Record(
            self.topic, partition, offset, message.key, message.value, _headers(message), int(message.timestamp * 1000)
        )
        self._last[partition] = _mark(message)
        # The value is the bulk; only the message's place is needed until it is acknowledged.
        message.value = None
        self._held.setdefault(partition, deque()).append(message)
        self.next[partition] = offset + 1
        self._waiting.append(record)
        self._came.set()
        while len(self._waiting) >= WAITING_MAX:
            self._taken.clear()
            await self._taken.wait()

    def _check_repeat(self, partition: int, message: Any) -> None:
        """Raise `Unavailable` where a record comes again at an offset that was taken, and is another one: the log has
        lost its end and was written on. Whoever comes again from before it comes to that record first."""
        last = self._last.get(partition)
        if last is not None and message.offset == last[0] and _mark(message) != last:
            raise Unavailable(
                f"{self.topic}/{partition}: another record lies at offset {message.offset} than was taken from there: "
                "the log has lost its end, which it had confirmed. The stage stops; the next start tells what it can "
                "go on from. See the brokers' logs and disks."
            )

    async def _hand_on(self, stage: Stage) -> None:
        """Wait for records and hand them on, partition by partition, until none is left."""
        await self._came.wait()
        self._came.clear()
        count = 0
        while count < len(self._waiting) < WAITING_MAX:
            # Faust needs a few turns of the loop a record; when they bring none, what is there is all.
            count = len(self._waiting)
            for _ in range(TURNS):
                await asyncio.sleep(0)
        while self._waiting:
            records = self._next_records()
            self._taken.set()
            await stage.take_all(records)

    def _next_records(self) -> list[Record]:
        """Take what waits of the partition whose turn it is, up to a number of bytes."""
        partition = self._waiting[0].partition
        taken: list[Record] = []
        kept: deque[Record] = deque()
        room = TAKEN_BYTES
        for record in self._waiting:
            if record.partition == partition and room > 0:
                taken.append(record)
                room -= len(record.value or b"")
            else:
                kept.append(record)
        self._waiting = kept
        return taken

    async def _begin(self, stage: Stage, partition: int, offset: int) -> int:
        """Return the offset to go on from; `offset` is where Faust is."""
        wanted = await stage.begin(partition)
        tp = TP(self.topic, partition)
        end: int | None = self.app.consumer.highwater(tp) if wanted is not None else None
        if wanted is not None and end is not None and end < wanted:
            raise InvariantBroken(
                f"{self.topic}/{partition}: the state goes on from offset {wanted}, the log ends at {end}: the topic "
                "was made anew, or its end was lost. What comes would be taken for what was read already. Raise "
                "log.generation to begin anew beside what is stored."
            )
        # Asking the broker waits for the fetch that is under way, so it is done only when Faust is elsewhere.
        if wanted is None or wanted < offset:
            earliest: int = (await self.app.consumer.earliest_offsets(tp))[tp]
            if wanted is not None and wanted < earliest:
                raise InvariantBroken(
                    f"{self.topic}/{partition}: the state goes on from offset {wanted}, the log begins at {earliest}. "
                    "Reading on would skip events; raise log.generation to begin anew."
                )
            if wanted is None:
                self._check_fresh(partition, offset, earliest)
                wanted = earliest
        log.info("%s/%d: going on from offset %d", self.topic, partition, wanted)
        return wanted

    def _check_fresh(self, partition: int, offset: int, earliest: int) -> None:
        """Raise `InvariantBroken` unless nothing was ever stored of a partition and its log is whole."""
        found = []
        if offset > earliest:
            found.append(f"its group has acknowledged what lies below offset {offset}, which comes after it is stored")
        if earliest > 0:
            found.append(f"its log begins at offset {earliest}")
        if not found:
            return
        stage = self.app.conf.id.removeprefix("headrace-").partition("-")[0]
        what = f"{self.topic}/{partition}: nothing is stored of this partition, and {' and '.join(found)}"
        if self.begin_afresh:
            log.warning("%s: beginning afresh at offset %d, as --begin-afresh says", what, earliest)
            return
        raise InvariantBroken(
            f"{what}: the state was lost, or lies in another store. Bring the store back that HEADRACE_STORE names. "
            f"Where it is gone for good, `headrace {stage} --begin-afresh` decides to begin at offset {earliest} "
            "without what was known before, or raise log.generation to begin anew."
        )

    async def _seek(self, partition: int, offset: int, wanted: int) -> None:
        now = awake_s()
        since = self._seeking.setdefault(partition, now)
        if since == now:
            log.info("%s/%d: Faust is at %d, seeking back to %d", self.topic, partition, offset, wanted)
            await self.app.consumer.seek_wait({TP(self.topic, partition): wanted})
        elif now - since > SEEK_WAIT_S:
            raise InvariantBroken(
                f"{self.topic}/{partition}: offset {wanted} does not come, {offset} does; the log has a gap."
            )


async def _bounded(work: Any, what: str) -> Exception | None:
    """Do it for at most `STOP_S`; return what it raised."""
    try:
        await asyncio.wait_for(work, STOP_S)
    except (TimeoutError, asyncio.CancelledError):
        log.warning("%s did not finish in %g s; the next start goes on from the last snapshot", what, STOP_S)
    except Exception as error:
        return error
    return None


def _mark(message: Any) -> tuple[int, float, int]:
    return message.offset, message.timestamp, len(message.value or b"")


def _headers(message: Any) -> dict[str, str]:
    headers = message.headers or ()
    pairs = headers.items() if hasattr(headers, "items") else headers
    # Whoever wrote it: a header that is no text must not end the stage. `headrace.backends.log.kafka` does the same.
    return {str(name): (value or b"").decode("utf-8", "replace") for name, value in pairs}
