"""By which rules the join's stored states were made, held against what the `rules` topic says now.

A `rules` topic that was emptied, or deleted and filled again, begins its numbers at 1 anew: a partition would ignore
the changes that follow, and a ledger would join the log once more by rules that it was never read by. It is told by
what it says, not by its id: one that was brought back from a copy has another id and the same changes.

1. `stored_rules` reads each partition's newest state. Read it before the topic: a change that is applied meanwhile is
   in the topic first.
2. `check_fits` holds the topic against it: change 1, and every change that something still waits under.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headrace.contract.errors import ConfigRejected
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.rules import Change, Rules

FIRST_RULES = "first_rules"
"""Where a manifest says by which rules its log begins. One of an older release does not."""
REMEDY = (
    "the topic was deleted or emptied. Numbers would begin again at 1, and partitions ignore what is not above theirs. "
    "Bring the topic back from a copy, or raise log.generation to begin anew."
)


@dataclass(frozen=True)
class StoredRules:
    """The rules of one partition's newest state that can be read."""

    partition: int
    by_number: Mapping[int, Rules] = field(default_factory=dict)
    """Those that something waits under, and those by which records are read; none where no state can be read."""
    first: Rules | None = None
    """Change 1, where the state says it."""


def stored_rules(blobs: Blobs, generation: int, partitions: int) -> list[StoredRules]:
    """Return what the stored states of the join say, of each partition that has one. Raises `Unavailable`."""
    # Here, since the compiled join takes a second to load, and who writes rules needs none of it.
    from headrace.stream.join.state import Damaged, read_manifest, rules_kept

    found: list[StoredRules] = []
    for partition in range(partitions):
        folder = f"state/stream/g{generation}/{partition}"
        names = sorted((name.rsplit("/", 1)[-1] for name in blobs.list(folder)), key=int, reverse=True)
        if not names:
            continue
        found.append(StoredRules(partition))
        for name in names:
            data = blobs.get(f"{folder}/{name}")
            # One that is damaged, or deleted meanwhile: the join itself takes the one before.
            with contextlib.suppress(Damaged):
                if data is not None:
                    plain = read_manifest(data)
                    found[-1] = StoredRules(partition, rules_kept(plain), _first(plain))
                    break
    return found


def _first(plain: Mapping[str, Any]) -> Rules | None:
    first = plain.get(FIRST_RULES)
    return None if first is None else msgspec.convert(first, Rules)


def check_fits(changes: Sequence[Change], stored: Sequence[StoredRules]) -> None:
    """Raise `ConfigRejected` where the topic has none of its changes, or others than stored states were made by."""
    if stored and not changes:
        raise ConfigRejected(
            f"the rules topic holds no rules, and the join has stored states that were made by some: {REMEDY}"
        )
    known = {change.number: change.rules for change in changes}
    for one in stored:
        told = {**one.by_number, **({} if one.first is None else {1: one.first})}
        for number, rules in sorted(told.items()):
            if known.get(number) != rules:
                says = "has no such change" if number not in known else f"says {known[number].digest()}"
                raise ConfigRejected(
                    f"the join's state of partition {one.partition} was made by change {number} of rules "
                    f"{rules.digest()}, and the rules topic {says}: {REMEDY}"
                )
