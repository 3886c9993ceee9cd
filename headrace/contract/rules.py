"""The rules under which events are read: fields, feedback, tasks and windows, features. A change of them is a record.

The `rules` topic lists the changes, number 1, 2, 3 ...: number 1 is in force from the beginning of every partition,
each later one is also written into every partition of `events` (header `kind: spec`) and in force there from that
record's offset. A partition ignores a number that is not above the one it reads by, so writing one again is harmless.

| what a change may do | what it may not (`check_growth`) |
|---|---|
| features: anything | another partition key |
| counters: add, drop | another definition under a name: give it a new name |
| fields, crawled columns: add, drop | another type under a name |
| tasks: add, drop, other window, policy, weight | another feedback under a name; more than 8 tasks, ever |
| feedback types: add, drop | |
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from headrace.contract.crawl import Crawl, Extract, ExtractType
from headrace.contract.errors import ConfigRejected, EventRejected, InvariantBroken
from headrace.contract.formats.json_record import decode_json
from headrace.contract.functions import function_of
from headrace.contract.project import LANES_MAX, FeedbackType, FieldType, Project, Task
from headrace.contract.spec import Counter, Custom, FeatureSpec


class FeedbackRule(msgspec.Struct, frozen=True):
    """One type of feedback: its raw fields."""

    name: str
    fields: dict[str, FieldType] = {}


class CrawlRule(msgspec.Struct, frozen=True):
    """One crawled source: the field that it joins, and what it brings."""

    name: str
    joins: str
    fields: dict[str, ExtractType] = {}


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """All declarations that a sample depends on."""

    key: str
    fields: dict[str, FieldType]
    """Of the impression."""
    feedback: tuple[FeedbackRule, ...]
    tasks: tuple[Task, ...]
    features: FeatureSpec
    crawls: tuple[CrawlRule, ...] = ()

    def digest(self) -> str:
        """Return 16 hex digits over these rules' JSON, in the order in which they are declared."""
        return _digest(msgspec.json.encode(self))

    def over(self, project: Project) -> Project:
        """Return `project` with these rules in place of its own."""
        tags = {f.name: f for f in project.feedback}
        return msgspec.structs.replace(
            project,
            impression=msgspec.structs.replace(project.impression, key=self.key, fields=dict(self.fields)),
            feedback=tuple(
                msgspec.structs.replace(tags[rule.name], fields=dict(rule.fields))
                if rule.name in tags
                else FeedbackType(name=rule.name, tag=rule.name, fields=dict(rule.fields))
                for rule in self.feedback
            ),
            tasks=self.tasks,
            features=self.features,
            crawls=tuple(map(_crawl, self.crawls)),
        )


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One change."""

    number: int
    rules: Rules
    raw: bytes
    """The rules' JSON as it was written: a later build, whose declarations have more fields, passes it on unchanged."""
    digest: str
    """Of `raw`."""
    functions: dict[str, str] = {}
    """User functions by "name@version", and a digest of the code of each, "" where there is no source."""
    applied_ms: int = 0


class _Wire(msgspec.Struct, frozen=True, kw_only=True, tag="change"):
    """A change as it lies in `rules` and in every partition of `events`."""

    number: int
    rules: msgspec.Raw
    digest: str
    functions: dict[str, str] = {}
    applied_ms: int = 0


class _Ours(msgspec.Struct, frozen=True, kw_only=True):
    """What every record of `rules` is, whichever build wrote it."""

    type: str
    number: int


class Written(msgspec.Struct, frozen=True, kw_only=True, tag="written"):
    """In `rules`: change `number` lies in every partition of `events`, at these offsets or before."""

    number: int
    offsets: dict[str, int] = {}


def rules_of(project: Project) -> Rules:
    """Return the rules that a project declares."""
    return Rules(
        key=project.impression.key,
        fields=dict(project.impression.fields),
        feedback=tuple(FeedbackRule(f.name, dict(f.fields)) for f in project.feedback),
        tasks=project.tasks,
        features=project.features,
        crawls=tuple(CrawlRule(c.name, c.joins, {n: e.type for n, e in c.fields.items()}) for c in project.crawls),
    )


def change_of(project: Project, number: int, *, now_ms: int) -> Change:
    """Return a change to the rules that `project` declares."""
    rules = rules_of(project)
    codes = {f"{c.function}@{c.version}": code_digest(c.function, c.version) for c in _customs(rules.features)}
    raw = msgspec.json.encode(rules)
    return Change(number=number, rules=rules, raw=raw, digest=_digest(raw), functions=codes, applied_ms=now_ms)


def encode_change(change: Change | Written) -> bytes:
    """Return the record's value: compact JSON."""
    if isinstance(change, Written):
        return msgspec.json.encode(change)
    wire = _Wire(
        number=change.number,
        rules=msgspec.Raw(change.raw),
        digest=change.digest,
        functions=change.functions,
        applied_ms=change.applied_ms,
    )
    return msgspec.json.encode(wire)


def decode_change(data: bytes, *, where: str) -> Change:
    """Read one change.

    Raises `EventRejected` (`foreign`) for a value that is none of ours: skip it. Raises `InvariantBroken` when this
    build can't read it, or its rules are not those of its digest: going on under the old rules would not be what the
    log says.
    """
    found = decode_entry(data, where=where)
    if not isinstance(found, Change):
        raise InvariantBroken(f"{where} is no change of rules.")
    return found


def decode_entry(data: bytes, *, where: str) -> Change | Written:
    """Read one record of the `rules` topic; see `decode_change`."""
    try:
        decode_json(data, _Ours)
    except msgspec.DecodeError as error:
        raise EventRejected("foreign", f"{where} is neither a change of rules nor a note of one") from error
    try:
        found: _Wire | Written = decode_json(data, _Wire | Written)
        if isinstance(found, Written):
            return found
        raw = bytes(found.rules)
        rules: Rules = decode_json(raw, Rules)
    except msgspec.MsgspecError as error:
        raise InvariantBroken(
            f"{where} holds a change of rules that this build can't read ({error}). Run the build that wrote it."
        ) from error
    if _digest(raw) != found.digest:
        raise InvariantBroken(
            f"{where} holds change {found.number} of digest {found.digest}, and its rules have {_digest(raw)}: it is "
            "damaged. Keep the topic, and compare it with `headrace spec history`."
        )
    return Change(
        number=found.number,
        rules=rules,
        raw=raw,
        digest=found.digest,
        functions=found.functions,
        applied_ms=found.applied_ms,
    )


def check_code(change: Change) -> None:
    """Raise `ConfigRejected` when a user's function is not declared here, or has other code than at the change."""
    for custom in _customs(change.rules.features):
        applied = change.functions.get(f"{custom.function}@{custom.version}", "")
        here = code_digest(custom.function, custom.version)
        if applied and here and applied != here:
            raise ConfigRejected(
                f"feature function {custom.function!r} version {custom.version} has other code here ({here}) than when "
                f"change {change.number} was applied ({applied}). What a version returns never changes: put the old "
                "code back and give the new one a new version."
            )


def check_growth(before: Rules, after: Rules, lanes: Sequence[tuple[str, str]]) -> None:
    """Raise `ConfigRejected` when `after` may not follow `before`; `lanes` are all (task, feedback) before it."""
    if after.key != before.key:
        raise ConfigRejected(
            f"the partition key would change from {before.key!r} to {after.key!r}: that needs a new log.generation."
        )
    _check_types("the impression", before.fields, after.fields)
    for rule in after.feedback:
        old = next((f.fields for f in before.feedback if f.name == rule.name), {})
        _check_types(rule.name, old, rule.fields)
    for crawl in after.crawls:
        known = next((c.fields for c in before.crawls if c.name == crawl.name), {})
        _check_types(f"crawl {crawl.name}", known, crawl.fields)
    counters = {c.name: c for c in before.features.counters}
    for counter in after.features.counters:
        if (was := counters.get(counter.name, counter)) != counter:
            raise ConfigRejected(
                f"counter {counter.name!r} would mean something else under its old name ({_step(was, counter)}), and "
                "its columns in the lake too: give the changed counter a new name."
            )
    answers = {name: feedback for name, feedback in lanes if feedback}
    for task in after.tasks:
        if answers.get(task.name, task.feedback) != task.feedback:
            raise ConfigRejected(
                f"task {task.name!r} would be answered by {task.feedback!r} and not by {answers[task.name]!r} any "
                "more: give the new task a new name."
            )
    wanted = set(lanes_of(after.tasks)) - set(lanes)
    if len(lanes) + len(wanted) > LANES_MAX:
        raise ConfigRejected(
            f"{len(lanes)} lanes were used so far and {len(wanted)} would be added; a generation has {LANES_MAX} (a "
            "task takes one, a task with correct_ms two). Begin a new log.generation."
        )


def lanes_of(tasks: Sequence[Task]) -> list[tuple[str, str]]:
    """Return the lanes that tasks take: (task, feedback) of each, then (task, "") of each that corrects."""
    return [*((t.name, t.feedback) for t in tasks), *((t.name, "") for t in tasks if t.correct_ms)]


def differences(before: Rules, after: Rules) -> list[str]:
    """Return what changes, a line each, for people, in the words of the project's file."""
    lines = _named_changes("field", before.fields, after.fields)
    lines += _named_changes("feedback", _by_name(before.feedback), _by_name(after.feedback))
    lines += _named_changes("task", _by_name(before.tasks), _by_name(after.tasks))
    lines += _named_changes("counter", _by_name(before.features.counters), _by_name(after.features.counters))
    lines += _named_changes("crawl", _by_name(before.crawls), _by_name(after.crawls))
    old, new = ([_text(f) for f in rules.features.features] for rules in (before, after))
    lines += [f"- feature {text}" for text in old if text not in new]
    lines += [f"+ feature {text}" for text in new if text not in old]
    if old != new and sorted(old) == sorted(new):
        lines.append("~ features are in another order")
    return lines


def code_digest(name: str, version: int) -> str:
    """Return 16 hex digits over a function's code without comments, layout and docstring; "" without its source.

    Raises `ConfigRejected` when no such function is declared.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function_of(name, version))))
    except (OSError, TypeError, SyntaxError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def _customs(spec: FeatureSpec) -> Iterator[Custom]:
    return (feature for feature in spec.features if isinstance(feature, Custom))


def _crawl(rule: CrawlRule) -> Crawl:
    """Return a source as far as the join knows it; where its values come from, only the crawler knows."""
    fields = {name: Extract(at="url", type=kind) for name, kind in rule.fields.items()}
    return Crawl(name=rule.name, kind="json", joins=rule.joins, key=Extract(at="url"), fields=fields)


def _check_types(what: str, before: Mapping[str, str], after: Mapping[str, str]) -> None:
    for name, kind in after.items():
        if before.get(name, kind) != kind:
            raise ConfigRejected(
                f"field {name!r} of {what} would change from {before[name]} to {kind}; a column never changes its "
                "type: give the new one another name."
            )


def _by_name(declared: Sequence[FeedbackRule | Task | CrawlRule | Counter]) -> dict[str, Any]:
    return {one.name: one for one in declared}


def _named_changes(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    lines = [f"- {what} {name}" for name in before if name not in after]
    lines += [f"+ {what} {name}: {_text(one)}" for name, one in after.items() if name not in before]
    both = [name for name in after if name in before and before[name] != after[name]]
    return lines + [f"~ {what} {name}: {_step(before[name], after[name])}" for name in both]


def _step(before: Any, after: Any) -> str:
    """Return which fields of a declaration change, and how."""
    if not isinstance(after, msgspec.Struct):
        return f"{before} -> {after}"
    names = [field.name for field in msgspec.structs.fields(after)]
    pairs = [(name, getattr(before, name), getattr(after, name)) for name in names]
    return ", ".join(f"{name} {old!r} -> {new!r}" for name, old, new in pairs if old != new)


def _text(one: Any) -> str:
    """Return a declaration as it is written in a project's file, without values that are the default."""
    if not isinstance(one, msgspec.Struct):
        return str(one)
    values = [(field.name, getattr(one, field.name), field.default) for field in msgspec.structs.fields(one)]
    inner = ", ".join(f"{name}={_value(value)}" for name, value, default in values if value != default)
    return f"{type(one).__name__}({inner})"


def _value(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], msgspec.Struct):
        return f"({', '.join(map(_text, value))})"
    return repr(value)
