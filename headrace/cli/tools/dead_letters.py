"""Look at what was refused, and offer it again after a fix.

  list    one line a letter and counts by reason; --json prints one object a line with the whole record
  show    one whole letter and what to do about it
  retry   offer letters again, each at most once; killed at any point, run it again

A letter's id is its partition and offset in the topic, such as 0/17. `retry` judges by the project of --project: name
the folder whose schema was corrected, the same that the gateways run.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from headrace.backends.log.fenced_kafka import FencedKafka
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.cli.runtime import Runtime, add_common, open_runtime
from headrace.cli.stored_ids import IdsOfLake, JoinedInStore
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.dead_letters import TOO_LATE
from headrace.contract.interfaces.log import Reader
from headrace.contract.privacy import KEY_NAME, Privacy
from headrace.ingest.dead_letters.display import ADVICE, ADVICE_ELSE, AFTER, row, summary, title, view
from headrace.ingest.dead_letters.letters import (
    Filter,
    Letter,
    States,
    parse_age_ms,
    parse_id,
    read_letters,
    read_marks,
    why_not_retried,
)

if TYPE_CHECKING:
    from headrace.ingest.dead_letters.retry import Decision, Report

ROWS_SHOWN = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    actions = parser.add_subparsers(dest="action", metavar="list|show|retry", required=True)
    listing = actions.add_parser("list", help="one line a letter, counts by reason", description="List dead letters.")
    _add_filters(listing)
    listing.add_argument(
        "--limit", type=int, help=f"the newest N only (a table shows {ROWS_SHOWN}, --json all; 0 shows all)"
    )
    listing.add_argument("--json", action="store_true", help="one JSON object a line, the whole record in it")
    showing = actions.add_parser("show", help="one whole letter and what to do", description="Show one dead letter.")
    showing.add_argument("ids", nargs=1, metavar="ID", help="as `list` shows it, such as 0/17")
    showing.add_argument("--json", action="store_true", help="one JSON object")
    again = actions.add_parser(
        "retry", help="offer letters again after a fix", description="Offer dead letters again, each at most once."
    )
    again.add_argument("ids", nargs="*", metavar="ID", help="as `list` shows them, such as 0/17")
    _add_filters(again)
    again.add_argument("--all", action="store_true", help="every letter that nobody has retried yet")
    decide = again.add_mutually_exclusive_group()
    decide.add_argument("--take", action="store_true", help="take those that log and lake cannot tell from repeats")
    decide.add_argument("--drop", action="store_true", help="settle those that log and lake cannot tell as repeats")
    again.add_argument("--dry-run", action="store_true", help="say what would be taken and refused; write nothing")
    again.add_argument("--json", action="store_true", help="print the counts as one JSON object")
    for each in (listing, showing, again):
        add_common(each)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", default="", help="letters of this reason, such as undeclared")
    parser.add_argument("--tag", default="", help="letters of this tag")
    parser.add_argument("--origin", default="", help="letters from this address")
    parser.add_argument("--since", default="", metavar="AGE", help="refused no longer ago than 90s, 15m, 1h, 2d")


def main(args: argparse.Namespace) -> int:
    """Run one of the three."""
    args.log_level = "WARNING" if args.log_level == "INFO" else args.log_level
    runtime = open_runtime(args)
    runtime.require_kafka()
    runtime.open_topics()
    chosen = _filter(args, runtime.clock.now_ms())
    if args.action == "retry":
        if not (chosen != Filter() or args.all):
            raise ConfigRejected("retry which letters? Give ids, a filter such as --reason undeclared, or --all.")
        return _retry(runtime, chosen, args)
    if args.action == "show":
        return _show(runtime, chosen, args)
    return _list(runtime, chosen, args)


def _filter(args: argparse.Namespace, now_ms: int) -> Filter:
    since = getattr(args, "since", "")
    return Filter(
        offsets=frozenset(parse_id(text) for text in getattr(args, "ids", ())),
        reason=getattr(args, "reason", ""),
        tag=getattr(args, "tag", ""),
        origin=getattr(args, "origin", ""),
        since_ms=now_ms - parse_age_ms(since) if since else 0,
    )


def _read(runtime: Runtime, reader: Reader) -> tuple[States, Iterator[Letter]]:
    """Return what became of the letters, and the letters."""
    writer = _retries(runtime)
    states = States(read_marks(writer))
    writer.close()
    topic = runtime.topics.dead_letters
    end = reader.end_offsets(topic)[0]
    if states.doubtful:
        for letter in read_letters(reader, topic, end):
            states.note(letter)
    return states, read_letters(reader, topic, end)


def _retries(runtime: Runtime) -> FencedKafka:
    """Return the fenced writer of the topic that says what was retried."""
    topic = runtime.topics.retries
    return runtime.fenced(topic, f"headrace-{topic}")


def _list(runtime: Runtime, chosen: Filter, args: argparse.Namespace) -> int:
    limit = args.limit if args.limit is not None else 0 if args.json else ROWS_SHOWN
    reader = runtime.reader()
    states, found = _read(runtime, reader)
    counts = Counter[tuple[str, str]]()
    newest: deque[Letter] = deque(maxlen=limit or None)
    for letter in found:
        if not chosen.takes(letter):
            continue
        counts[letter.content.reason, states.of(letter.offset)] += 1
        if args.json and not limit:
            print(_json(letter, states))
        else:
            newest.append(letter)
    reader.close()
    if args.json:
        for letter in newest:
            print(_json(letter, states))
        return 0
    print(title())
    for letter in newest:
        # Cut for a terminal only: what is piped is searched.
        print(row(letter, states.of(letter.offset), _utc(letter.content.seen_ms), whole=not sys.stdout.isatty()))
    total = sum(counts.values())
    if total > len(newest):
        print(f"the newest {len(newest)} of {total:,}; --limit N shows more, --json all")
    print("\n".join(summary(counts)))
    return 0


def _json(letter: Letter, states: States) -> str:
    return msgspec.json.encode(view(letter, states.of(letter.offset))).decode()


def _utc(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _show(runtime: Runtime, chosen: Filter, args: argparse.Namespace) -> int:
    reader = runtime.reader()
    states, found = _read(runtime, reader)
    letter = next((one for one in found if chosen.takes(one)), None)
    reader.close()
    if letter is None:
        raise ConfigRejected(f"{args.ids[0]}: no such letter; `headrace dead-letters list` shows those that are kept.")
    if args.json:
        print(_json(letter, states))
        return 0
    shown = view(letter, states.of(letter.offset))
    record = shown.pop("record", None)
    shown["seen_ms"] = f"{letter.content.seen_ms} ({_utc(letter.content.seen_ms)} UTC)"
    for name, value in shown.items():
        print(f"{name:<14} {_printable(str(value))}")
    if record is not None:
        print("record\n" + json.dumps(record, indent=2))
    print("\n" + "\n".join(_what_to_do(letter, states.of(letter.offset))))
    return 0


def _what_to_do(letter: Letter, state: str) -> list[str]:
    if state in AFTER:
        return [AFTER[state].format(letter.id)]
    then = why_not_retried(letter).capitalize() or f"Then: headrace dead-letters retry {letter.id}"
    return [ADVICE.get(letter.content.reason, ADVICE_ELSE), then]


def _printable(text: str) -> str:
    """Return text of a stranger's without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _retry(runtime: Runtime, chosen: Filter, args: argparse.Namespace) -> int:
    # Only here: the gateway's compiled decoder takes a second to load, and a list should not wait for it.
    from headrace.ingest.dead_letters.look_up import LookUp
    from headrace.ingest.dead_letters.retry import Retry
    from headrace.ingest.gateway.late_events import LateEvents

    reader = runtime.event_reader(f"retry-{socket.gethostname()}-{os.getpid()}")
    producer, writer = runtime.producer(), _retries(runtime)
    retry = Retry(
        runtime.project,
        runtime.config.ingest,
        runtime.topics,
        runtime.config.log.partitions,
        producer=producer,
        reader=reader,
        writer=writer,
        clock=runtime.clock,
        metrics=MemoryMetrics(),
        run=uuid.uuid4().hex[:12],
        privacy=Privacy(runtime.project, os.environ.get(KEY_NAME, "")),
        look_up=LookUp(
            runtime.project,
            runtime.topics,
            reader,
            IdsOfLake(runtime.lake),
            JoinedInStore(runtime.blobs, runtime.topics.generation),
            skew_ms=runtime.config.ingest.skew_ms,
        ),
        late=LateEvents(runtime.config.join.repeat_horizon_ms),
    )
    decide: Decision = "take" if args.take else "drop" if args.drop else ""
    try:
        report = retry.dry_run(chosen, decide) if args.dry_run else retry.retry(chosen, decide)
    finally:
        producer.close()
        reader.close()
        writer.close()
    print(msgspec.json.encode(report).decode() if args.json else "\n".join(_lines(report)))
    return 0


def _lines(report: Report) -> list[str]:
    would = "would be " if report.dry_run else ""
    lines = [f"{report.offered:,} letter{'s' * (report.offered != 1)} {would}offered"]
    lines += [f"  {report.appended:>9,}  {would}taken"]
    lines += [f"  {report.repeated:>9,}  in the log before: counted once"] if report.repeated else []
    lines += [f"  {report.unknown:>9,}  nobody can tell: --take or --drop decides"] if report.unknown else []
    lines += [f"  {report.skipped_lines:>9,}  no event by the mapping"] if report.skipped_lines else []
    lines += [f"  {count:>9,}  {would}refused again: {why}" for why, count in sorted(report.refused.items())]
    if TOO_LATE in report.refused:
        lines.append("             too_late: they are newer letters now, and the gateways look them up by themselves")
    lines += [f"  {count:>9,}  not offered: {why}" for why, count in sorted(report.skipped.items())]
    lines += [f"  {count:>9,}  left by a killed retry: {fate}" for fate, count in sorted(report.found_out.items())]
    return lines
