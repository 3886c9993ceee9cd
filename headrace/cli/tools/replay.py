"""Replay as trained: learn the recorded steps again, and compare the digest with the live model's.

Exit status 1 when the digests differ. `--json` prints one object on the standard output.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket

import msgspec

from headrace.cli.progress_bar import show_progress
from headrace.cli.runtime import add_common, add_variant, open_runtime

logger = logging.getLogger("headrace.replay")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    add_common(parser)
    add_variant(parser, "replay")
    parser.add_argument("--step", type=int, metavar="N", help="replay up to step N; the newest snapshot's by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(log_level="WARNING")


def main(args: argparse.Namespace) -> int:
    """Replay once."""
    import torch

    from headrace.replay.as_trained import as_trained
    from headrace.trainer.commit.steps_archive import StepsArchive

    runtime = open_runtime(args)
    runtime.require_kafka()
    runtime = runtime.of_variant(args.variant)
    # Whatever else is silent: a replay takes as long as the training did.
    logger.setLevel(logging.INFO)
    torch.set_num_threads(runtime.config.train.threads)
    admin, topics = runtime.admin(), runtime.topics
    result = as_trained(
        runtime.project,
        topics,
        runtime.reader(),
        runtime.lake(),
        train=runtime.config.train,
        step=args.step,
        holder=f"replay-{socket.gethostname()}-{os.getpid()}",
        samples_id=admin.topic_id(topics.samples),
        archive=StepsArchive(runtime.blobs(), topics.steps, admin.topic_id(topics.steps)),
        progress=show_progress(logger),
    )
    if args.json:
        print(msgspec.json.encode(result).decode())
    else:
        verdict = {True: "equal to the live model's", False: "NOT the live model's", None: "no live digest to compare"}
        print(
            f"model {result.model}, run {result.run} step {result.step}: {result.rows} samples, "
            f"{result.from_lake} from the lake, {result.from_topic} from the topic, {result.seconds} s"
        )
        print(f"digest {result.digest}: {verdict[result.equal]}")
        if result.equal is False:
            print(f"live   {result.live_digest}")
        if result.differs:
            print(f"what differs: {', '.join(result.differs)}")
    return 0 if result.equal is not False else 1
