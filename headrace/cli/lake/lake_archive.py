"""`headrace lake archive`: from where to where `events` is archived, and what the topic still has."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.cli.runtime import Runtime

if TYPE_CHECKING:
    from headrace.contract.interfaces.archive import ArchiveState


def show_archive(runtime: Runtime, args: argparse.Namespace) -> int:
    """Print a row for each partition; 1 where offsets were lost, or the topic does not go on from what is archived."""
    from headrace.backends.archive.files import listed

    runtime.require_kafka()
    topic = runtime.topics.events
    archive = runtime.archive(events_id=runtime.admin().topic_id(topic))
    state = archive.state()
    table = archive.open()
    reader = runtime.reader()
    begins, ends = reader.begin_offsets(topic), reader.end_offsets(topic)
    reader.close()
    files = [] if table is None else listed(table)
    rows = [
        partition_row(p, state, (begins[p], ends[p]))
        | {"bytes": sum(f.size for f in files if f.place[:2] == (runtime.topics.generation, p))}
        for p in sorted(begins)
    ]
    if args.json:
        for row in rows:
            print(msgspec.json.encode(row).decode())
    else:
        print(f"{'partition':>9} {'archived':>25} {'topic':>25} {'waiting':>9} {'bytes':>15}")
        for row in rows:
            spans = (f"{span[0]:,} to {span[1]:,}" if span else "-" for span in (row["archived"], row["topic"]))
            print(
                f"{row['partition']:>9} {next(spans):>25} {next(spans):>25} {row['waiting']:>9,} {row['bytes']:>15,}"
                + (f"  {row['wrong']}" if row["wrong"] else "")
            )
        if not runtime.config.archive.events:
            print("archive.events is false: nothing is added")
    return 1 if any(row["wrong"] for row in rows) else 0


def partition_row(partition: int, state: ArchiveState | None, topic: tuple[int, int]) -> dict[str, Any]:
    """Return what is known of one partition; `wrong` is "" or says what readers will refuse."""
    whole = None if state is None else state.whole.get(partition)
    lost = None if state is None else state.lost.get(partition)
    wrong = ""
    if whole is not None and whole.end > topic[1]:
        wrong = f"the topic has lost its end: it is archived up to {whole.end}"
    elif whole is not None and whole.end < topic[0]:
        wrong = f"offsets {whole.end} to before {topic[0]} were forgotten before they were archived"
    elif lost is not None:
        wrong = f"offsets {lost.begin} to before {lost.end} were forgotten before they were archived"
    return {
        "partition": partition,
        "archived": list(whole) if whole is not None else None,
        "topic": list(topic),
        "waiting": max(0, topic[1] - max(topic[0], whole.end if whole is not None else 0)),
        "wrong": wrong,
    }
