"""The `headrace` command: one verb a module, `headrace.cli.stage_<verb>`, imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from headrace.cli.runtime import add_common
from headrace.contract.errors import ConfigRejected, HeadraceError

VERBS: dict[str, str] = {
    "up": "start the whole stack on this machine and show what happens",
    "down": "stop what `up` started",
    "status": "show each process: state, port, memory, log file",
    "logs": "follow the log of a stage",
    "doctor": "look for what would keep the stack from running, and name the remedy",
    "clean": "delete the local state (says what)",
    "ledger": "account for every event: nothing lost, nothing twice",
    "replay": "train again as trained and compare digests",
    "ingest": "run the gateway: Fluent forward in, Kafka out",
    "stream": "run the join: events in, samples out",
    "aggregate": "run the aggregator: counters over all partitions",
    "sink": "run the sink: samples into the lake",
    "train": "run the trainer: lake, then live; publishes the model",
    "serve": "run serving: POST /v1/rank on the live model",
    "shop": "run the demo shop's traffic",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return its exit status. 2 means: refused to start, change the configuration."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="headrace",
        description="Online learning end to end. Each verb has its own --help.",
        epilog="Addresses come from the environment: HEADRACE_BROKERS, HEADRACE_STORE, HEADRACE_WEBHDFS, PORT_BASE, "
        "HEADRACE_HOME.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    asked = next((word for word in words if not word.startswith("-")), None)
    for verb, phrase in VERBS.items():
        sub = verbs.add_parser(verb, help=phrase, description=phrase[0].upper() + phrase[1:] + ".")
        if verb == asked:
            module = importlib.import_module(f"headrace.cli.stage_{verb}")
            add_common(sub)
            sub.description = module.HELP
            module.add_arguments(sub)
            sub.set_defaults(run=module.main)
    args = parser.parse_args(words)
    try:
        return int(args.run(args))
    except ConfigRejected as error:
        print(f"headrace {args.verb}: {error}", file=sys.stderr)
        return 2
    except HeadraceError as error:
        logging.getLogger("headrace").critical("%s: %s", type(error).__name__, error)
        return 1
    except KeyboardInterrupt:
        return 130
