"""`headrace train repair`: why a trainer would refuse for samples that are missing, and a run that gets past them."""

from __future__ import annotations

import argparse
import logging

from headrace.cli.runtime import open_runtime
from headrace.cli.tools.asked import agreed, shown_time
from headrace.cli.tools.models.new_run import Training, open_training
from headrace.contract.errors import ConfigRejected
from headrace.deploy.local.layout import trainer_of
from headrace.trainer.commit.rollback import Place
from headrace.trainer.repair import Diagnosis, diagnose

logger = logging.getLogger("headrace.train")

_TOLD_EVERY = 100_000
REASON = "headrace train repair"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `repair`."""
    parser.add_argument("--begin", choices=["lake", "checkpoint"], help="repair: where the new run begins")
    parser.add_argument("--reason", default="", help="repair: why; it is kept in the log")
    parser.add_argument("--dry-run", action="store_true", help="repair: say what would be done, and do nothing")
    parser.add_argument("--yes", action="store_true", help="repair: do not ask")


def repair(args: argparse.Namespace) -> int:
    """Look, say what is wrong and what is done about it, ask, do it."""
    training = open_training(open_runtime(args), args.variant)
    runtime = training.runtime
    places = training.standing.on_path()
    place = places[0] if places else None
    lake = runtime.lake(samples_id=training.samples_id, with_leases=False)
    print("looking at the recorded steps and at what the topic has; that reads all of it behind the checkpoint")
    found = diagnose(place, training.redone(place), training.reader, runtime.topics.samples, lake, moved=_tell_progress)
    way = args.begin or found.way
    if not found.wrong and not args.begin:
        print("nothing is missing: a trainer goes on by itself. `headrace logs train` has what it says")
        return 0
    if way == "checkpoint" and place is None:
        raise ConfigRejected("there is no checkpoint to begin from: --begin lake begins with what the lake holds.")
    print("\n".join(_told(training, found, place if way == "checkpoint" else None)))
    if args.dry_run:
        return 0
    if not args.yes and not agreed():
        print("nothing was changed")
        return 1
    begins = place if way == "checkpoint" else None
    first = training.begin(begins, left_out=found.missing if begins is not None else (), reason=args.reason or REASON)
    process = trainer_of(args.variant) if args.variant else "train"
    print(f"run {first.run} begins as soon as the trainer starts: `headrace restart {process}` does not wait for it")
    return 0


def _told(training: Training, found: Diagnosis, place: Place | None) -> list[str]:
    lines = [f"wrong: {each}" for each in found.wrong] or ["nothing was found wrong"]
    if any("lacks" in each for each in found.wrong):
        lines.append("restart `stream` first if it may still send what is missing: then nothing is left out")
    if place is None:
        now = training.standing.run or "no run"
        return [
            *lines,
            "a new run begins with all that the lake holds now, and goes on with the topic from there",
            f"{now} is served until the new run has learnt the lake; nothing is deleted",
        ]
    meta = place.manifest.meta
    lines.append(f"a new run goes on from {place.version}, events up to {shown_time(meta.event_ms)}")
    lines += [
        f"it leaves out for good, and the ledger counts as `skipped`: partition {each.partition}, after "
        f"{tuple(each.after)} up to {tuple(each.upto)}"
        for each in found.missing
    ]
    return [*lines, f"what else came after {place.version} is learnt again, as far as the topic has it"]


def _tell_progress(count: int) -> None:
    if count and count % _TOLD_EVERY == 0:
        logger.info("%d records of samples were looked at", count)
