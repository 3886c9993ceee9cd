"""A stage's state in the store, which never contains more than what was delivered.

1. Snapshot: take the state at its offsets, and count the records that were sent up to then.
2. Deliver: wait until all of these records have their receipts.
3. Store: put the snapshot's new parts, then its manifest, which makes it whole.
4. Acknowledge: let Faust commit up to the snapshot's offsets. Then delete the manifests that are too many, and the
   parts that only they needed. The newest stay, and a few older ones that lie further apart.

A worker that starts restores the newest snapshot that can be read, and whose records the log still holds. It reads on
from its offsets and sends again what came after it. Where there are snapshots and none can be read it refuses: only a
person decides to begin afresh.

Whatever fails, a receipt, a call, anything nobody expected, stops the stage: from then on nothing is stored and nothing
acknowledged, so that no state passes what was not delivered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from headrace.contract.errors import InvariantBroken, Overloaded, Unavailable
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.log import Producer
from headrace.process.waits import CALL_MAX_S, LOAD_MAX_S, RECEIPT_MAX_S, Waits
from headrace.stream.join.state import Damaged
from headrace.stream.shell.dependencies import StageDependencies

log = logging.getLogger("headrace.state")

T = TypeVar("T")
Encode = Callable[[], bytes]

STATES_KEPT = 3
SPACED_KEPT = 3
"""Older states that are kept beside the newest ones: a broker that lost its end may have lost what they all sent."""
SPACED = 12
"""Each so many states one is kept longer: about one a minute."""
REST = 20
"""A snapshot that takes so long is followed by this many times as long without one: a large state that hardly changes
must not cost a core."""
REST_MAX_S = 300.0
RECEIPT_WAIT_S = 0.005
"""Between two looks at the receipts, which come every few milliseconds."""
FULL_WAIT_S = 0.01
"""Between two tries to send while the producer's queue is full."""


class AheadOfLog(Damaged):
    """A state whose records are in the log no more, although they were confirmed: the log has lost its end."""


class Outgoing(NamedTuple):
    """One record to send."""

    topic: str
    partition: int
    value: bytes | None
    key: bytes | None = None
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True)
class StateSnapshot:
    """A state at its offsets. Encoding it touches nothing of the state any more and runs in another thread."""

    offsets: Mapping[int, int]
    """Of each partition the last record that the state contains."""
    name: str
    """The manifest's name: 20 digits that grow with the offsets."""
    manifest: Encode
    parts: Mapping[str, Encode] = field(default_factory=dict)
    """Those that no earlier snapshot has, by name."""
    needed: Sequence[str] = ()
    """Names of all parts that the manifest needs."""


class StateOwner(Protocol):
    """The stage that a state belongs to."""

    @property
    def name(self) -> str:
        """The stage's verb."""

    def acknowledge(self, offsets: Mapping[int, int]) -> None:
        """Let Faust commit up to these offsets: what they led to is durable."""

    def fail(self, error: BaseException) -> None:
        """Stop the stage with this error at its next tick; nothing more is made durable."""


class StateStore:
    """The blob store as a stage's states share it: it serves one thread at a time, so they take turns."""

    def __init__(self, blobs: Blobs, waits: Waits) -> None:
        self.blobs, self.waits = blobs, waits
        self._lock = asyncio.Lock()

    async def run(self, what: str, work: Callable[[], T], max_s: float = CALL_MAX_S) -> T:
        """Return what `work` does with the store, in another thread."""
        # Whoever waits for it may be cancelled; its turn ends when the thread does.
        return await asyncio.shield(asyncio.ensure_future(self._in_turn(what, work, max_s)))

    async def _in_turn(self, what: str, work: Callable[[], T], max_s: float) -> T:
        async with self._lock:
            return await self._call(what, work, max_s)

    async def _call(self, what: str, work: Callable[[], T], max_s: float) -> T:
        return await self.waits.call(what, work, max_s)


class DurableState:
    """Sends a state's records and stores its snapshots; see the module for the protocol. For one event loop."""

    def __init__(
        self,
        deps: StageDependencies,
        store: StateStore,
        owner: StateOwner,
        *,
        folder: str,
        parts_folder: str = "",
        every_ms: int,
        first_ms: float = 0.0,
        confirm: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Keep manifests in `folder` and their parts, if there are any, in `parts_folder`.

        A snapshot is due after `first_ms`, then every `every_ms`. `confirm` is asked once its records are delivered,
        and raises where it must not be stored.
        """
        self._producer, self._metrics, self._clock = deps.producer, deps.metrics, deps.clock
        self._store, self._owner, self._begin_afresh = store, owner, deps.begin_afresh
        self._folder, self._parts_folder = folder, parts_folder
        self._every_s, self._confirm = every_ms / 1000, confirm
        self._due_s = self._clock.monotonic() + first_ms / 1000
        self.sent = 0
        self._offsets: dict[int, int] = {}
        """Of the records since the newest snapshot that have their receipts, the offsets by number."""
        self.ends_at = -1
        """The offset of the last record that was sent before the newest snapshot; -1 where none was."""
        self.reached: dict[tuple[str, int], int] = {}
        """Of each topic and partition that it writes to, the highest offset that is known to be taken."""
        self._without_receipt: dict[int, None] = {}
        """Numbers of the records that have no receipt yet, in the order in which they were sent. Receipts of several
        partitions come in any order: how many came does not say which."""
        self.stored: Mapping[int, int] = {}
        """The offsets of the newest snapshot that is in the store."""
        self.kept: dict[str, Sequence[str]] = {}
        """Names of the kept manifests, oldest first, and of the parts that each needs."""
        self._spaced: list[str] = []
        """Those of the kept manifests that stay longer, oldest first."""
        self._stored_count = 0
        self.is_ahead = False
        """True once states were found that had sent what the log does not hold any more, and none that had not."""
        self.storing: asyncio.Task[None] | None = None
        self.failure: BaseException | None = None
        """What stopped it: nothing is stored from then on."""

    async def restore(
        self,
        read: Callable[[bytes], Any],
        load: Callable[[Any, Callable[[str], bytes | None]], T],
        parts_of: Callable[[Any], Sequence[str]] | None = None,
        check: Callable[[Any], None] | None = None,
    ) -> T | None:
        """Return the newest state that can be read and is not ahead of the log; None where none is stored, or all that
        can be read are ahead (`is_ahead`).

        Raises `InvariantBroken` where states are stored and none can be read, unless a person decided to begin afresh.

        Args:
            read: decodes a manifest. Raises `Damaged`.
            load: makes a state of what was read, with a function that fetches a part. Raises `Damaged`.
            parts_of: names the parts that a manifest needs; without it there are none, and older manifests stay unread.
            check: looks at the log before a state is loaded. Raises `AheadOfLog` where it does not hold what was sent
                before the state any more.
        """
        listed = await self._store.run(f"list of {self._folder}", partial(self._store.blobs.list, self._folder))
        names = [_base(name) for name in listed]
        newest: T | None = None
        kept: dict[str, Sequence[str]] = {}
        is_ahead = False
        for name in sorted(names, key=int, reverse=True):
            if newest is not None and parts_of is None:
                kept[name] = ()
                continue
            try:
                plain = await self._store.run(f"read of {self._folder}/{name}", partial(self._read, name, read))
                if plain is None:
                    continue
                kept[name] = parts_of(plain) if parts_of is not None else ()
                if newest is None:
                    if check is not None:
                        what = f"look whether the log still holds what {self._folder}/{name} is of"
                        await self._store.waits.call(what, partial(check, plain))
                    newest = await self._store.run(
                        f"restore of {self._folder}/{name}", partial(load, plain, self._part), LOAD_MAX_S
                    )
            except AheadOfLog as error:
                is_ahead = True
                log.error("%s/%s is ahead of the log: %s. Taking the one before", self._folder, name, error)
            except Damaged as error:
                log.error("%s/%s is damaged (%s); taking the one before", self._folder, name, error)
        self.kept = dict(reversed(kept.items()))
        self._spaced = list(self.kept)[:-STATES_KEPT]
        self._stored_count = 1 if self.kept else 0
        self.is_ahead = newest is None and is_ahead
        if names and newest is None and not is_ahead:
            self._refuse(names)
        return newest

    def _refuse(self, names: Sequence[str]) -> None:
        what = f"{self._folder} holds {len(names)} states, the newest {max(names, key=int)}, and none can be read"
        if self._begin_afresh:
            log.warning("%s: beginning afresh, as --begin-afresh says; they stay where they are", what)
            return
        raise InvariantBroken(
            f"{what}. Bring it back from a copy. Where there is none, "
            f"`headrace {self._owner.name} --begin-afresh` decides to begin without what was known before, or raise "
            "log.generation to begin anew."
        )

    async def send(self, count: int, records: Iterable[Outgoing]) -> None:
        """Send `count` records, in order; waits while the producer's queue is full."""
        numbers = range(self.sent, self.sent + count)
        # Counted before they are sent: no state is stored while one of them still waits for room.
        self.sent += count
        self._without_receipt.update(dict.fromkeys(numbers))
        for number, record in zip(numbers, records, strict=True):
            if not self._try_to_send(number, record):
                with self._store.waits.named("room in the producer's queue", RECEIPT_MAX_S):
                    await self._send_when_there_is_room(number, record)
            self._producer.poll(0.0)

    def is_due(self) -> bool:
        """Say whether the next snapshot is due, and wait for the one after it from now on."""
        now_s = self._clock.monotonic()
        if self.storing is not None or self.failure is not None or now_s < self._due_s:
            return False
        self._due_s = now_s + self._every_s
        return True

    def begin(self, offsets: Mapping[int, int], take: Callable[[], StateSnapshot]) -> None:
        """Begin to make the state durable, unless it was stored at these offsets or the last one is still under way.

        Nothing begins after a failure: what follows it is never stored.
        """
        if self.storing is None and self.failure is None and offsets != self.stored:
            # 1. Snapshot.
            begun_s = self._clock.monotonic()
            snapshot = take()
            ended_s = self._clock.monotonic()
            self._due_s = max(self._due_s, ended_s + min(REST_MAX_S, REST * (ended_s - begun_s)))
            self.storing = asyncio.ensure_future(self._make_durable(snapshot, self.sent))

    def cancel(self) -> None:
        """Store no more: the state is somebody else's."""
        if self.storing is not None:
            self.storing.cancel()

    async def _make_durable(self, snapshot: StateSnapshot, sent: int) -> None:
        try:
            # 2. Deliver.
            await self._await_receipts(sent)
            self.ends_at = self._offsets.get(sent - 1, self.ends_at)
            self._offsets = {number: offset for number, offset in self._offsets.items() if number >= sent}
            if self._confirm is not None:
                await self._confirm()
            # 3. Store.
            await self._put(snapshot)
            # 4. Acknowledge.
            self._owner.acknowledge(snapshot.offsets)
            await self._delete_old()
            self._metrics.add("state_snapshots_total")
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            # Whatever it is: a task that ends in silence leaves a stage that runs on and stores nothing.
            self._fail(error)
        finally:
            self.storing = None

    def _fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        self._owner.fail(error)

    async def _await_receipts(self, sent: int) -> None:
        with self._store.waits.named(f"receipts of the records before {self._folder}'s snapshot", RECEIPT_MAX_S):
            while next(iter(self._without_receipt), sent) < sent:
                if self.failure is not None:
                    raise self.failure
                await asyncio.sleep(RECEIPT_WAIT_S)

    async def _put(self, snapshot: StateSnapshot) -> None:
        for name, encode in snapshot.parts.items():
            await self._put_one(f"{self._parts_folder}/{name}", encode)
        await self._put_one(f"{self._folder}/{snapshot.name}", snapshot.manifest)
        self.stored = snapshot.offsets
        # A state that is stored anew under its name is the newest again.
        self.kept.pop(snapshot.name, None)
        self.kept[snapshot.name] = snapshot.needed
        if self._stored_count % SPACED == 0:
            self._spaced = [*(name for name in self._spaced if name != snapshot.name), snapshot.name]
        self._stored_count += 1

    async def _put_one(self, name: str, encode: Encode) -> None:
        if self.failure is not None:
            raise self.failure
        await self._store.run(f"write of {name}", partial(_put, self._store.blobs, name, encode))

    async def _delete_one(self, name: str) -> None:
        await self._store.run(f"delete of {name}", partial(self._store.blobs.delete, name))

    async def _delete_old(self) -> None:
        newest = {*list(self.kept)[-STATES_KEPT:]}
        self._spaced = self._spaced[-SPACED_KEPT:]
        for old in [name for name in self.kept if name not in newest and name not in self._spaced]:
            needed = self.kept.pop(old)
            await self._delete_one(f"{self._folder}/{old}")
            for name in set(needed).difference(*self.kept.values()):
                await self._delete_one(f"{self._parts_folder}/{name}")

    def _read(self, name: str, read: Callable[[bytes], Any]) -> Any:
        data = self._store.blobs.get(f"{self._folder}/{name}")
        return None if data is None else read(data)

    def _part(self, name: str) -> bytes | None:
        with self._store.waits.named(f"read of {self._parts_folder}/{name}"):
            return self._store.blobs.get(f"{self._parts_folder}/{name}")

    async def _send_when_there_is_room(self, number: int, record: Outgoing) -> None:
        while True:
            self._producer.poll(0.0)
            await asyncio.sleep(FULL_WAIT_S)
            if self._try_to_send(number, record):
                return

    def _try_to_send(self, number: int, record: Outgoing) -> bool:
        try:
            self._producer.send(
                record.topic,
                record.partition,
                record.value,
                key=record.key,
                headers=record.headers,
                delivered=partial(self._on_delivered, number, record),
            )
        except Overloaded:
            return False
        return True

    def _on_delivered(self, number: int, record: Outgoing, error: Exception | None, offset: int) -> None:
        place = record.topic, record.partition
        reached = self.reached.get(place, -1)
        # A receipt may tell no offset, which is negative then.
        if error is None and 0 <= offset <= reached:
            error = Unavailable(
                f"{record.topic}/{record.partition} gave a record offset {offset}, and had given {reached} before: the "
                "log has lost its end, which it had confirmed. The stage stops; a new process sends again what is "
                "lost. Look at the brokers' logs and disks."
            )
        if error is not None:
            # Never counted as delivered: no state that knows this record may be stored.
            self._fail(error)
            return
        self.reached[place] = max(reached, offset)
        self._offsets[number] = offset
        self._without_receipt.pop(number, None)


async def await_stored(states: Iterable[DurableState], producer: Producer) -> None:
    """Wait until no snapshot of these is under way."""
    waiting = list(states)
    while any(state.storing is not None for state in waiting):
        producer.poll(0.0)
        await asyncio.sleep(RECEIPT_WAIT_S)


def _put(blobs: Blobs, name: str, encode: Encode) -> None:
    blobs.put(name, encode())


def _base(name: str) -> str:
    return name.rsplit("/", 1)[-1]
