"""The fenced writer in this process: same contract as `fenced_kafka`, for tests and simulations."""

from __future__ import annotations

from headrace.backends.log.memory import MemoryLog
from headrace.contract.errors import InvariantBroken, Unavailable


class WriterEpochs:
    """How often each transactional id was opened: the newest `open` counts."""

    def __init__(self) -> None:
        self.newest: dict[str, int] = {}


class FencedMemory:
    """Writes and reads back partition 0 of `topic` of a `MemoryLog`."""

    def __init__(self, log: MemoryLog, topic: str, transactional_id: str, epochs: WriterEpochs) -> None:
        self._log, self._topic, self._id, self._epochs = log, topic, transactional_id, epochs
        self._epoch = -1

    def open(self) -> None:
        """Become the writer."""
        self._epoch = self._epochs.newest[self._id] = self._epochs.newest.get(self._id, 0) + 1

    def append(self, *values: bytes) -> None:
        """Append these records. Raises `InvariantBroken` when another process became the writer."""
        if self._epoch < 0:
            raise Unavailable(f"{self._topic}: this process is not its writer; open it first.")
        if self._epochs.newest[self._id] != self._epoch:
            raise InvariantBroken(f"another process became the writer of {self._topic} ({self._id}): this one stops.")
        for value in values:
            self._log.append(self._topic, 0, value, None, {})

    def read(self, offset: int, wait_s: float = 0.0, *, kept_only: bool = False) -> list[tuple[int, bytes]]:
        """Return all records from `offset` on; never waits. Raises `InvariantBroken` where the log does not have it."""
        records, begin = self._log.partitions(self._topic)[0], self._log.begins[self._topic, 0]
        if not begin <= offset <= begin + len(records):
            if not kept_only:
                raise InvariantBroken(f"{self._topic}: offset {offset} is not in the log; was the topic made anew?")
            offset = begin
        return [(r.offset, r.value) for r in records if r.offset >= offset and r.value is not None]

    def close(self) -> None:
        """Do nothing: there is no client to close."""
