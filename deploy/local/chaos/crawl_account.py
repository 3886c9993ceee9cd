"""The account of what came of the versions that a changing site sent (`changing_site`).

1. Each version in an acknowledged body is in every partition of `events` exactly once, once readers' rules are applied.
2. No partition holds a version that was not sent, and all have the same versions in the same order.
3. When the site has come to rest, the log and `features` both end at what it shows.
4. Each stored sample's crawled columns are a version of the log, fetched no later than the impression.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import msgspec
import pyarrow as pa

from headrace.contract.crawl import CRAWL_TIME, PREFIX, Crawl
from headrace.contract.formats.events import EXTERNAL, EXTERNAL_SCHEMA, ExternalValue, decode_batch
from headrace.contract.interfaces.log import Record
from headrace.deploy.local.chaos.changing_site import ChangingSite, Name


class CrawlAccount(msgspec.Struct, kw_only=True):
    """Versions of crawled entities, counted from outside. `closes` when all but the first five are 0."""

    sent: int = 0
    """Distinct versions in bodies that the site sent."""
    acknowledged: int = 0
    """Of these, in bodies whose ETag the crawler has sent back."""
    logged: int = 0
    """Distinct versions in the log."""
    repeated_in_log: int = 0
    """Rows that readers drop, a partition: sent again after a kill."""
    joined: int = 0
    """Stored samples that carry a crawled version."""
    unsettled: int = 0
    """Pages whose newest body the crawler has not acknowledged."""
    lost: int = 0
    twice: int = 0
    made_up: int = 0
    out_of_order: int = 0
    differing: int = 0
    """Partitions that do not hold what the first one holds."""
    stale: int = 0
    """Entities of which the log or `features` does not end at what the site shows."""
    mixed: int = 0
    """Stored samples with crawled columns that are no version of the log, or of after the impression."""
    bodies_changed: int = 0
    """Versions that the stored bodies, extracted again, would change; a body that is not there counts as one."""
    closes: bool = False


class Kept(msgspec.Struct):
    """What one partition says of crawled entities by readers' rules, in order: name, crawl time, values."""

    rows: list[tuple[Name, int, str]] = []
    dropped: int = 0


def by_partition(records: Iterable[Record]) -> dict[int, Kept]:
    """Return what each partition of `events` holds: no row of an older crawler, none that repeats, none from before."""
    found: dict[int, Kept] = {}
    epochs: dict[int, int] = {}
    newest: dict[tuple[int, Name], tuple[int, str]] = {}
    for record in records:
        if record.value is None or record.headers.get("kind") != EXTERNAL:
            continue
        kept = found.setdefault(record.partition, Kept())
        for row in decode_batch(record.value, EXTERNAL_SCHEMA).to_pylist():
            name, at_ms, version = (row["source"], row["key"]), row["crawl_time_ms"], row["version"]
            before_ms, before = newest.get((record.partition, name), (-1, ""))
            if row["epoch"] < epochs.get(record.partition, -1) or at_ms <= before_ms or version == before:
                kept.dropped += 1
                continue
            epochs[record.partition] = row["epoch"]
            newest[record.partition, name] = at_ms, version
            kept.rows.append((name, at_ms, row["values"] or ""))
    return found


def count(
    site: ChangingSite, events: Iterable[Record], features: Iterable[Record], partitions: int, account: CrawlAccount
) -> dict[tuple[Name, int], str]:
    """Fill what the log says; return its versions by entity and crawl time."""
    known, sent = _versions(site, acknowledged=True), _versions(site, acknowledged=False)
    account.sent, account.acknowledged = len(sent), len(known)
    parts = by_partition(events)
    first = parts.get(0, Kept())
    account.differing = sum(parts.get(p, Kept()).rows != first.rows for p in range(partitions))
    account.repeated_in_log = sum(kept.dropped for kept in parts.values())
    final = {
        (p.source, key): site.values(p.source, key, n) for p in site.pages.values() for key, n in p.changes.items()
    }
    logged: set[tuple[Name, int]] = set()
    for kept in parts.values():
        times: defaultdict[tuple[Name, int], int] = defaultdict(int)
        last: dict[Name, int] = {}
        for name, _, text in kept.rows:
            change = sent.get((name, text))
            if change is None:
                account.made_up += 1
                continue
            times[name, change] += 1
            account.out_of_order += change < last.get(name, -1)
            last[name] = change
        account.twice += sum(many - 1 for many in times.values())
        account.lost += sum((name, change) not in times for (name, _), change in known.items())
        account.stale += sum(site.values(*name, last.get(name, -1)) != text for name, text in final.items())
        logged |= times.keys()
    account.lost += len(known) * (partitions - len(parts))
    account.logged = len(logged)
    served: dict[str, str] = {}
    for record in features:
        key = (record.key or b"").decode()
        if record.value is not None and key.startswith(f"{PREFIX}/"):
            served[key] = bytes(msgspec.json.decode(record.value, type=ExternalValue).values).decode()
    account.stale += sum(served.get(f"{PREFIX}/{s}/{key}") != text for (s, key), text in final.items())
    return {(name, at_ms): text for name, at_ms, text in first.rows}


def _versions(site: ChangingSite, *, acknowledged: bool) -> dict[tuple[Name, str], int]:
    """Return the versions of sent bodies, or of acknowledged ones alone, with their change's number."""
    found: dict[tuple[Name, str], int] = {}
    for page in site.pages.values():
        for etag, rows in page.sent.items():
            if etag in page.acknowledged or not acknowledged:
                for key, change in rows.items():
                    found[(page.source, key), site.values(page.source, key, change)] = change
    return found


def count_stored(
    crawls: Iterable[Crawl], samples: pa.Table, versions: Mapping[tuple[Name, int], str], account: CrawlAccount
) -> None:
    """Fill what stored samples say; `samples` has each source's columns, what it joins, and `event_time_ms`."""
    for crawl in crawls:
        names = [f"{PREFIX}.{crawl.name}.{field}" for field in crawl.fields]
        time_name = f"{PREFIX}.{crawl.name}.{CRAWL_TIME}"
        for row in samples.select([*names, time_name, crawl.joins, "event_time_ms"]).to_pylist():
            at_ms = row[time_name]
            if not at_ms:
                continue
            account.joined += 1
            text = msgspec.json.encode({f: row[n] for f, n in zip(crawl.fields, names, strict=True)}).decode()
            is_version = versions.get(((crawl.name, str(row[crawl.joins])), at_ms)) == text
            account.mixed += not is_version or at_ms > row["event_time_ms"]


def stored_columns(crawls: Iterable[Crawl]) -> list[str]:
    """Return the columns that `count_stored` reads."""
    needed = {"event_time_ms"} | {crawl.joins for crawl in crawls}
    return sorted(needed | {name for crawl in crawls for name in crawl.columns()})


def closes(account: CrawlAccount) -> bool:
    """Say whether nothing is lost, twice, made up, out of order or old."""
    wrong = (account.unsettled, account.lost, account.twice, account.made_up, account.out_of_order, account.differing)
    return not any((*wrong, account.stale, account.mixed, account.bodies_changed)) and account.acknowledged > 0
