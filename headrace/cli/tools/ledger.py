"""Account for every event: read, joined, stored, learnt, lost, twice.

Counts and sums of ids that are stored with samples, lake commits and steps are compared, and read by id where they
differ; what is sound is kept in the store for the next drawing. A small log, and any with --full, is joined once more
and held, id by id, against the lake and the steps. Traffic may flow meanwhile. Exit code 1 when something is lost or
counted twice, when a seal is wrong, or when what is not stored or not learnt is older than `ledger.behind_max_ms`.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from contextlib import suppress

import msgspec

from headrace.cli.runtime import add_common, open_runtime
from headrace.contract.errors import Unavailable
from headrace.replay.ledger.ledger import is_sound, table
from headrace.replay.ledger.take_stock import take_stock
from headrace.trainer.commit.claim import models_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_common(parser)
    parser.add_argument("--full", action="store_true", help="read all that is kept, and compare the seals with it")
    parser.add_argument("--json", action="store_true", help="print one JSON object for programs")


def main(args: argparse.Namespace) -> int:
    """Draw the ledger of the running stack and print it."""
    args.log_level = "WARNING" if args.log_level == "INFO" else args.log_level
    runtime = open_runtime(args)
    runtime.require_kafka()
    home, models = runtime.of_variant(None), models_of(runtime.blobs(), runtime.project.name)
    topics, admin = runtime.topics, runtime.admin()
    ids = {topic: admin.topic_id(topic) for topic in (topics.events, topics.samples, home.topics.steps)}
    beside = []
    for model in (one for one in models if one != home.project.model):
        # Of one that was trained in an earlier generation alone there is no topic.
        with suppress(Unavailable):
            ids[topics.of(model).steps] = admin.topic_id(topics.of(model).steps)
            beside.append(model)
    lake = runtime.lake(samples_id=ids[topics.samples], with_leases=False)
    ledger = take_stock(
        home.project,
        runtime.config,
        topics,
        runtime.event_reader(f"ledger-{socket.gethostname()}-{os.getpid()}"),
        lake,
        blobs=runtime.blobs(),
        mode="full" if args.full else "auto",
        topic_ids=ids,
        beside=beside,
    )
    if args.json:
        print(msgspec.json.encode(ledger).decode())
    else:
        print(table(ledger))
    sys.stdout.flush()
    return 0 if is_sound(ledger) else 1
