"""The gateway's companion that settles late events by itself: looked up, then taken or dropped, in the background.

Each turn reads which `too_late` letters wait, and lets one retry of them run (`retry.py` has the protocol). Every
gateway has a settler, and the fenced writer of the marks lets one at a time work: a settler that sees another run's
mark which is younger than a lease leaves it alone. A turn comes when this gateway has set events aside, and once a
minute for those of gateways that are gone. It takes half of a core at most.

What log and lake cannot tell stays a letter in the state `unknown` for the user: `headrace dead-letters retry --take`,
or `--drop`.
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
from headrace.contract.interfaces.lake import StoredIds
from headrace.contract.interfaces.log import Producer, Reader
from headrace.contract.metrics import Metrics
from headrace.contract.privacy import Privacy
from headrace.contract.project import Project
from headrace.ingest.dead_letters.late_backlog import LateBacklog
from headrace.ingest.dead_letters.letters import Filter
from headrace.ingest.dead_letters.look_up import LookUp
from headrace.ingest.dead_letters.retry import LEASE_MS, SETTLER, Retry
from headrace.ingest.gateway.admission import Admission
from headrace.ingest.gateway.dry_run import NoMetrics
from headrace.ingest.gateway.late_events import LateEvents

log = logging.getLogger("headrace.ingest")

_LOOK_S, _SOON_S, _STEP_S = 60.0, 5.0, 0.5
_END_S = 1.0


class Clients(NamedTuple):
    """What a settler works with; its own, since another thread has the gateway's."""

    producer: Producer
    reader: Reader
    writer: FencedWriter
    stored: StoredIds | None

    def close(self) -> None:
        """Close those that belong to nobody else."""
        for client in (self.producer, self.reader, self.writer):
            client.close()


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
        self._open_clients, self._metrics, self._clock = open_clients, metrics, clock
        self._late, self._privacy = late, privacy
        self._run = SETTLER + uuid.uuid4().hex[:12]
        self._backlog = LateBacklog(topics.dead_letters, metrics)
        self._stop = threading.Event()
        self._failed: BaseException | None = None
        self._paused_s = 0.0

    # -- the companion

    async def run(self, admission: Admission, stopping: asyncio.Event) -> None:
        """Work in a thread until `stopping`; an exception that nobody expected there is raised here."""
        thread = threading.Thread(target=self._work, name="settler", daemon=True)
        thread.start()
        try:
            while not stopping.is_set():
                if not thread.is_alive():
                    raise self._failed or RuntimeError("the settler's thread has ended")
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
        self._look(clients)
        if not self._backlog.waiting:
            return False
        newest, before = self._backlog.newest, len(self._backlog.waiting)
        if newest is not None and newest.run != self._run and self._clock.now_ms() - newest.at_ms < LEASE_MS:
            return True
        self._paused_s = self._clock.monotonic()
        look_up = LookUp(
            self._project,
            self._topics,
            clients.reader,
            clients.stored,
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
            look_up=look_up,
            late=self._late,
        )
        try:
            report = retry.retry(Filter(reason=TOO_LATE))
        finally:
            # Else the client goes on fetching what was looked through.
            clients.reader.assign({})
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
        return 0 < len(self._backlog.waiting) < before

    def _look(self, clients: Clients) -> None:
        """Read what waits, and show it."""
        written = self._late.written
        self._backlog.read(clients.reader, clients.writer)
        self._late.wait(len(self._backlog.waiting), written)
        oldest_ms = self._backlog.oldest_ms()
        self._metrics.set("late_waiting", len(self._backlog.waiting))
        self._metrics.set("late_unknown", len(self._backlog.unknown))
        age_s = 0.0 if oldest_ms is None else max(0.0, (self._clock.now_ms() - oldest_ms) / 1000)
        self._metrics.set("late_oldest_seconds", age_s)

    def _pause(self) -> None:
        """Give way for as long as the work took; end it where the gateway ends."""
        if self._stop.is_set():
            raise _Stopped
        self._clock.sleep(min(1.0, max(0.0, self._clock.monotonic() - self._paused_s)))
        self._paused_s = self._clock.monotonic()
