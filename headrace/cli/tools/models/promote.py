"""`headrace model list`, `show` and `promote`: the project's models side by side, and which of them is served."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from headrace.cli.addresses import HOST
from headrace.cli.progress_bar import duration
from headrace.cli.runtime import Runtime, open_runtime
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.decision import Decision
from headrace.contract.project import Project
from headrace.deploy.local.layout import trainer_of
from headrace.deploy.local.readiness import http_get
from headrace.process.awake import awake_s
from headrace.serving.gate.admit import Refused, servable
from headrace.trainer.commit.decisions import home_of, knows_by, promoted, read_decisions, who_decides, write_decision
from headrace.trainer.commit.standing import Standing, behind_records, standing_of

SERVED_S = 5.0
"""Longest wait for serving to answer with what was promoted. It takes a second, and some more for a large snapshot."""
_STALE_SNAPSHOTS = 3
"""A model that has told nothing for so many times `train.snapshot_ms` is taken to have no trainer."""
_SHOWN = ("log_loss", "auc", "auc_item_rate", "calibration", "recent_calibration", "samples", "rows")
"""Figures of a checkpoint that `show` prints first, in this order."""


class Served(msgspec.Struct, frozen=True):
    """What GET /v1/model says."""

    model: str = ""
    version: str = ""
    positions: dict[str, list[int]] = {}


class Models:
    """The project's models as they stand now."""

    def __init__(self, runtime: Runtime) -> None:
        """Read them. Raises `Unavailable`, and `ConfigRejected` as `home_of`."""
        self.runtime, project = runtime, runtime.project
        reader, blobs = runtime.reader(), runtime.blobs()
        self.decisions = read_decisions(reader, runtime.topics, project.name)
        self.home = home_of(project, self.decisions, knows_by(blobs, reader, runtime.topics))
        self.views = {"": self.home} | {name: project.of_variant(name) for name in project.variants}
        self.standings = {n: standing_of(view, reader, runtime.topics, blobs) for n, view in self.views.items()}
        self.decided = msgspec.structs.replace(project, variant=promoted(self.decisions)).model
        self.served = served_by(runtime)
        reader.close()

    def __getitem__(self, name: str) -> Standing:
        return self.standings[name]


def served_by(runtime: Runtime) -> Served | None:
    """Return what the `serve` of this machine says; None where it does not answer, or serves nothing yet."""
    status, body = http_get(f"http://{HOST}:{runtime.port('serving')}/v1/model")
    if status != 200:
        return None
    try:
        return msgspec.json.decode(body, type=Served)
    except msgspec.DecodeError:
        return None


def add_models(actions: Any, add_common: Any) -> None:
    """Add the three actions."""
    all_of = actions.add_parser("list", help="the project's models, and which of them is served")
    show = actions.add_parser("show", help="a variant's figures beside those of the project's own recipe")
    promote = actions.add_parser("promote", help="let a variant be served from now on")
    show.add_argument("variant", metavar="VARIANT", nargs="?", help="a declared one; all of them by default")
    which = promote.add_mutually_exclusive_group(required=True)
    which.add_argument("variant", metavar="VARIANT", nargs="?", help="a declared one")
    which.add_argument("--main", action="store_true", help="the model of the project's own recipe, to go back")
    promote.add_argument("--yes", action="store_true", help="do not ask")
    promote.add_argument("--reason", default="", help="why; it stands in the record")
    promote.add_argument("--force", action="store_true", help="also one whose trainer seems not to run")
    for each in (all_of, show, promote):
        each.add_argument("--json", action="store_true", help="print one JSON object")
        add_common(each)


def main(args: argparse.Namespace) -> int:
    """List, show or promote."""
    args.log_level = "WARNING" if args.log_level == "INFO" else args.log_level
    runtime = open_runtime(args)
    runtime.require_kafka()
    models = Models(runtime)
    if args.action == "promote":
        return _promote(models, args)
    names = list(models.views)
    if args.action == "show" and args.variant:
        runtime.project.of_variant(args.variant)
        names = ["", args.variant]
    if args.json:
        print(msgspec.json.encode(_told(models, names)).decode())
    else:
        print("\n".join(_list_lines(models) if args.action == "list" else side_by_side(models, names)))
    return 0


def _promote(models: Models, args: argparse.Namespace) -> int:
    name = "" if args.main else args.variant
    if name and name == models.home.variant:
        raise ConfigRejected(f"variant {name!r} is the project's own recipe now: `headrace model promote --main`.")
    if name:
        models.runtime.project.of_variant(name)
    standing = models[name]
    if standing.model == models.decided:
        print(f"{standing.model} is the model that is served already; nothing is written")
        return 0
    must, may = list(lacking(models, name)), list(stale(models, name))
    if must or (may and not args.force):
        more = "" if must else " --force promotes it all the same."
        raise ConfigRejected(f"{standing.model} is not promoted: {' '.join([*must, *may])}{more}")
    say = (lambda _: None) if args.json else print
    say("\n".join(side_by_side(models, list(dict.fromkeys([_decided_name(models), name])))))
    for warning in [*may, *_notes(models, name)]:
        say(f"note: {warning}")
    if not args.yes and not _agreed(standing.model):
        say("nothing was promoted")
        return 1
    decision = decide(models.runtime, models.decisions, models.views[name], reason=args.reason)
    now = _await_served(models.runtime, standing.model)
    if args.json:
        print(msgspec.json.encode({"decision": decision, "served": now}).decode())
    elif now is not None and now.model == standing.model:
        print(f"{now.version} of {now.model} is served")
    else:
        print(
            f"{standing.model} is decided for. The `serve` of this machine "
            + (
                f"answers with {now.version} of {now.model} still: `headrace logs serve` tells why"
                if now
                else "is away"
            )
        )
    return 0


def _decided_name(models: Models) -> str:
    """Return under which name the decided model is shown; "" where it is none of the declared ones."""
    return next((name for name, view in models.views.items() if view.model == models.decided), "")


def lacking(models: Models, name: str) -> Iterator[str]:
    """Yield why a model cannot be served, each with the next step."""
    standing, runtime = models[name], models.runtime
    process = trainer_of(name) if name else "train"
    if standing.snapshot is None:
        if standing.learns_lake:
            yield (
                f"it learns the lake still ({standing.figures.get('rows', 0.0):,.0f} rows of its tables so far), and "
                f"publishes when it has learnt it: `headrace logs {process}` shows how far it is."
            )
        elif standing.other_recipe:
            yield (
                f"its newest snapshot, {standing.other_recipe}, is of another recipe or spec than the declared one, "
                f"whose run has published nothing yet: see that `{process}` runs (`headrace status`), and wait until "
                "it has learnt the lake."
            )
        else:
            yield f"it has no snapshot: `headrace start {process}`, and wait until it has learnt the lake."
        return
    try:
        servable(
            *(standing.snapshot.version, standing.snapshot.spec_json, standing.snapshot.recipe_json, runtime.project)
        )
    except Refused as refused:
        yield str(refused)
        return


def stale(models: Models, name: str) -> Iterator[str]:
    """Yield what speaks against a model that could be served."""
    standing, runtime = models[name], models.runtime
    age_ms = runtime.clock.now_ms() - standing.told_ms
    if standing.told_ms and age_ms > _STALE_SNAPSHOTS * runtime.config.train.snapshot_ms:
        process = trainer_of(name) if name else "train"
        yield (
            f"it has published and stored nothing for {duration(age_ms / 1_000)}: `headrace status` tells whether "
            f"{process} runs, `headrace start {process}` starts it."
        )


def _notes(models: Models, name: str) -> Iterator[str]:
    if models.served is None:
        yield "the `serve` of this machine does not answer: whether the model fits its region is not known."
    if name:
        yield (
            f"then move variants[{name!r}] to recipe=, and `headrace stop {trainer_of(name)}` and `headrace restart "
            "train`: the recipe goes on with this very run (docs/models.md)."
        )


def decide(runtime: Runtime, before: Sequence[Decision], view: Project, *, reason: str = "") -> Decision:
    """Write that a model is served from now on, and return the record. Raises `Unavailable` where it is not known to
    be written."""
    # Each has a key of its own, so that compaction keeps them all.
    newest_ms = max((each.created_ms for each in before), default=0)
    decision = Decision(
        model=runtime.project.name,
        what="promote",
        variant=view.variant,
        reason=reason,
        by=who_decides(),
        created_ms=max(runtime.clock.now_ms(), newest_ms + 1),
    )
    write_decision(runtime.producer(), runtime.topics.model, decision)
    return decision


def _await_served(runtime: Runtime, model: str) -> Served | None:
    until = awake_s() + SERVED_S
    while (now := served_by(runtime)) is not None and now.model != model and awake_s() < until:
        time.sleep(0.1)
    return now


def side_by_side(models: Models, names: Sequence[str]) -> list[str]:
    """Return a table of models: one column each, the project's own first."""
    shown = [models[name] for name in names]
    now_ms, told = models.runtime.clock.now_ms(), [each.figures for each in shown]
    rows: list[tuple[str, list[str]]] = [
        ("", [each.model for each in shown]),
        ("served", [_mark(models, each) for each in shown]),
        ("run", [each.run or "-" for each in shown]),
        ("snapshot", [each.snapshot.version if each.snapshot else "-" for each in shown]),
        ("learns", ["the lake" if each.learns_lake else "live" if each.run else "-" for each in shown]),
        ("told", [f"{duration((now_ms - each.told_ms) / 1_000)} ago" if each.told_ms else "-" for each in shown]),
    ]
    known = {figure for each in told for figure in each} - {"held", "provisional"}
    figures = [*(f for f in _SHOWN if f in known), *sorted(known - set(_SHOWN))]
    rows += [(figure, [_number(figure, each) for each in told]) for figure in figures]
    ahead = max(shown, key=lambda each: sum(max(0, p[0]) for p in each.positions.values()))
    rows.append(("behind", [f"{behind_records(ahead, each):,} records of events" for each in shown]))
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(shown))]
    lines = [
        f"{title:<19}" + "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()
        for title, cells in rows
    ]
    return [*lines, "figures are of what each run has learnt, as of its newest checkpoint: not of the same samples."]


def _mark(models: Models, standing: Standing) -> str:
    if models.served is not None and models.served.model == standing.model:
        return f"yes, {models.served.version}"
    return "decided" if models.decided == standing.model else "no"


def _number(figure: str, told: dict[str, float]) -> str:
    if figure not in told:
        return "-"
    marked = " provisional" if told.get("provisional") and figure in ("auc", "log_loss") else ""
    return f"{told[figure]:,.0f}" if figure in ("samples", "rows") else f"{told[figure]:.4f}{marked}"


def _list_lines(models: Models) -> list[str]:
    lines = []
    for standing in models.standings.values():
        what = "the project's own recipe" if standing.model == models.home.model else f"variant {standing.variant}"
        version = standing.snapshot.version if standing.snapshot else "no snapshot"
        state = "learns the lake" if standing.learns_lake else version
        lines.append(f"{standing.model}: {what}, {state}; served: {_mark(models, standing)}")
    if models.decided not in {each.model for each in models.standings.values()}:
        lines.append(
            f"{models.decided}: decided for, and of no declared variant; `headrace model promote` decides anew"
        )
    for each in models.decisions:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(each.created_ms / 1_000))
        of = msgspec.structs.replace(models.runtime.project, variant=each.variant).model
        to = f" to run {each.run}" if each.what == "rollback" else ""
        lines.append(f"  {when} UTC  {each.what} {of}{to} by {each.by}{f': {each.reason}' if each.reason else ''}")
    return lines


def _told(models: Models, names: Sequence[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        standing = models[name]
        found[standing.model] = {
            "variant": standing.variant,
            "run": standing.run,
            "version": standing.snapshot.version if standing.snapshot else "",
            "learns_lake": standing.learns_lake,
            "told_ms": standing.told_ms,
            "positions": standing.positions,
            "figures": standing.figures,
        }
    served = models.served
    return {
        "models": found,
        "home": models.home.model,
        "decided": models.decided,
        "served": {"model": served.model, "version": served.version} if served is not None else None,
        "decisions": models.decisions,
    }


def _agreed(model: str) -> bool:
    if not sys.stdin.isatty():
        print("no terminal to ask; --yes promotes without a question")
        return False
    return input(f"let {model} be served from now on? [y/N] ").strip().lower() in ("y", "yes")
