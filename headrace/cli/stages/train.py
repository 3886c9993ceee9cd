"""Learn from the lake, then from the topic; publish snapshots and deltas.

What it does, in this order:

  1. resume      the newest checkpoint of the project's recipe; the steps recorded after it are done again, exactly
  2. catch up    without a checkpoint: all that the lake holds, in event-time order; a progress bar shows the time left
  3. follow      the samples topic, for ever; deltas several times a second, a snapshot and a checkpoint now and then

One worker. Its state is in the store (checkpoints) and in the `steps` topic: killed at any moment, it goes on from
there with the same bits. SIGTERM leaves a checkpoint and stops within 5 s; steps that were recorded ahead of learning,
under a backlog, are learnt by the next start. Changing the recipe or the feature spec begins a new run from the lake;
the old one's checkpoints stay.

--variant NAME learns a recipe of `Project(..., variants={...})` beside the project's own, as a model of its own; what
it publishes is served after `headrace model promote NAME`. A variant that was promoted and moved to recipe= goes on
with its run, without --variant.

One trainer a model. A second one takes the model over; the first one stops, and refuses to come back until the second
one has ended in good order. Of two in one HEADRACE_HOME the second one refuses.

What to watch: `headrace tensorboard`, and on the metrics port /metrics, /readyz, /healthz. A trainer that is slower
than its samples loses none: they wait in Kafka, lag_records and lag_seconds grow, and steps fill up to `batch_rows`,
which is when it is fastest. `negative_share` in the recipe makes it learn fewer.

    headrace train repair

is no stage: it says why a trainer refuses to start or to go on for samples that are missing, what it would do about it,
and after a question does it: a new run that begins with the lake, or goes on from the newest checkpoint and leaves out
what is missing, by name.

Settings: [train] in headrace.toml. Which model, rates, sizes: the project's Recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

from headrace.cli.progress_bar import show_progress
from headrace.cli.runtime import add_common, add_variant, open_runtime, stop_event
from headrace.cli.stages import train_repair
from headrace.cli.tools.models.new_run import writer_id
from headrace.contract.errors import ConfigRejected
from headrace.deploy.local.layout import trainer_of
from headrace.trainer.validation.board import Board

_LOOP_HEALTHY_S = 1_800.0
"""The loop asks whether it is to stop at each step and wait; reading a large checkpoint or redoing steps is between."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage's flags."""
    add_common(parser)
    parser.add_argument("action", nargs="?", choices=["repair"], help="repair: get past samples that are missing")
    train_repair.add_arguments(parser)
    add_variant(parser, "learn")
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="start also where another trainer took the model over from this one: it is gone for good",
    )


def main(args: argparse.Namespace) -> int:
    """Run the stage until SIGTERM; or repair once."""
    if args.action == "repair":
        args.log_level = "WARNING" if args.log_level == "INFO" else args.log_level
        return train_repair.repair(args)
    from headrace.trainer.dependencies import Dependencies
    from headrace.trainer.run import train

    if args.begin or args.reason or args.dry_run or args.yes:
        raise ConfigRejected("--begin, --reason, --dry-run and --yes are of `headrace train repair`.")
    of_project = open_runtime(args)
    of_project.open_topics()
    runtime, name = of_project.of_variant(args.variant), args.variant or ""
    lock = lock_home(runtime.home, runtime.project.model)
    stop = stop_event()
    metrics = of_project.metrics("train", variant=name)
    ids = runtime.open_topics(ids_of=(runtime.topics.samples, runtime.topics.steps)).ids
    samples_id = ids[runtime.topics.samples]
    producer = runtime.producer(metrics)
    stop.attach(metrics.health, healthy_s=_LOOP_HEALTHY_S)
    with lock, runtime.reachable(metrics.health):
        train(
            Dependencies(
                project=runtime.project,
                config=runtime.config.train,
                topics=runtime.topics,
                reader=runtime.reader(),
                open_reader=runtime.reader,
                admin=runtime.admin(),
                producer=producer,
                steps_writer=runtime.fenced(runtime.topics.steps, writer_id(runtime)),
                blobs=runtime.blobs(),
                metrics=metrics,
                clock=runtime.clock,
                stop=stop,
                calls=runtime.calls,
                lake=runtime.lake(samples_id=samples_id),
                samples_id=samples_id,
                steps_id=ids[runtime.topics.steps],
                board=Board(runtime.tensorboard_dir / (f"train@{name}" if name else "train")),
                progress=show_progress(logging.getLogger("headrace.train")),
                name=f"{socket.gethostname()}:{runtime.home.resolve()}",
                take_over=args.take_over,
            )
        )
    return 0


def lock_home(home: Path, model: str) -> IO[str]:
    """Return an open file that keeps a second trainer of this model out of `home` until it is closed.

    Raises `ConfigRejected` where another process has it.
    """
    path = home / "run" / f"train-{model}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        variant = model.partition(".")[2]
        beside = f" (`headrace stop {trainer_of(variant)}` where it is the one beside)" if variant else ""
        file.close()
        raise ConfigRejected(
            f"process {holder} trains model {model!r} from {home} already; stop it{beside}, or give this one another "
            "--home."
        ) from None
    # The name is for people; the lock holds without it, on a full disk too.
    with contextlib.suppress(OSError):
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"{os.getpid()}\n".encode())
    return file
