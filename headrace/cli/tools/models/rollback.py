"""Bring trainer and serving back to an earlier model, together.

    headrace rollback --list
    headrace rollback --to 2026-11-25T01:00Z

It takes the newest checkpoint that knows no event later than that, and begins a new run from it: the trainer is started
anew by its supervisor and goes on from there, and serving takes nothing more of the run that was left. What came after
the checkpoint is learnt again, each sample once, unless --skip-until leaves it out: then the ledger counts it as
`skipped`. Nothing is deleted; --to RUN-STEP brings any kept checkpoint back, one of the run that was left too.

--variant NAME brings a variant's model back, not the one of the project's own recipe; each has runs of its own.
"""

from __future__ import annotations

import argparse

from headrace.cli.runtime import add_common, add_variant, open_runtime
from headrace.cli.tools.asked import agreed, parse_time_ms, shown_time
from headrace.cli.tools.models.new_run import Training, open_training
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.steps import PassedOver
from headrace.deploy.local.layout import trainer_of
from headrace.trainer.commit.rollback import Place, chosen
from headrace.trainer.source.gaps import cut_off, until


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    add_common(parser)
    add_variant(parser, "bring back")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", metavar="TIME", help="a time of events, 2026-11-25T01:00Z; or a version of --list")
    what.add_argument("--list", action="store_true", help="show what one can go back to")
    parser.add_argument("--model-run", metavar="RUN", default="", help="of this run; the one that goes on by default")
    parser.add_argument(
        "--skip-until",
        metavar="now|TIME",
        default="",
        help="leave out what the topic got until then, and learn what came later",
    )
    parser.add_argument("--reason", default="", help="why; it is kept in the log")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask; needed where no terminal can answer")


def main(args: argparse.Namespace) -> int:
    """Go back once."""
    args.log_level = "WARNING" if args.log_level == "INFO" else args.log_level
    at_ms, version = (None, "") if args.list else _time_or_version(args.to)
    skip_ms = None if args.skip_until in ("", "now") else parse_time_ms(args.skip_until)
    training = open_training(open_runtime(args), args.variant)
    if args.list:
        _show(training, args.model_run)
        return 0
    place = chosen(training.standing, at_ms=at_ms, version=version, run=args.model_run)
    left_out = _left_out(training, place, skip_ms, is_skipping=bool(args.skip_until))
    print("\n".join(_told(training, place, left_out)))
    if args.dry_run:
        return 0
    if not args.yes and not agreed():
        print("nothing was changed")
        return 1
    first = training.begin(place, left_out=left_out, reason=args.reason)
    process = trainer_of(args.variant) if args.variant else "train"
    print(
        f"run {first.run} goes on from {place.version}. The trainer ends and is started anew; serving goes back as "
        f"soon as it is up (`headrace status`). `headrace restart {process}` does not wait for it."
    )
    return 0


def _time_or_version(text: str) -> tuple[int | None, str]:
    run, _, step = text.rpartition("-")
    is_version = run.startswith("r") and step.isascii() and step.isdigit()
    return (None, text) if is_version else (parse_time_ms(text), "")


def _left_out(training: Training, place: Place, at_ms: int | None, *, is_skipping: bool) -> list[PassedOver]:
    """Return what the new run is to leave out. Raises `ConfigRejected` where it would leave out more than it was told
    to."""
    topic, cursor, reader = training.runtime.topics.samples, place.manifest.meta.cursor, training.reader
    if cursor.lake_version >= 0:
        if is_skipping:
            raise ConfigRejected(
                f"{place.version} was learning the lake, and nothing of that can be skipped. Go back to a later "
                "one, or without --skip-until."
            )
        return []
    found = until(reader, topic, cursor, at_ms) if is_skipping else []
    upto = {each.partition: each.upto for each in found}
    gone = [each for each in cut_off(reader, topic, cursor) if upto.get(each.partition, each.after) < each.upto]
    if gone:
        raise ConfigRejected(
            f"{topic!r} does not have the samples any more that come after {place.version}: in partition "
            + ", ".join(f"{each.partition} those after {each.after} up to {each.upto}" for each in gone)
            + ". Go back to a later checkpoint, or leave them out: --skip-until now."
        )
    return found


def _told(training: Training, place: Place, left_out: list[PassedOver]) -> list[str]:
    meta, now = place.manifest.meta, training.standing.run
    behind = training.behind(place)
    rows = sum(each.rows for step in behind for each in step.ranges)
    lines = [
        f"{_line(place)}",
        f"  positions {place.manifest.positions}, written {shown_time(meta.created_ms)}",
    ]
    if place.stored.run == now and left_out:
        lines.append(f"run {now} has learnt {rows:,} samples in {len(behind):,} steps since")
    elif place.stored.run == now:
        lines.append(f"run {now} has learnt {rows:,} samples in {len(behind):,} steps since: they are learnt again")
    else:
        lines.append(f"run {now} goes on now and is left; what came after {place.version} is learnt again")
    lines += [f"left out for good: partition {e.partition}, after {e.after} up to {e.upto} ({e.why})" for e in left_out]
    return [*lines, f"serving takes nothing more of run {now}, and goes on with the new run"]


def _show(training: Training, run: str) -> None:
    standing = training.standing
    on_path = {place.stored.name for place in standing.on_path()}
    places = standing.on_path(run) if run else list(reversed(standing.places))
    if not places:
        chosen(standing, at_ms=None, run=run)
    print(f"run {standing.run} goes on; what it has been at is marked *")
    for place in places:
        print(f"{'*' if place.stored.name in on_path else ' '} {_line(place)}")


def _line(place: Place) -> str:
    meta, figures = place.manifest.meta, place.manifest.metrics
    known = [f"{name} {figures[name]:.4f}" for name in ("log_loss", "auc", "mae") if name in figures]
    rows = f"{int(figures.get('rows', 0)):,} rows"
    where = f", in version {meta.cursor.lake_version} of the lake" if meta.cursor.lake_version >= 0 else ""
    return ", ".join([f"{place.version}: events up to {shown_time(meta.event_ms)}", rows, *known]) + where
