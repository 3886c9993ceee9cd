"""How far a topic goes beyond what a stage took, told by a reader of its own: a stage that stands still shows.

Every `LOOK_S`, in a thread: ask for the topic's ends. Where a partition has not moved since the last look and the log
goes on, read the record that it stands before: its time says how old the oldest record is that nobody took. A broker
that is away changes nothing of what is known; anything else that fails is raised in `look`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping

from headrace.contract.errors import Unavailable
from headrace.contract.interfaces.log import Reader
from headrace.process.awake import awake_s

LOOK_S = 5.0
READ_S = 1.0
KNOWN_S = 30.0
"""For how long what a look told stands for what is there: six looks, and longer than a broker's restart."""
STILL_LOOKS_MAX = 60
"""Looks after which a partition that is not moved on stops the stage: 60 looks of 5 s, 300 s."""


class LogEnds:
    """The ends of one topic, and what waits before them."""

    def __init__(
        self,
        topic: str,
        open_reader: Callable[[], Reader],
        taken: Callable[[], Mapping[int, int | None]],
        begun: Callable[[], Mapping[int, int]] = dict,
    ) -> None:
        """`taken` says, from any thread, the next offset of each partition that the stage takes; None for the first.
        `begun` says it of those alone from which this process has taken records."""
        self.topic, self._open_reader, self._taken, self._begun = topic, open_reader, taken, begun
        self.begins: Mapping[int, int] = {}
        self.ends: Mapping[int, int] = {}
        self.answered_s = awake_s()
        """When the broker answered last, in time awake."""
        self.oldest_ms: int | None = None
        """When the oldest record was written that a partition stands before; None while all move or nothing waits."""
        self._before: dict[int, int] = {}
        self._cut: dict[int, tuple[int, int]] = {}
        """Partitions that were taken further than the log goes, with both offsets, as of the last look."""
        self._still: dict[int, int] = {}
        """Of each partition that stands still before a record, in how many looks it did."""
        self._failure: BaseException | None = None
        self._stopped = threading.Event()

    def lag(self, following: Mapping[int, int | None]) -> float:
        """Return how many records lie at and beyond these offsets, None for the topic's first, as of the last look.

        NaN while no look has told, or none did for `KNOWN_S`: what is not known is not nothing.
        """
        if not self.is_known:
            return math.nan
        begins = self.begins
        at = {p: begins.get(p, 0) if offset is None else offset for p, offset in following.items()}
        return sum(max(0, self.ends.get(partition, 0) - offset) for partition, offset in at.items())

    @property
    def is_known(self) -> bool:
        """Say whether the last look still tells what is there."""
        return bool(self.ends) and awake_s() - self.answered_s <= KNOWN_S

    def look(self) -> None:
        """Raise what stopped the thread, or `Unavailable` where a partition was not moved on for too long."""
        if self._failure is not None:
            raise self._failure
        for partition, looks in list(self._still.items()):
            if looks > STILL_LOOKS_MAX:
                raise Unavailable(
                    f"{self.topic}/{partition} has been at offset {self._before.get(partition)} for "
                    f"{looks * LOOK_S:.0f} s and the log goes on to {self.ends.get(partition)}: Kafka's client brings "
                    "nothing. The stage stops; a new process makes a new client."
                )

    def start(self) -> None:
        """Look from now on."""
        threading.Thread(target=self._run, name="log-ends", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def _run(self) -> None:
        try:
            reader = self._open_reader()
            while not self._stopped.wait(LOOK_S):
                try:
                    self.read(reader)
                except Unavailable:
                    continue
        except BaseException as error:
            self._failure = error

    def read(self, reader: Reader) -> None:
        """Look once."""
        before = dict(self._begun())
        begins, ends = reader.begin_offsets(self.topic), reader.end_offsets(self.topic)
        self.answered_s = awake_s()
        taken = {p: begins.get(p, 0) if at is None else at for p, at in self._taken().items()}
        waiting = {p: at for p, at in taken.items() if self._before.get(p) == at and ends.get(p, 0) > at}
        times: dict[int, int] = {}
        if waiting:
            reader.assign({(self.topic, p): at for p, at in waiting.items()})
            for record in reader.poll(2_000, READ_S):
                times[record.partition] = min(record.timestamp_ms, times.get(record.partition, record.timestamp_ms))
            reader.assign({})
        # Offsets that belong to no record, such as a transaction's marker, are nothing that waits.
        self._still = {p: self._still.get(p, 0) + 1 for p in times}
        cut = {p: (at, ends[p]) for p, at in before.items() if ends.get(p, at) < at}
        for partition in cut.keys() & self._cut.keys():
            # Twice: a new leader may not know at once how far its followers are.
            at, end = cut[partition]
            self._failure = Unavailable(
                f"{self.topic}/{partition} was taken up to offset {at} and ends at {end}: the log has lost its end, "
                "which it had confirmed. The stage stops; the next start tells what it can go on from. See the "
                "brokers' logs and disks."
            )
        self._cut = cut
        self.oldest_ms = min(times.values(), default=None)
        self.begins, self.ends, self._before = begins, ends, taken
