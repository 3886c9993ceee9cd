"""Accounts for every event: read, joined, stored, learnt, lost, twice.

The events log is joined once more and held, id by id, against the lake and the steps, up to the positions that each has
committed. It reads only; traffic may flow meanwhile. Exit code 1 when something is lost or counted twice.
"""

from __future__ import annotations

import argparse
import sys

import msgspec
import pyarrow as pa

from headrace.backends.lake.delta import DeltaLake
from headrace.cli.runtime import add_common, open_runtime
from headrace.contract.config import Config
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.dead_letters import decode_dead_letter, decode_retry_mark
from headrace.contract.formats.positions import Positions
from headrace.contract.formats.steps import decode_step
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Reader, read_range
from headrace.contract.project import Project
from headrace.ingest.dead_letters.view import Letter, superseded
from headrace.replay.ledger.ledger import KEYS, TIMED_KEYS, Found, Ledger, draw, stored_by_log
from headrace.replay.ledger.rejoin import rejoin
from headrace.replay.ledger.scan import sample_keys
from headrace.stream.rule_changes import first_rules
from headrace.trainer.source.stored import stored_order

ROWS = (
    ("gateway", ("read", "appended", "dead_lettered", "repeated", "retried")),
    ("log", ("impressions", "feedback", "external", "repeated_in_log")),
    ("label", ("positives", "negatives", "waiting")),
    ("feedback", ("matched", "duplicate", "late", "orphans", "pending")),
    ("model", ("samples", "learnt", "refused", "sampled_out", "in_flight")),
    ("lake", ("stored", "retained")),
    ("verdict", ("lost", "twice")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_common(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object for programs")


def main(args: argparse.Namespace) -> int:
    """Draw the ledger of the running stack and print it."""
    args.log_level = "WARNING" if args.log_level == "INFO" else args.log_level
    runtime = open_runtime(args)
    lake = DeltaLake(runtime.lake_uri, generation=runtime.topics.generation, partitions=runtime.config.log.partitions)
    ledger = take_stock(runtime.project, runtime.config, runtime.topics, runtime.reader(), lake)
    if args.json:
        print(msgspec.json.encode(ledger).decode())
    else:
        print(table(ledger))
    sys.stdout.flush()
    return 1 if ledger.lost or ledger.twice else 0


def take_stock(project: Project, config: Config, topics: Topics, reader: Reader, lake: DeltaLake) -> Ledger:
    """Read effects before causes (steps, lake, samples, events), so that what an effect contains is found in the log.

    Dead letters come last: the gateways' totals, which lie among the events, must not be ahead of them.
    """
    steps = [decode_step(r.value) for r in read_range(reader, topics.steps) if r.value is not None]
    state = lake.state()
    stored = lake.read(state.version, KEYS.names).cast(KEYS) if state is not None else KEYS.empty_table()
    topic = sample_keys(read_range(reader, topics.samples))
    marks = [decode_retry_mark(r.value) for r in read_range(reader, topics.retries) if r.value is not None]
    began = first_rules(project, list(read_range(reader, topics.rules)))
    expected, punctuations = rejoin(began, config, read_range(reader, topics.events))
    letters = [
        Letter(r.offset, decode_dead_letter(r.value))
        for r in read_range(reader, topics.dead_letters)
        if r.value is not None
    ]
    reader.close()

    steps = [step for step in steps if step.model == project.name]
    retained_before_ms = state.retained_before_ms if state is not None else 0

    def stored_keys(version: int) -> pa.Table:
        tasks = project.recipe.heads
        try:
            return stored_order(lake.read(version, TIMED_KEYS.names), tasks).select(KEYS.names).cast(KEYS)
        except (Unavailable, InvariantBroken):
            # The version is beyond lake.history_ms, or retention dropped rows of it: the log has them still.
            found = stored_by_log(expected.samples, steps, version, tasks, retained=retained_before_ms > 0)
            if found is None:
                raise
            return found

    found = Found(
        topic=topic,
        lake=stored,
        lake_positions=state.positions if state is not None else Positions(topics.generation),
        steps=steps,
        stored_keys=stored_keys,
        letters=[letter.told for letter in letters],
        tags=frozenset({project.impression.tag, *(feedback.tag for feedback in project.feedback)}),
        punctuations=punctuations,
        retried=superseded(letters, marks),
        retained_before_ms=retained_before_ms,
    )
    return draw(expected, found, recipe=project.recipe)


def table(ledger: Ledger) -> str:
    """Return the ledger for people."""
    lines = [
        f"{title:<10}" + "".join(f"{name} {getattr(ledger, name):,}   " for name in names).rstrip()
        for title, names in ROWS
    ]
    lines += [f"  {reason:<20} {count:,}" for reason, count in sorted(ledger.dead_letters.items())]
    lines += [f"run {m.run}: {m.steps:,} steps, {m.learnt:,} learnt" for m in ledger.models.values()]
    where = [f"lost in {w}: {n:,}" for w, n in ledger.lost_where.items() if n]
    where += [f"twice in {w}: {n:,}" for w, n in ledger.twice_where.items() if n]
    return "\n".join([*lines, *where, "the ledger closes" if ledger.closes else "THE LEDGER DOES NOT CLOSE"])
