"""Leases: which versions of the lake readers still need, as small blobs that expire.

A reader takes a lease under its own name before it reads, and gives it back when it is done. A reader that was killed
leaves a lease that ends by itself. Vacuum keeps the files of every leased version. A lease also remembers what the
version held, so that its rows can be told from later ones when Delta's log no longer has the version's entry.
"""

from __future__ import annotations

import logging

import msgspec

from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.positions import IMPORTED_FROM, Position, order_of
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.clock import Clock

logger = logging.getLogger("headrace.lake")

NOTHING_IMPORTED = order_of(Position(IMPORTED_FROM, 0)) - 1
"""Below the order of every row."""


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """One reader's claim on one version."""

    holder: str
    version: int
    expires_ms: int
    generation: int
    rows: int
    """How many rows the version holds."""
    positions: dict[str, list[int]]
    next_offsets: dict[str, int]
    imported_upto: int = NOTHING_IMPORTED
    """As that of `LakeState`."""


class Leases:
    """The leases of one table. One lease a holder: a later one takes the place of the one before."""

    def __init__(self, blobs: Blobs, clock: Clock, *, lease_ms: int, table: str = "samples") -> None:
        self._blobs, self._clock, self._lease_ms, self._folder = blobs, clock, lease_ms, f"leases/{table}"

    def take(
        self,
        holder: str,
        version: int,
        *,
        generation: int,
        rows: int,
        positions: dict[str, list[int]],
        next_offsets: dict[str, int],
        imported_upto: int = NOTHING_IMPORTED,
    ) -> Lease:
        """Store a lease that ends in `lease.lease_ms`. Raises `Unavailable`."""
        if not holder or "/" in holder or holder.startswith("."):
            raise ConfigRejected(f"a lease's holder is a plain name, not {holder!r}.")
        lease = Lease(
            holder=holder,
            version=version,
            expires_ms=self._clock.now_ms() + self._lease_ms,
            generation=generation,
            rows=rows,
            positions=positions,
            next_offsets=next_offsets,
            imported_upto=imported_upto,
        )
        self._blobs.put(f"{self._folder}/{holder}", msgspec.json.encode(lease))
        return lease

    def give_back(self, holder: str) -> None:
        """End the holder's lease; nothing happens where it has none."""
        self._blobs.delete(f"{self._folder}/{holder}")

    def active(self) -> list[Lease]:
        """Return the leases that hold now, by holder, and delete those that ended. Raises `Unavailable`."""
        found: list[Lease] = []
        for name in self._blobs.list(self._folder):
            data = self._blobs.get(name)
            if data is None:
                continue
            try:
                lease = msgspec.json.decode(data, type=Lease)
            except msgspec.DecodeError:
                logger.warning("%s is no lease and is left alone", name)
                continue
            if lease.expires_ms > self._clock.now_ms():
                found.append(lease)
            else:
                self._blobs.delete(name)
        return found

    def of_version(self, version: int, generation: int) -> Lease | None:
        """Return a lease of this version, whoever holds it."""
        return next((x for x in self.active() if x.version == version and x.generation == generation), None)
