"""The pen in this process: same contract as `fenced_kafka`, for tests and simulations."""

from __future__ import annotations

from headrace.backends.log.memory import MemoryLog
from headrace.contract.errors import InvariantBroken, Unavailable


class Pens:
    """Who holds which pen: the newest `open` counts."""

    def __init__(self) -> None:
        self.epochs: dict[str, int] = {}


class FencedMemory:
    """Writes and reads back partition 0 of `topic` of a `MemoryLog`."""

    def __init__(self, log: MemoryLog, topic: str, pen: str, pens: Pens) -> None:
        self._log, self._topic, self._pen, self._pens = log, topic, pen, pens
        self._epoch = -1

    def open(self) -> None:
        """Take the pen."""
        self._epoch = self._pens.epochs[self._pen] = self._pens.epochs.get(self._pen, 0) + 1

    def append(self, value: bytes) -> None:
        """Append one record. Raises `InvariantBroken` when another holder has the pen."""
        if self._epoch < 0:
            raise Unavailable(f"{self._topic}: the pen is not held; open it first.")
        if self._pens.epochs[self._pen] != self._epoch:
            raise InvariantBroken(f"another process took the pen of {self._topic} ({self._pen}): this one stops.")
        self._log.append(self._topic, 0, value, None, {})

    def read(self, offset: int, wait_s: float = 0.0) -> list[tuple[int, bytes]]:
        """Return all records from `offset` on; never waits."""
        records = self._log.partitions(self._topic)[0]
        return [(r.offset, r.value) for r in records if r.offset >= offset and r.value is not None]

    def close(self) -> None:
        """Let go."""
