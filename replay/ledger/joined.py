"""What the join says that it made of `events`, from the newest state that it stored of each partition.

It is the join's own word: nothing is joined again here. `headrace ledger --full` does that, and compares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from headrace.contract.formats.events import Punctuation
from headrace.contract.formats.positions import Position, order_of
from headrace.contract.formats.seals import whole
from headrace.contract.interfaces.blobs import Blobs
from headrace.kernels.sample_ids import seal_of
from headrace.replay.ledger.keys import order
from headrace.replay.ledger.ledger import TaskCounts
from headrace.replay.ledger.topic_seals import NotSealed
from headrace.stream.join.outcome import Totals
from headrace.stream.join.rules_in_force import Lane
from headrace.stream.join.state import Damaged, read_manifest, totals_of
from headrace.stream.join.watermark import Watermark
from headrace.stream.shell.account import Account, load_account

COUNTS = (
    *("impressions", "positives", "negatives", "waiting"),
    *("matched", "duplicate", "late", "orphans", "pending"),
)


@dataclass(frozen=True)
class Joined:
    """The join's account of one partition, up to a record of `events`."""

    offset: int
    last: Position
    totals: Totals
    lanes: list[Lane]
    answers: dict[str, int]
    account: Account
    watermark_ms: int
    topic_id: str = ""

    @property
    def rows(self) -> int:
        """Rows of events up to the offset: impressions, feedback, crawled values, repeats."""
        totals = self.totals
        return totals.impressions + totals.feedback + totals.repeated_in_log + self.account.external


def read_joined(blobs: Blobs, generation: int, partitions: Iterable[int]) -> dict[int, Joined]:
    """Return the newest readable account of each partition that has a stored state."""
    found: dict[int, Joined] = {}
    for partition in partitions:
        folder = f"state/stream/g{generation}/{partition}"
        names = sorted((name.rsplit("/", 1)[-1] for name in blobs.list(folder)), key=int, reverse=True)
        for name in names:
            data = blobs.get(f"{folder}/{name}")
            # One that is damaged, or deleted meanwhile: the join itself takes the one before.
            with contextlib.suppress(Damaged):
                if data is not None:
                    found[partition] = _joined(read_manifest(data))
                    break
    return found


def _joined(plain: Mapping[str, Any]) -> Joined:
    offset, last = int(plain["offset"]), Position(*plain["last"])
    totals, lanes, answers = totals_of(plain)
    account = load_account(plain, last)
    watermark = Watermark(0)
    watermark.load_plain(plain["watermark"])
    topic_id = str(plain.get("topic_id", ""))
    return Joined(offset, last, totals, lanes, answers, account, watermark.time_ms, topic_id)


def check_whole(
    joined: Mapping[int, Joined], begins: Mapping[int, int], ends: Mapping[int, int], topic_id: str
) -> None:
    """Raise `NotSealed` where a partition has records and no account from its first one on, or one of another topic."""
    for partition, end in ends.items():
        one = joined.get(partition)
        where = f"events/{partition}"
        if one is None and end > 0:
            raise NotSealed(f"{where}: the join has stored no state yet")
        if one is None:
            continue
        if topic_id and one.topic_id and one.topic_id != topic_id:
            raise NotSealed(f"{where}: the join's state is of a topic with id {one.topic_id}, this one has {topic_id}")
        if not one.account.whole:
            raise NotSealed(
                f"{where}: the join's account does not begin with the log: an older release stored its state"
            )
        if one.offset >= end:
            raise NotSealed(f"{where}: the join's state is at offset {one.offset}, the log ends at {end}")
        if begins.get(partition, 0) > one.offset + 1:
            raise NotSealed(f"{where}: the log begins at {begins[partition]}, the join's state ends at {one.offset}")


def tasks_of(joined: Iterable[Joined]) -> dict[str, TaskCounts]:
    """Return the sums of each task over partitions."""
    found: dict[str, TaskCounts] = {}
    for one in joined:
        for (task, feedback), counts in zip(one.lanes, one.totals.tasks, strict=True):
            total = found.setdefault(task, TaskCounts())
            for name in COUNTS:
                setattr(total, name, getattr(total, name) + getattr(counts, name))
            total.feedback += one.answers.get(feedback, 0)
    return found


def said_of(joined: Iterable[Joined]) -> list[Punctuation]:
    """Return what each epoch of each gateway said at last, as one promise each."""
    newest: dict[tuple[str, int], dict[str, int]] = {}
    for one in joined:
        for gateway, epochs in one.account.said.items():
            for epoch, counts in epochs.items():
                known = newest.setdefault((gateway, epoch), {})
                for name, count in counts.items():
                    known[name] = max(known.get(name, 0), count)
    return [Punctuation(gateway, epoch, 0, counts=counts) for (gateway, epoch), counts in newest.items()]


def wrong_accounts(
    joined: Mapping[int, Joined], noted: Mapping[int, tuple[Totals, list[Lane]]], samples: pa.Table
) -> list[str]:
    """Say of which partitions the join's account is not what the log gives when it is joined once more.

    Args:
        noted: what that gives at the accounts' offsets; a partition is not judged without it.
        samples: all that it gives, with KEYS.
    """
    wrong: list[str] = []
    for partition, one in sorted(joined.items()):
        if partition not in noted:
            continue
        totals, lanes = noted[partition]
        where = f"join, partition {partition} up to offset {one.offset}"
        if replace(one.totals, bad_records=0) != replace(totals, bad_records=0) or one.lanes != lanes:
            wrong.append(f"{where}: its totals are not those of the log")
        if one.account.whole:
            ours_N = (samples["partition"].to_numpy() == partition) & (order(samples) <= order_of(one.last))
            if whole(seal_of(samples.filter(pa.array(ours_N)))) != whole(one.account.tasks):
                wrong.append(f"{where}: the seal of its samples is not that of the log")
    return wrong
