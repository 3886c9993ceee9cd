"""What became of every event that was emitted while processes were killed, counted by ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from headrace.contract.formats.dead_letters import decode_dead_letter
from headrace.contract.formats.events import (
    FEEDBACK,
    IMPRESSION,
    PUNCTUATION,
    Punctuation,
    decode_batch,
    decode_punctuation,
)
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Reader, read_range
from headrace.contract.project import Project
from headrace.deploy.local.chaos.crawl_account import CrawlAccount
from headrace.deploy.local.chaos.faults import Fault
from headrace.deploy.local.chaos.load import Emitted
from headrace.deploy.local.chaos.plan import ALL, Kill, needed
from headrace.deploy.local.chaos.whole import ModelAccount
from headrace.replay.ledger.draw import draw_gateways
from headrace.replay.ledger.ledger import Ledger, is_sound
from headrace.replay.ledger.settled import SettledCounts


class Account(msgspec.Struct, kw_only=True):
    """What the ids say. `closes` when nothing is lost, twice or made up, and the gateways' sum holds."""

    seed: int
    stages: list[str]
    kills: list[Kill]
    rate: int
    seconds: float
    rate_held: float
    """Events emitted a second while processes were killed."""
    held_s: float = 0.0
    """For how long the load paused: too much was without an ack, or the stages were too far behind."""
    faults: list[Fault] = []
    """Of a whole stack, instead of `kills`."""
    disk: str = ""
    """Why no disk was filled, where one was to be."""
    emitted: int = 0
    """Distinct good events."""
    emitted_again: int = 0
    emitted_bad: int = 0
    read: int = 0
    appended: int = 0
    dead_lettered: int = 0
    repeated: int = 0
    repeated_in_log: int = 0
    lost: int = 0
    twice: int = 0
    made_up: int = 0
    bad_lost: int = 0
    closes: bool = False
    ledger: Ledger | None = None
    """The whole ledger, down to the lake, where a stage after `ingest` ran."""
    crawl: CrawlAccount | None = None
    """What came of the crawled versions, where the crawler was killed."""
    settled: SettledCounts | None = None
    """The aggregator's values, counted again from the events, where it ran."""
    model: ModelAccount | None = None
    """The model beside its replay, of a whole stack."""


def count(reader: Reader, topics: Topics, project: Project, load: Emitted, account: Account) -> None:
    """Read the log and fill what it says."""
    found: Counter[tuple[str, str]] = Counter()
    ids: set[tuple[int, str, str]] = set()
    said: list[Punctuation] = []
    rows = 0
    for record in read_range(reader, topics.events):
        kind = record.headers.get("kind", "")
        if record.value is not None and kind == PUNCTUATION:
            said.append(decode_punctuation(record.value))
        elif record.value is not None and kind in (IMPRESSION, FEEDBACK):
            batch = decode_batch(record.value)
            kind = record.headers.get("type", kind)
            rows += batch.num_rows
            for event_id, request in zip(batch["event_id"].to_pylist(), batch["request_id"].to_pylist(), strict=True):
                if (record.partition, kind, event_id) in ids:
                    account.repeated_in_log += 1
                else:
                    ids.add((record.partition, kind, event_id))
                    found[kind, request] += 1
    letters = [decode_dead_letter(r.value) for r in read_range(reader, topics.dead_letters) if r.value is not None]
    ledger = Ledger()
    tags = {project.impression.tag, *(feedback.tag for feedback in project.feedback)}
    draw_gateways(ledger, rows, sum(letter.tag in tags for letter in letters), said)
    account.read, account.appended = ledger.read, ledger.appended
    account.dead_lettered, account.repeated = ledger.dead_lettered, ledger.repeated
    account.emitted, account.emitted_again, account.emitted_bad = len(load.good), load.again, len(load.bad)
    account.lost = sum(found[name] == 0 for name in load.good)
    account.twice = sum(max(0, times - 1) for times in found.values())
    account.made_up = sum(name not in load.good for name in found)
    account.bad_lost = len(load.bad - {letter.event_id for letter in letters})
    account.closes = (
        account.lost == account.twice == account.made_up == account.bad_lost == ledger.lost_where["log"] == 0
        and account.read == account.appended + account.dead_lettered + account.repeated
        and account.appended == account.emitted + account.repeated_in_log
    )


def closes(account: Account) -> bool:
    """Say whether the ids close and, of what ran besides, the ledger, aggregates, crawled versions and the model."""
    return account.closes and not wrong(account)


def wrong(account: Account) -> list[str]:
    """Return what does not close, by name: [] where all does that ran besides the gateways."""
    found = []
    if account.ledger is not None and not all_there(account.ledger, account.stages):
        found.append("the ledger does not close, or samples are not stored or not learnt")
    if account.settled is not None and not account.settled.closes():
        found.append("aggregates differ from a second count")
    if account.crawl is not None and not account.crawl.closes:
        found.append("crawled versions are not as the site sent them")
    if undone := [fault.target for fault in account.faults if not fault.done]:
        found.append(f"faults that were not carried out: {', '.join(undone)}")
    return [*found, *(account.model.wrong() if account.model is not None else [])]


def all_there(ledger: Ledger, stages: Sequence[str]) -> bool:
    """Say whether the ledger closes and nothing is left on its way to the lake, where a sink ran, and to the model."""
    arrived = ledger.positives + ledger.negatives <= ledger.samples == ledger.stored and not ledger.waiting
    is_learnt = not ledger.in_flight and is_sound(ledger)
    return ledger.closes and (arrived or "sink" not in needed(stages)) and (is_learnt or ALL not in stages)
