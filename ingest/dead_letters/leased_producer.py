"""The producer of one retried batch: within its lease, and with new dead letters that name the ones they were."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from headrace.contract.errors import Unavailable
from headrace.contract.formats.dead_letters import TOO_LATE, decode_dead_letter, encode_dead_letter
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Delivered, Producer
from headrace.ingest.dead_letters.letters import Letter


class LeasedProducer:
    """Sends nothing once the lease is over; a letter that is refused again names the one that it was."""

    def __init__(
        self, inner: Producer, clock: Clock, until_s: float, dead_letters: str, offered: Mapping[int, Letter]
    ) -> None:
        self._inner, self._clock, self._until_s = inner, clock, until_s
        self._dead_letters, self._offered = dead_letters, offered
        self.reasons: dict[int, str] = {}

    def check(self) -> None:
        """Raise `Unavailable` once the lease is over."""
        if self._clock.monotonic() >= self._until_s:
            raise Unavailable(
                "Kafka has not taken the batch within half its lease; what it has taken, the next retry finds "
                "out. `headrace status` shows the broker."
            )

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
        """Queue one record, as a producer does. Raises `Unavailable` once the lease is over."""
        self.check()
        if topic == self._dead_letters and value is not None:
            told = decode_dead_letter(value)
            offset = int(told.origin)
            before = self._offered[offset].content
            self.reasons[offset] = told.reason
            again = {"retry_of": offset, "attempts": before.attempts + 1}
            if told.reason == TOO_LATE:
                # The event as it was decoded now, under the id by which it is looked up.
                letter = msgspec.structs.replace(told, origin=before.origin, **again)
            else:
                new = {"reason": told.reason, "detail": told.detail, "gateway": told.gateway, "seen_ms": told.seen_ms}
                letter = msgspec.structs.replace(before, **new, **again)
            value = encode_dead_letter(letter)
            key = before.origin.encode()
        self._inner.send(topic, partition, value, key=key, headers=headers, delivered=delivered)

    def poll(self, timeout_s: float) -> None:
        """Run receipts."""
        self._inner.poll(timeout_s)

    def flush(self, timeout_s: float) -> int:
        """Wait for receipts."""
        return self._inner.flush(timeout_s)

    def close(self) -> None:
        """Do nothing: the inner one belongs to the caller."""
