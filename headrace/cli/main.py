"""`headrace VERB`: finds the verb's module, imports only that one, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.metadata
import io
import os
import select
import signal
import sys
from collections.abc import Sequence

from headrace.cli.kafka_words import in_words
from headrace.contract.errors import ConfigRejected, HeadraceError
from headrace.kernels.code_cache import keep_compiled_code

VERBS: dict[str, tuple[str, str]] = {
    "init": ("tools.init", "make the folder of a new project, with traffic for a try"),
    "check": ("tools.check", "look at a project before anything runs: what it declares and takes, what is wrong"),
    "up": ("stack.up", "start everything on this machine: Kafka, HDFS, all stages, the demo"),
    "down": ("stack.down", "stop everything that `up` started"),
    "restart": ("stack.restart", "stop and start named processes; the others go on"),
    "start": ("stack.start", "start named processes that were stopped or wait for their next start"),
    "stop": ("stack.stop", "stop named processes until `start`; the others go on"),
    "follow": ("stack.follow", "print the lines of `headrace up` for a stack that runs detached"),
    "status": ("stack.status", "show each process, its state, port, memory and log file"),
    "logs": ("stack.logs", "show and follow a process's log file"),
    "doctor": ("stack.doctor", "find what keeps the stack from running, and say the remedy"),
    "clean": ("stack.clean", "delete local state, after saying what goes"),
    "ledger": ("tools.ledger", "account for every event: read, joined, learnt, lost, twice"),
    "dead-letters": ("tools.dead_letters", "what was refused and why: list, show, retry after a fix"),
    "chaos": ("tools.chaos", "kill processes at random under load, then account for every event"),
    "quantiles": ("tools.quantiles", "learn the quantiles of a field from the lake, to pin in the feature spec"),
    "model": ("tools.models.model", "the models side by side; promote a variant; export: ONNX, torch.export, Parquet"),
    "rollback": ("tools.models.rollback", "bring trainer and serving back to an earlier model, together"),
    "replay": ("tools.replay", "run stored samples through the same learner again"),
    "ingest": ("stages.ingest", "gateway: Fluent forward in, batches to Kafka out"),
    "stream": ("stages.stream", "join impressions with feedback, featurize, emit samples"),
    "sink": ("stages.sink", "write samples to the Delta table of the lake"),
    "lake": ("lake.lake", "compact, vacuum, retain; show history; read a version; export labelled samples"),
    "spec": ("tools.spec", "show and change, in mid-stream, by which rules events are read"),
    "aggregate": ("stages.aggregate", "windowed counters of keys other than the partition's"),
    "crawl": ("stages.crawl", "crawl declared sources: catalogue, prices, news, weather"),
    "train": (
        "stages.train",
        "learn from the lake, then from the topic, and publish; `train repair`: past lost samples",
    ),
    "serve": ("stages.serve", "answer POST /v1/rank with the newest model"),
    "shop": ("stages.shop", "demo traffic: ask, show, log, click"),
    "traffic": ("tools.traffic", "play a project's made-up visitors to a running stack, for a try"),
    "watch": ("stages.watch", "restart stages of this machine that do not work; `up` starts it"),
    "tensorboard": ("stages.tensorboard", "serve TensorBoard on the trainer's scalars"),
}
"""Verb -> (module of headrace.cli, phrase for the help)."""


_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 0 is success, 1 a named error, 2 a wrong call, 130 an interrupt, 141 a reader that is gone."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks is shown escaped, and ends nothing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    verb = next((word for word in words if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="headrace",
        description="Online learning end to end. Each verb has its own --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs:\n" + "\n".join(f"  {name:<12} {phrase}" for name, (_, phrase) in VERBS.items()),
    )
    parser.add_argument("verb", metavar="VERB", choices=list(VERBS), help="one of the verbs below")
    if verb not in VERBS or words[0] != verb:
        parser.add_argument("--version", action="version", version=f"headrace {importlib.metadata.version('headrace')}")
        parser.parse_args(words[:1] or ["--help"])
        return 2
    module_name, phrase = VERBS[verb]
    keep_compiled_code()
    if verb == "serve":
        # Before NumPy is imported. Threads of BLAS that wait for each other spin: on two busy cores an answer of 100
        # candidates costs 12 ms of CPU with them and 2 ms without.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        module = importlib.import_module(f"headrace.cli.{module_name}")
    except ModuleNotFoundError as error:
        if error.name != f"headrace.cli.{module_name}":
            raise
        print(f"headrace {verb}: this build has no such stage ({error.name}).", file=sys.stderr)
        return 1
    of_verb = argparse.ArgumentParser(
        prog=f"headrace {verb}",
        description=module.__doc__ or phrase,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(of_verb)
    args = of_verb.parse_args(words[1:])
    try:
        status = int(module.main(args))
        sys.stdout.flush()
        return status
    except ConfigRejected as error:
        print(f"headrace {verb}: {in_words(str(error), args)}", file=sys.stderr)
        return 2
    except HeadraceError as error:
        print(f"headrace {verb}: {type(error).__name__}: {in_words(str(error), args)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # What is left in the buffer would be written, and fail, once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        print(
            f"headrace {verb}: {error}. Free the disk, or see who may write there; then start again.", file=sys.stderr
        )
        return 1


def _reader_is_gone() -> bool:
    """Say whether standard output is a pipe that nobody reads any more, as after `| head`; not some other socket."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(flags & select.POLLERR for _, flags in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
