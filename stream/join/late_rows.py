"""Which rows may be counted that the memory of ids does not know: those that it must know if they came before. Pure.

The memory holds what was read within its horizon of watermark time. A row whose event time is older than that may have
come before and be forgotten, so it counts only where its record says that it was looked up (`late`: `looked-up`).
Gateways append no other, but for what was on its way for hours or beside a wrong clock; that is dropped as a repeat and
counted as `too_late`. Gateways of release 0.1 do not say anything, and theirs counts as it always did: an old log gives
what it gave.
"""

from __future__ import annotations

from collections.abc import Mapping

from headrace.contract.formats.events import LATE, LOOKED_UP

ALL = -(2**62)
"""A time before every event's."""


def counted_from_ms(headers: Mapping[str, str], watermark_ms: int, horizon_ms: int) -> int:
    """Return the event time from which on rows of a record with these headers are counted without a look-up."""
    late = headers.get(LATE)
    if watermark_ms < 0 or late == LOOKED_UP or (late is None and "gateway" in headers):
        return ALL
    return watermark_ms - horizon_ms
