"""The gateway's companion that settles late events by itself: looked up, then taken or dropped, in the background.

Each turn reads which `too_late` letters wait, and lets one retry of them run (`retry.py` has the protocol). Every
gateway has a settler, and the fenced writer of the marks lets one at a time work: a settler that has seen another run's
mark for less than a lease leaves it alone. A turn comes when this gateway has set events aside, and once a minute for
those of gateways that are gone. It takes half of a core at most.

A letter is looked up in the first turn that sees it. What that turn cannot tell, because the lake is away or behind, is
looked up again after a minute, then after two, four, eight, and every 15 minutes (`_AGAIN_MAX_S`); letters that come
meanwhile do not wait for it. After `WAIT_MAX_MS` it waits no longer and is `unknown`.

What log and lake cannot tell stays a letter in the state `unknown` for the user: `headrace dead-letters retry --take`,
or `--drop`.

Time is the gateway's (`SteadyTime`): a step of the wall clock changes nothing here.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from headrace.contract.config import IngestConfig
from headrace.contract.errors import InvariantBroken, Overloaded, Unavailable
from headrace.contract.formats.dead_letters import TOO_LATE
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.fenced import FencedWriter
from headrace.contract.interfaces.lake import JoinedUpTo, StoredIds
from headrace.contract.interfaces.log import Producer, Reader
from headrace.contract.metrics import Metrics
from headrace.contract.privacy import Privacy
from headrace.contract.project import Project
from headrace.ingest.dead_letters.late_backlog import LateBacklog
from headrace.ingest.dead_letters.letters import Filter
from headrace.ingest.dead_letters.look_up import LookUp
from headrace.ingest.dead_letters.mark_leases import MarkLeases
from headrace.ingest.dead_letters.retry import SETTLER, Report, Retry
from headrace.ingest.gateway.admission import Admission
from headrace.ingest.gateway.dry_run import NoMetrics
from headrace.ingest.gateway.late_events import LateEvents

log = logging.getLogger("headrace.ingest")

WAIT_MAX_MS = 7 * 86_400_000
"""Longest wait for a lake that is away or behind. The topic keeps letters for four weeks: three are left to decide."""
LEAVE_MS = 3_600_000
"""How long a letter of a tag that this gateway's project does not declare is left to others: longer than a rolling
deploy takes."""
_LOOK_S, _SOON_S, _STEP_S = 60.0, 5.0, 0.5
_AGAIN_MAX_S = 900.0
_END_S = 1.0


class Clients(NamedTuple):
    """What a settler works with; its own, since another thread has the gateway's."""

    producer: Producer
    reader: Reader
    writer: FencedWriter
    stored: StoredIds | None
    joined: JoinedUpTo | None = None

    def close(self) -> None:
        """Close those that belong to nobody else."""
        for client in (self.producer, self.reader, self.writer):
            client.close()


class _GatewaysClock:
    """The clock with the gateway's time, as the gateway's own thread told it last."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._off_ms: float | None = None

    def heard(self, now_ms: int) -> None:
        self._off_ms = now_ms - self._clock.monotonic() * 1000

    def now_ms(self) -> int:
        off_ms = self._off_ms
        return self._clock.now_ms() if off_ms is None else round(self._clock.monotonic() * 1000 + off_ms)

    def monotonic(self) -> float:
        return self._clock.monotonic()

    def sleep(self, seconds: float) -> None:
        self._clock.sleep(seconds)


class _Stopped(Exception):
    """The gateway is about to end."""


class Settler:
    """A companion of the gateway with a thread of its own; `turn` is the work."""

    def __init__(
        self,
        project: Project,
        config: IngestConfig,
        topics: Topics,
        partitions: int,
        *,
        open_clients: Callable[[], Clients],
        metrics: Metrics,
        clock: Clock,
        late: LateEvents,
        privacy: Privacy | None = None,
    ) -> None:
        self._project, self._config, self._topics, self._partitions = project, config, topics, partitions
        self._open_clients, self._metrics, self._clock = open_clients, metrics, _GatewaysClock(clock)
        self._late, self._privacy = late, privacy
        self._run = SETTLER + uuid.uuid4().hex[:12]
        self._backlog, self._leases = LateBacklog(topics.dead_letters, metrics), MarkLeases()
        self._oldest_ms: int | None = None
        self._looked_up = 0
        """Letters below this offset were looked up in a turn of this process, those that wait as well."""
        self._again_s, self._again_at_s = _LOOK_S, float("-inf")
        """When the letters that a turn could not tell are looked up again, and how long after the last time."""
        self._stop = threading.Event()
        self._failed: BaseException | None = None
        self._paused_s = 0.0

    # -- the companion

    async def run(self, admission: Admission, stopping: asyncio.Event) -> None:
        """Work in a thread until `stopping`; an exception that nobody expected there is raised here."""
        self._hear(admission)
        thread = threading.Thread(target=self._work, name="settler", daemon=True)
        thread.start()
        try:
            while not stopping.is_set():
                if not thread.is_alive():
                    raise self._failed or RuntimeError("the settler's thread has ended")
                self._hear(admission)
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), _STEP_S)
            self._stop.set()
            for _ in range(int(_END_S / 0.02)):
                if not thread.is_alive():
                    break
                await asyncio.sleep(0.02)
        finally:
            # What it is killed at, the next retry finds out.
            self._stop.set()

    def _hear(self, admission: Admission) -> None:
        """Take the gateway's time, and show how long the oldest letter has waited: a turn may take minutes."""
        self._clock.heard(admission.now_ms())
        self._show_age()

    def _show_age(self) -> None:
        oldest_ms = self._oldest_ms
        age_s = 0.0 if oldest_ms is None else max(0.0, (self._clock.now_ms() - oldest_ms) / 1000)
        self._metrics.set("late_oldest_seconds", age_s)

    def _work(self) -> None:
        clients: Clients | None = None
        due_s, written = 0.0, -1
        try:
            while not self._stop.wait(_STEP_S):
                now_s = self._clock.monotonic()
                if now_s < due_s and (written == self._late.written or now_s < due_s - _LOOK_S + _SOON_S):
                    continue
                written = self._late.written
                try:
                    clients = clients or self._open_clients()
                    left = self.turn(clients)
                except (Unavailable, Overloaded, InvariantBroken) as error:
                    self._metrics.add("errors_total", kind="settler")
                    log.warning("late events wait to be looked up: %s", error)
                    left = False
                due_s = self._clock.monotonic() + (_SOON_S if left else _LOOK_S)
        except _Stopped:
            pass
        except BaseException as error:
            self._failed = error
        finally:
            if clients is not None and self._failed is None:
                clients.close()

    # -- the work

    def turn(self, clients: Clients) -> bool:
        """Settle what waits; say whether more could be settled soon. Raises `Unavailable`, and `InvariantBroken` where
        another retry took over."""
        self._paused_s = self._clock.monotonic()
        self._look(clients)
        begin = self._begin()
        if begin is None:
            return False
        if self._is_held():
            return True
        is_whole, upto = begin < self._looked_up or self._looked_up == 0, self._backlog.next_letter
        report = self._retry(clients, begin)
        self._looked_up = upto
        for fate, count in (
            ("new", report.appended),
            ("repeated", report.repeated),
            ("unknown", report.unknown),
            ("refused", sum(report.refused.values())),
        ):
            self._metrics.add("late_settled_total", count, fate=fate)
        if report.offered:
            log.info("late events looked up: %d new, %d repeated", report.appended, report.repeated)
        self._look(clients)
        if is_whole:
            self._again_s = _LOOK_S if report.offered else min(_AGAIN_MAX_S, self._again_s * 2)
            self._again_at_s = self._clock.monotonic() + self._again_s
        return any(offset >= upto for offset in self._backlog.waiting)

    def _is_held(self) -> bool:
        """Say whether another run may be at work, or what a failed turn of this one sent may still be on its way."""
        if self._backlog.newest is None:
            return False
        offset, mark = self._backlog.newest
        left_s = self._leases.left_s(offset, self._clock.monotonic())
        return left_s > 0 and (mark.run != self._run or bool(mark.letters))

    def _begin(self) -> int | None:
        """Return the offset of the first letter that this turn looks up; None where it looks up none."""
        waiting = self._backlog.waiting
        if self._clock.monotonic() < self._again_at_s:
            waiting = {offset: 0 for offset in waiting if offset >= self._looked_up}
        return min(waiting, default=None)

    def _retry(self, clients: Clients, begin: int) -> Report:
        look_up = LookUp(
            self._project,
            self._topics,
            clients.reader,
            clients.stored,
            clients.joined,
            skew_ms=self._config.skew_ms,
            pause=self._pause,
        )
        retry = Retry(
            self._project,
            self._config,
            self._topics,
            self._partitions,
            producer=clients.producer,
            reader=clients.reader,
            writer=clients.writer,
            clock=self._clock,
            metrics=NoMetrics(),
            run=self._run,
            privacy=self._privacy,
            leases=self._leases,
            look_up=look_up,
            late=self._late,
            begin=begin,
            waits_from_ms=self._clock.now_ms() - WAIT_MAX_MS,
            leaves_from_ms=self._clock.now_ms() - LEAVE_MS,
        )
        try:
            return retry.retry(Filter(reason=TOO_LATE))
        finally:
            # Else the client goes on fetching what was looked through.
            clients.reader.assign({})

    def _look(self, clients: Clients) -> None:
        """Read what waits, and show it."""
        written = self._late.written
        self._backlog.read(clients.reader, clients.writer, self._pause)
        self._late.wait(len(self._backlog.waiting), written)
        self._oldest_ms = self._backlog.oldest_ms()
        self._metrics.set("late_waiting", len(self._backlog.waiting))
        self._metrics.set("late_unknown", len(self._backlog.unknown))
        self._show_age()

    def _pause(self) -> None:
        """Give way for as long as the work took; end it where the gateway ends."""
        if self._stop.is_set():
            raise _Stopped
        self._clock.sleep(min(1.0, max(0.0, self._clock.monotonic() - self._paused_s)))
        self._paused_s = self._clock.monotonic()
