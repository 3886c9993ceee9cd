"""How a crawler begins: in an epoch above all before, and never with a memory that was lost without a word.

1. A memory that a crawler has used is gone on from.
2. A new one is taken where `features` holds no crawled value: nothing was ever stored.
3. Else the memory was lost, or lies elsewhere, and only a person decides to begin without it. Then the highest epoch
   and the crawl times of all that is served are taken over, so that no value goes back, whatever the clock says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from headrace.contract.crawl import PREFIX
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.events import ExternalValue
from headrace.contract.interfaces.frontier import Frontier
from headrace.contract.interfaces.log import Reader, Record, read_range
from headrace.process.moved import moved
from headrace.process.waits import Waits

log = logging.getLogger("headrace.crawl")

Served = dict[tuple[str, str], ExternalValue]
"""What is served of each entity, by source and key."""


async def begin(
    frontier: Frontier,
    waits: Waits,
    *,
    open_reader: Callable[[], Reader],
    features: str,
    now_ms: int,
    begin_afresh: bool = False,
) -> int:
    """Return the epoch to write in.

    Args:
        features: the topic's name.
        begin_afresh: somebody has decided to begin without what was known before.

    Raises:
        InvariantBroken: values are served and the memory is new.
        Unavailable: Kafka does not answer.
    """
    if not frontier.is_new():
        return frontier.next_epoch(now_ms)
    served = await waits.call(f"read of {features}", lambda: read_served(open_reader, features))
    highest = max((value.epoch for value in served.values()), default=0)
    if served:
        what = f"the crawler's memory is new, and {len(served)} crawled values are served, up to epoch {highest}"
        if not begin_afresh:
            raise InvariantBroken(
                f"{what}: it was lost, or lies in another HEADRACE_HOME. Bring its folder crawl/ back. Where it is "
                "gone for good, `headrace crawl --begin-afresh` decides to fetch everything again; what the sites no "
                "longer have stays as it is served. Or raise log.generation to begin anew."
            )
        log.warning("%s: everything is fetched again, as --begin-afresh says", what)
        frontier.take_over([(source, key, value.crawl_time_ms) for (source, key), value in served.items()])
    return frontier.next_epoch(now_ms, highest)


def read_served(open_reader: Callable[[], Reader], features: str) -> Served:
    """Return the crawled values that `features` holds. Raises as `read_range`."""
    served: Served = {}
    reader = open_reader()
    for record in read_range(reader, features):
        moved()
        _note(served, record)
    reader.close()
    return served


def _note(served: Served, record: Record) -> None:
    prefix, _, name = (record.key or b"").decode(errors="replace").partition("/")
    source, _, key = name.partition("/")
    if prefix != PREFIX:
        return
    served.pop((source, key), None)
    if record.value is not None:
        try:
            served[source, key] = msgspec.json.decode(record.value, type=ExternalValue)
        except msgspec.MsgspecError as error:
            log.warning("%s offset %d is no crawled value: %s", record.topic, record.offset, error)
