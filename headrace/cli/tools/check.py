"""Look at a project before anything runs: what it declares, what it takes at a stated rate, and what is wrong.

No servers are needed, and nothing is written. Own functions are called with made-up rows. Exits 1 when something is
wrong; a `note` is worth knowing and stops nothing. `headrace doctor` looks at the machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from headrace.cli.addresses import find_addresses, find_home
from headrace.cli.project_folder import bounded, find_project, look_at
from headrace.cli.project_lines import line_of, own_lines
from headrace.cli.tools.example_request import example_request
from headrace.contract.config import PORTS, Config, port
from headrace.contract.errors import ConfigRejected, HeadraceError
from headrace.contract.privacy import KEY_NAME, Privacy
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.recipe import Recipe, label_of
from headrace.deploy.local.doctor import ephemeral_finding, port_findings
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.supervise import Supervisor
from headrace.trainer.model.held import ordered_tasks
from headrace.trainer.recipes import uncalibrated
from headrace.trainer.validation.windows import CELL_MS_MIN, CELLS

_LONG_WINDOW_MS = 60_000
"""A task of this window or longer is 1.1 times too high while counters fill, one of 10 minutes 7 times."""
RATE, RATE_MAX = 500.0, 10_000_000.0
FEEDBACK_SHARE = 0.1
"""Feedback of each type by impressions, where nobody knows better."""
DAY_S = 86_400
PUNCTUATION_BYTES = 13
"""Of one record of a gateway's promise in a file of the archive."""
SLOW_S = 3.0
"""Reading a project takes less."""
NAME_WIDTH = 14
"""Least signs of a column of names."""


class Report(msgspec.Struct):
    """What was found; `wrong` stops the project, `notes` do not."""

    project: str = ""
    folder: str = ""
    declares: dict[str, Any] = {}
    takes: dict[str, Any] = {}
    ask: str = ""
    """Command that asks for scores."""
    wrong: list[str] = []
    notes: list[str] = []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    parser.add_argument("folder", metavar="PROJECT", nargs="?", help="the project's folder (HEADRACE_PROJECT)")
    parser.add_argument("--rate", type=float, default=RATE, help="impressions a second to reckon with (%(default)g)")
    parser.add_argument("--home", metavar="DIR", help="local state (HEADRACE_HOME; .headrace)")
    parser.add_argument("--port-base", type=int, metavar="N", help="moves all ports together (PORT_BASE)")
    parser.add_argument("--json", action="store_true", help="project, declares, takes, wrong, notes as JSON")


def main(args: argparse.Namespace) -> int:
    """Look, print, and return 1 when something is wrong."""
    report = examine(args)
    if args.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
    else:
        print("\n".join(lines_of(report)))
    return 1 if report.wrong else 0


def examine(args: argparse.Namespace) -> Report:
    """Return what was found. It raises nothing that a user can cause."""
    report = Report()
    try:
        if not 0 < args.rate <= RATE_MAX:
            raise ConfigRejected(
                f"--rate {args.rate:g}: impressions a second are wanted, above 0 and at most {RATE_MAX:,.0f}."
            )
        folder = Path(args.folder).absolute() if args.folder else find_project(os.environ.get("HEADRACE_PROJECT", ""))
    except ConfigRejected as error:
        report.wrong.append(str(error))
        return report
    base, wrong, notes = _ports(args)
    report = examine_project(folder, args.rate, port("serving", base))
    report.wrong += wrong
    report.notes += notes
    return report


def examine_project(folder: Path, rate: float = RATE, serving: int = PORTS["serving"]) -> Report:
    """Return what was found of a project alone, whatever runs on this machine. `serving`: port that is asked."""
    report, begun_s = Report(folder=str(folder)), time.perf_counter()
    config, project, wrong = look_at(folder)
    took_s = time.perf_counter() - begun_s
    report.wrong += bounded(wrong)
    if took_s > SLOW_S:
        report.notes.append(
            f"reading the project's Python file took {took_s:.1f} s, and every stage and verb reads it: take out what "
            "waits, or loads what it does not need."
        )
    if config is None or project is None or wrong:
        return report
    project = project.checked()
    report.project, report.declares = project.name, _declares(project, config)
    report.wrong += cannot_run(config, project, folder)
    if not report.wrong:
        report.takes = _takes(project, config, rate)
        report.wrong += _too_much(project, config, rate)
        report.notes += _worth_knowing(project)
        report.declares["traffic"], trouble = _traffic(project, folder)
        report.notes += [f"`headrace traffic`: {trouble}"] if trouble else []
        report.ask = example_request(project, serving)
    return report


def cannot_run(config: Config, project: Project, folder: Path) -> Iterator[str]:
    """Give what is wrong with a project whose declarations are sound: its key, its own functions, its settings."""
    file = folder / config.module
    try:
        Privacy(project, os.environ.get(KEY_NAME, ""))
    except ConfigRejected as error:
        line = line_of(file, config.object, error.at, "")
        yield f"{file}, line {line}: {error} For a try: export {KEY_NAME}=$(openssl rand -hex 16)"
    yield from _own_functions(project, config, file)
    yield from _slices(project, config, folder)


def lines_of(report: Report) -> list[str]:
    """Return the report for people."""
    lines = [f"project {report.project or '-'} in {report.folder or '-'}"]
    for title, found in (*report.declares.items(), *report.takes.items()):
        if isinstance(found, dict):
            width = max(NAME_WIDTH, *(len(name) + 2 for name in found))
            lines += [title, *(f"  {name:<{width}}{text}" for name, text in found.items())]
        else:
            lines.append(f"{title:<16}{found}")
    lines += [f"note: {text}" for text in report.notes]
    lines += [f"wrong: {text}" for text in report.wrong]
    if report.wrong:
        return [*lines, f"{len(report.wrong)} wrong"]
    return [*lines, f"all is well: headrace up --project {shlex.quote(report.folder)}", f"then ask: {report.ask}"]


def _declares(project: Project, config: Config) -> dict[str, Any]:
    shown = project.impression
    events = {"impression": f"tag {shown.tag}, key {shown.key}; {_fields(shown.fields)}"}
    events |= {each.name: f"tag {each.tag}; {_fields(each.fields)}" for each in project.feedback}
    kinds: tuple[ImpressionType | FeedbackType, ...] = (shown, *project.feedback)
    private = {
        kind.tag: ", ".join(f"{name}: {how}" for name, how in kind.private.items()) for kind in kinds if kind.private
    }
    features = project.features
    return {
        "events": events,
        "tasks": {task.name: _task(task) for task in project.tasks} or "none: nothing is learnt",
        "features": f"{len(features.features)}: "
        + ", ".join(f"{type(each).__name__}({label_of(each)})" for each in features.features)
        + f"; {features.slots} slots and {features.numerics} numbers a row",
        "counters": {
            each.name: f"over {', '.join(each.key_fields)} for {_time(each.window_ms)}: {', '.join(each.counts)}"
            for each in features.counters
        }
        or "none",
        "private": private or "none",
        "crawl": {each.name: f"{each.kind}, joins {each.joins}; {', '.join(each.fields)}" for each in project.crawls}
        or "none",
        "recipe": _learns(project.recipe),
        **({"variants": {name: _learns(one) for name, one in project.variants.items()}} if project.variants else {}),
        "settings": ", ".join(_changed(config)) or "all default",
    }


def _learns(recipe: Recipe) -> str:
    return f"{recipe.model}, learns {', '.join(recipe.heads)}"


def _takes(project: Project, config: Config, rate: float) -> dict[str, Any]:
    # Here, since a project that is wrong needs neither Arrow's writers nor compiled kernels.
    from headrace.cli.tools.project_try import measure
    from headrace.serving.model.shared_region import region_bytes

    per_record = rate * config.ingest.batch_ms / 1_000 / config.log.partitions
    row = measure(project, max(1, min(config.ingest.batch_rows, round(per_record))))
    samples = rate * sum(1 + FEEDBACK_SHARE * (t.policy == "eager" or t.correct_ms > 0) for t in project.tasks)
    events = rate * (row.event + FEEDBACK_SHARE * len(project.feedback) * row.feedback)
    waiting = rate * _longest_ms(project) / 1_000
    in_memory = min(waiting * row.waiting, config.log.partitions * config.join.payload_bytes)
    serving = region_bytes(project.row_dim, config.serve.rows_max)
    grown = serving + region_bytes(project.row_dim, 2 * config.serve.rows_max)
    return {
        f"at {rate:g} impressions/s, {FEEDBACK_SHARE:.0%} of them answered by each feedback": {
            "events": f"{_size(events)}/s to Kafka ({row.event:.0f} bytes an impression)",
            "samples": f"{samples:,.0f}/s, {_size(samples * row.sample)}/s to Kafka ({row.sample:.0f} bytes each)",
            "lake": f"{_size(samples * row.stored * DAY_S)} a day before compaction ({row.stored:.0f} bytes a sample)",
            "archive": _archive(config, rate * (1 + FEEDBACK_SHARE * len(project.feedback)) * row.archived),
            "join": f"{waiting:,.0f} impressions wait for {_time(_longest_ms(project))}, {_size(in_memory)} of memory",
            "serving": f"{_size(serving)} for {config.serve.rows_max:,} rows in two copies, taken as rows come; more "
            f"rows grow beside it: {_size(grown)} together for twice as many",
        },
        "first figure, after the first sample": {
            task.name: f"provisional within {_time(_provisional_ms(task))}, settled within {_time(_settled_ms(task))}"
            for task in project.tasks
        },
    }


def _traffic(project: Project, folder: Path) -> tuple[str, str]:
    from headrace.cli.tools.project_try import try_traffic

    return try_traffic(project, folder)


def _archive(config: Config, per_second: float) -> str:
    """Return what the archive of events takes, given the bytes of events a second."""
    if not config.archive.events:
        return "off (archive.events = false): what the topic `events` forgets cannot be joined again"
    # One gateway, at rest too.
    per_second += PUNCTUATION_BYTES * config.log.partitions * 1_000 / config.ingest.punctuate_ms
    day, kept_ms = per_second * DAY_S, config.archive.retention_ms
    kept = f"{_size(day * kept_ms / 86_400_000)} in {kept_ms / 86_400_000:.3g} days" if kept_ms else "kept for ever"
    return f"{_size(day)} a day of events as they came, {kept}"


def _longest_ms(project: Project) -> int:
    return max((task.window_ms + task.correct_ms for task in project.tasks), default=0)


def _provisional_ms(task: Task) -> int:
    return max(task.window_ms, CELL_MS_MIN) + task.window_ms


def _settled_ms(task: Task) -> int:
    return CELLS * max(task.window_ms, CELL_MS_MIN) + task.window_ms + task.correct_ms


def _own_functions(project: Project, config: Config, file: Path) -> Iterator[str]:
    from headrace.cli.tools.project_try import try_functions

    for at, error in try_functions(project):
        line = line_of(file, config.object, at, "")
        own = list(own_lines(error.__cause__, file.parent)) if error.__cause__ else []
        yield "\n    ".join([f"{file}, line {line}: {error}", *own])
    for at, recipe in (("recipe", project.recipe), *((f"variants[{n!r}]", r) for n, r in project.variants.items())):
        if recipe.module:
            yield from _own_module(msgspec.structs.replace(project, recipe=recipe), config, file, at)


def _own_module(project: Project, config: Config, file: Path, at: str) -> Iterator[str]:
    # torch takes seconds to load, and only a module of the user's own needs it here.
    from headrace.trainer.model.layers.user_module import module_shapes

    what = f"{file}, line {line_of(file, config.object, at, '')}: model function {project.recipe.module!r}"
    try:
        module_shapes(project.recipe, project.features)
    except HeadraceError as error:
        yield f"{what}: {error}"
    except Exception as error:
        own = list(own_lines(error, file.parent))
        yield "\n    ".join([f"{what} raised {type(error).__name__}: {error}. Correct it:", *own])


def _slices(project: Project, config: Config, folder: Path) -> Iterator[str]:
    unknown = [name for name in config.train.slices if name not in project.impression.fields]
    if unknown:
        yield (
            f"{folder / 'headrace.toml'}: train.slices names {unknown[0]!r}, which is no field of the impression: "
            f"{', '.join(project.impression.fields)}."
        )


def _too_much(project: Project, config: Config, rate: float) -> Iterator[str]:
    waiting, most = rate * _longest_ms(project) / 1_000 / config.log.partitions, config.join.pending_max
    if waiting > most:
        yield (
            f"at {rate:g} impressions/s {waiting:,.0f} wait in each of {config.log.partitions} partitions for the "
            f"longest task's window of {_time(_longest_ms(project))}, and join.pending_max allows {most:,}: "
            "raise it or log.partitions in headrace.toml, or shorten window_ms or correct_ms of the task."
        )


def _worth_knowing(project: Project) -> Iterator[str]:
    if not project.tasks:
        yield "no task is declared: events are stored, and nothing is learnt."
    unused = {each.name for each in project.feedback} - {task.feedback for task in project.tasks}
    unused -= {entry.event for counter in project.features.counters for entry in counter.entries()}
    for name in sorted(unused):
        yield f"feedback {name!r} is in no task and no counter: it is stored in `events` alone."
    if not project.features.features:
        yield "no feature is declared: every score is the same."
    if project.tasks and (lacks := uncalibrated(project.recipe, project.tasks)):
        fields = ", ".join(f"{name}={value!r}" for name, value in lacks.items())
        yield (
            f"recipe: a live model may say far more or less than comes without {fields}. Set them, or take a function "
            "of headrace.trainer.recipes, which does (docs/models.md, Calibration)."
        )
    has_counters = any(name.startswith("counter.") for each in project.features.features for name in each.inputs())
    ordered = ordered_tasks(project.recipe, project.tasks)
    for task in project.tasks:
        if has_counters and task.name not in ordered and task.policy == "window" and task.window_ms >= _LONG_WINDOW_MS:
            yield (
                f"task {task.name!r}: positives come at once and negatives {task.window_ms / 1000:g} s later. While "
                "counters still fill, a model with counters as features takes high counts for positives and says far "
                "too much. ordered_from_ms=1 in the recipe lets a positive wait for the negatives of its time, with "
                "provisional=True it is felt at once. Where all tasks are policy='eager', each impression has a "
                "negative at once, and nothing waits (docs/models.md, Calibration)."
            )
        is_felt = project.recipe.provisional
        if task.name in ordered and (task.window_ms >= _LONG_WINDOW_MS or not is_felt):
            felt = "Until then it is felt through its ids alone. " if is_felt else ""
            yield (
                f"task {task.name!r} is learnt in the order of impressions: a positive is learnt when the negatives of "
                f"its time are, up to {_time(task.window_ms)} after it came. {felt}A shorter window is learnt sooner; "
                "policy='eager' at once, with a negative for each impression that its positive takes back "
                "(docs/models.md, Calibration)."
            )


def _ports(args: argparse.Namespace) -> tuple[int | None, list[str], list[str]]:
    """Return the PORT_BASE, None for the usual ports; what is wrong with its ports; what is worth knowing of them."""
    try:
        home = find_home(args.home)
        saved = Layout.saved(home)
        if saved is not None and Supervisor(saved).running():
            return saved.port_base, [], []
        base = find_addresses(args, home / "no-earlier-stack").port_base
    except ConfigRejected as error:
        return None, [str(error)], []
    wrong = [f"{each.what}: {each.found}; {each.remedy}." for each in port_findings(base) if each.level == "trouble"]
    near = ephemeral_finding(base)
    return base, wrong, [f"{near.what}: {near.found}; {near.remedy}."] if near.level != "ok" else []


def _fields(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in fields.items()) or "no fields of its own"


def _task(task: Task) -> str:
    text = f"1 where {task.feedback} comes within {_time(task.window_ms)}"
    text += ", learnt at once as 0 (eager)" if task.policy == "eager" else ""
    return text + (f", corrected up to {_time(task.correct_ms)} later" if task.correct_ms else "")


def _changed(config: Config) -> Iterator[str]:
    plain, default = msgspec.to_builtins(config), msgspec.to_builtins(Config())
    for name, value in plain.items():
        if isinstance(value, dict):
            yield from (f"{name}.{key} = {one!r}" for key, one in value.items() if one != default[name][key])
        elif value != default[name]:
            yield f"{name} = {value!r}"


def _time(ms: float) -> str:
    for unit, size in (("h", 3_600_000), ("min", 60_000), ("s", 1_000)):
        if ms >= size:
            return f"{ms / size:.3g} {unit}"
    return f"{ms:.0f} ms"


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
