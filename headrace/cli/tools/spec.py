"""Put a changed feature spec, windows or label policy in force while events flow, and show what is.

  show      what is in force, and what the project on disk would change
  apply     write the project's rules into every partition of `events`: they are in force from there on
  history   every change so far, and the offsets from which it is in force

What impressions are read by is in the log, not in the project's file: an edited file does nothing until `apply`.
Applying the same rules again does nothing; after a crash it writes what is missing. What may not change (a type, a
counter's meaning, the partition key) is refused with its name, and nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import msgspec

from headrace.cli.rules_topic import rules_topic
from headrace.cli.runtime import Runtime, add_common, open_runtime
from headrace.contract.errors import ConfigRejected
from headrace.contract.project import Project
from headrace.contract.rules import Change, Rules, differences, rules_of
from headrace.contract.spec import Custom
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.stack import restart
from headrace.deploy.local.supervise import Supervisor
from headrace.stream.rule_changes import Applied, History, apply, check_follows, read_history


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    add_common(parser)
    parser.add_argument("what", choices=["show", "apply", "history"], nargs="?", default="show")
    parser.add_argument("--dry-run", action="store_true", help="apply: say what would change, and write nothing")
    parser.add_argument("--restart", action="store_true", help="apply: restart the stages here that it concerns")
    parser.add_argument("--json", action="store_true", help="print one JSON object for programs")
    parser.set_defaults(log_level="WARNING")


def main(args: argparse.Namespace) -> int:
    """Show or change; 0 when done, and when there was nothing to do."""
    runtime = open_runtime(args)
    runtime.require_kafka()
    runtime.open_topics()
    if args.what == "apply":
        said, text = _apply(runtime, dry=args.dry_run)
        if args.restart and said["applied"]:
            text += "\n" + "\n".join(_restarted(runtime, said["restart"]))
    else:
        with rules_topic(runtime.brokers, runtime.topics) as writer:
            history = read_history(writer)
        said, text = _history(history) if args.what == "history" else _show(runtime, history)
    print(msgspec.json.encode(said).decode() if args.json else text)
    sys.stdout.flush()
    return 0


def _apply(runtime: Runtime, *, dry: bool) -> tuple[dict[str, Any], str]:
    partitions = runtime.config.log.partitions
    with rules_topic(runtime.brokers, runtime.topics) as writer, closing(runtime.producer()) as producer:
        before = read_history(writer).newest
        applied = apply(
            writer,
            producer,
            runtime.topics.events,
            partitions,
            runtime.project,
            now_ms=runtime.clock.now_ms(),
            dry=dry,
            stored=runtime.stored_rules,
        )
    lines = differences(before.rules, rules_of(runtime.project)) if before is not None else []
    stages = concerned(before.rules if before is not None else None, runtime.project)
    said = {
        "applied": applied.is_new and not dry,
        "repaired": applied.is_repaired and not dry,
        "digest": rules_of(runtime.project).digest(),
        "number": _number(applied),
        "changes": lines,
        "restart": stages,
    }
    return said, "\n".join([*_repaired(applied, before, dry=dry), *_outcome(applied, lines, stages, dry=dry)])


def _number(applied: Applied) -> int:
    newest = applied.history.newest
    return newest.number if newest is not None else 0


def _repaired(applied: Applied, before: Change | None, *, dry: bool) -> list[str]:
    if not applied.is_repaired or before is None:
        return []
    done = "is written" if dry else "was written"
    return [f"change {before.number} was begun and not finished: it {done} into every partition again."]


def _outcome(applied: Applied, lines: list[str], stages: list[str], *, dry: bool) -> list[str]:
    newest = applied.history.newest
    if not applied.is_new and newest is not None:
        return [f"nothing to do: rules {newest.digest} are in force (change {newest.number})."]
    told = [f"  {line}" for line in lines] or ["  everything: these are the first rules"]
    if dry or newest is None:
        return ["would change:", *told, "nothing was written."]
    offsets = applied.history.written.get(newest.number, {})
    where = _offsets_text(offsets) or "the beginning of every partition"
    return [
        f"change {newest.number}, rules {newest.digest}:",
        *told,
        f"in force from these offsets of events: {where}." if offsets else f"in force from {where}.",
        "What waits is labelled by the rules it was read under. Restart, in this order, what read the old ones:",
        f"  headrace restart {' '.join(stages)}",
        "`--restart` does so. A new model learns the lake while the old one is served, until it is done.",
    ]


def concerned(before: Rules | None, project: Project) -> list[str]:
    """Return the stages that a change concerns, in the order in which they are restarted.

    `ingest` takes new fields; `stream` and `aggregate` load own functions that are new; `crawl` fetches new sources;
    `serve` asks for what new features read, before `train` publishes a model of them.
    """
    after = rules_of(project)
    if before is None:
        return []
    old, new = before.features, after.features
    customs = [{f for f in spec.features if isinstance(f, Custom)} for spec in (old, new)]
    has_new_functions = not customs[1] <= customs[0]
    found = {
        "ingest": (before.fields, before.feedback) != (after.fields, after.feedback),
        "stream": has_new_functions,
        "aggregate": has_new_functions,
        "crawl": before.crawls != after.crawls,
        "serve": has_new_functions or before.crawls != after.crawls or _reads_more(before, project),
        "train": True,
    }
    return [stage for stage, is_concerned in found.items() if is_concerned]


def _reads_more(before: Rules, project: Project) -> bool:
    """Say whether serving that was started under `before` lacks what requests bring now, or would refuse a model of the
    new features. What windows, counters and features mean it takes from the model, and needs no restart for it."""
    if project.impression.fields.keys() - before.fields.keys():
        return True
    served = msgspec.structs.replace(before.over(project), features=project.features)
    return any(fault.at.startswith("features") for fault in served.faults())


def _restarted(runtime: Runtime, stages: list[str]) -> list[str]:
    layout = Layout.saved(runtime.home)
    here = {p.name for p in Supervisor(layout).processes()} if layout is not None else set()
    if layout is None or not here:
        return [f"no stack runs in {runtime.home}: restart {', '.join(stages)} where they run."]
    said: list[str] = []
    for stage in (each for each in stages if each in here):
        restart(layout, [stage], said.append)
    return said


def _show(runtime: Runtime, history: History) -> tuple[dict[str, Any], str]:
    declared, newest = rules_of(runtime.project), history.newest
    if newest is None:
        said: dict[str, Any] = {"number": 0, "digest": "", "declared": declared.digest(), "differences": []}
        return said, f"the log holds no rules yet: the first start puts the project's in force ({declared.digest()})."
    lines = differences(newest.rules, declared)
    said = {
        "number": newest.number,
        "digest": newest.digest,
        "spec": newest.rules.features.digest(),
        "declared": declared.digest(),
        "whole": history.is_whole,
        "differences": lines,
        "rules": newest.rules,
    }
    text = [
        f"in force: change {newest.number}, rules {newest.digest}, feature spec {newest.rules.features.digest()}, "
        f"applied {_time(newest)}",
        _summary(newest.rules),
    ]
    if not history.is_whole:
        text.append("the change may be missing in some partition: `headrace spec apply` finishes it.")
    if not lines:
        return said, "\n".join([*text, "the project on disk declares the same."])
    text += [f"the project on disk ({declared.digest()}) differs:", *(f"  {line}" for line in lines)]
    try:
        check_follows(history, runtime.project)
    except ConfigRejected as error:
        said["refused"] = str(error)
        return said, "\n".join([*text, f"`headrace spec apply` would refuse it: {error}"])
    return said, "\n".join([*text, "`headrace spec apply` puts it in force."])


def _history(history: History) -> tuple[dict[str, Any], str]:
    said = [
        {
            "number": change.number,
            "digest": change.digest,
            "spec": change.rules.features.digest(),
            "applied_ms": change.applied_ms,
            "whole": change.number == 1 or change.number in history.written,
            "offsets": history.written.get(change.number, {}),
        }
        for change in history.changes
    ]
    lines: list[str] = []
    before: Rules | None = None
    for change in history.changes:
        offsets = history.written.get(change.number, {})
        where = _offsets_text(offsets)
        where = "the beginning" if change.number == 1 else where or "not known to lie in every partition: apply again"
        lines.append(f"{change.number:>4}  {change.digest}  {_time(change)}  from {where}")
        lines += [f"        {line}" for line in (differences(before, change.rules) if before is not None else [])]
        before = change.rules
    return {"changes": said}, "\n".join(lines) or "the log holds no rules yet."


def _offsets_text(offsets: dict[str, int]) -> str:
    return ", ".join(f"{partition}: {offset}" for partition, offset in sorted(offsets.items(), key=_partition))


def _partition(item: tuple[str, int]) -> int:
    return int(item[0])


def _summary(rules: Rules) -> str:
    tasks = ", ".join(f"{t.name} ({t.policy}, {t.window_ms} ms)" for t in rules.tasks)
    features, counters = len(rules.features.features), len(rules.features.counters)
    return f"  {len(rules.fields)} fields, {features} features, {counters} counters; tasks: {tasks}"


def _time(change: Change) -> str:
    return datetime.fromtimestamp(change.applied_ms / 1000, UTC).isoformat(timespec="seconds")
