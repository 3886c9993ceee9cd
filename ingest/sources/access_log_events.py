"""Lines of access logs to declared events, by the user's mapping. Pure.

A chunk of lines becomes one message a declared event, each with the chunk's id; the gateway acks them together. The
event's id derives from the chunk, its tag and its place among its kind, as for any event without one; an `event_id`
that the Kafka source gave the line, or that a route takes from a request id, stays.

| line | becomes |
|---|---|
| matched by a route | an event of the route's tag; the schema decides on it like on any other |
| matched by none | nothing; counted in `lines_skipped_total` |
| not of the log's format, or without a line | a dead letter `bad_line` with the whole record |
| of JSON, or a record, nested too deeply | a dead letter `too_deep` |
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from headrace.contract.formats.nesting import TOO_DEEP, TOO_DEEP_TEXT, is_deeper
from headrace.contract.mapping import PLACEHOLDER, AccessLog, Route
from headrace.contract.project import Project
from headrace.ingest.decode.message import Entry, Message, message_of
from headrace.ingest.decode.numbers import DECIMAL, INTEGER, NUMBER
from headrace.ingest.gateway.batcher import Acked, Outcome
from headrace.ingest.sources.access_log import (
    LISTED,
    LineFormat,
    Request,
    TooDeep,
    Variables,
    compile_format,
    cookie_value,
    listed_values,
    query_value,
    request_of,
    time_of,
    variables_of,
)

BAD_LINE = "bad_line"
_LINE_FIELDS = ("message",)

Reader = Callable[[Variables, Request], str | None]
"""Takes one value out of a line."""


class Mapped(NamedTuple):
    """What became of a message's lines."""

    messages: list[Message]
    skipped: int
    """Lines that are no events."""


class _Unreadable(ValueError):
    """Why a record holds no line of the log, in words without its content."""

    def __init__(self, detail: str, reason: str = BAD_LINE) -> None:
        super().__init__(detail)
        self.reason = reason


class _Target(NamedTuple):
    """A field of an event, where its value comes from and what type it has."""

    name: str
    reader: Reader
    kind: str
    listed: str = ""
    """The variable's name where it holds one value for each upstream."""


class _CompiledRoute:
    """A route ready to match."""

    def __init__(self, route: Route, kinds: Mapping[str, str]) -> None:
        self.event, self.method, self._status = route.event, route.method, route.status
        self._required = frozenset(route.skip_without)
        parts = route.path[1:].split("/")
        self._places = {found[1]: at for at, part in enumerate(parts) if (found := PLACEHOLDER.fullmatch(part))}
        self._fixed = [(at, part) for at, part in enumerate(parts) if at not in self._places.values()]
        self._segments = len(parts)
        sources = {name: f"path:{name}" for name in self._places if name in kinds} | route.fields
        self._targets = [
            _Target(name, self._reader(source), kinds[name], _listed(source)) for name, source in sources.items()
        ]

    def matches(self, method: str, status: int, request: Request) -> bool:
        """Say whether the request is of this route."""
        segments = request.segments
        return (
            method == self.method
            and len(segments) == self._segments
            and self._status[0] <= status <= self._status[1]
            and all(segments[at] == part for at, part in self._fixed)
            and all(segments[at] for at in self._places.values())
        )

    def record(self, variables: Variables, request: Request) -> dict[str, Any] | None:
        """Return the event's fields; None where one that it cannot do without is absent."""
        made: dict[str, Any] = {}
        for target in self._targets:
            text = target.reader(variables, request)
            if text is not None and target.listed:
                text = _of_upstreams(target.listed, text, target.kind)
            if text is None or text == "":
                if target.name in self._required:
                    return None
                continue
            made[target.name] = _converted(text, target.kind)
        return made

    def _reader(self, source: str) -> Reader:
        kind, _, name = source.partition(":")
        if source.startswith("="):
            return lambda _variables, _request: source[1:]
        if kind == "path":
            at = self._places[name]
            return lambda _variables, request: request.segments[at]
        if kind == "query":
            argument = f"arg_{name}"
            return lambda variables, request: variables.get(argument) or query_value(request.query, name)
        if kind == "cookie":
            return lambda variables, _request: cookie_value(variables, name)
        variable = "http_" + name.lower().replace("-", "_") if kind == "header" else name
        return lambda variables, _request: variables.get(variable)


class Mapper:
    """One mapping, ready to turn messages of its tag into messages of declared events."""

    def __init__(self, mapping: AccessLog, project: Project) -> None:
        self.tag = mapping.tag
        self._format: LineFormat = compile_format(mapping.format, escaped=mapping.escaped)
        self._fields = (mapping.field, *_LINE_FIELDS)
        self._escaped = mapping.escaped and mapping.format != "json"
        self._private = bool(project.impression.private) or any(each.private for each in project.feedback)
        self._routes = [_CompiledRoute(route, _kinds(project, route.event)) for route in mapping.routes]

    def map_message(self, message: Message) -> Mapped:
        """Return the events of a message's lines, one message a tag, and what cannot be read with its reason."""
        if message.signal or message.problem:
            return Mapped([message], 0)
        try:
            entries = message.entries
        except ValueError as error:
            return Mapped([Message(message.tag, b"", message.chunk, problem=str(error), raw=message.body)], 0)
        made: defaultdict[str, list[tuple[int | None, Any]]] = defaultdict(list)
        bad: defaultdict[tuple[str, str], list[tuple[int | None, Any]]] = defaultdict(list)
        skipped = 0
        for entry in entries:
            try:
                found = self._event(entry)
            except _Unreadable as error:
                bad[error.reason, str(error)].append((entry.time_ns, self._shown(entry.record)))
                continue
            if found is None:
                skipped += 1
            else:
                tag, time_ns, record = found
                made[tag].append((time_ns, record))
        messages = [message_of(tag, pairs, message.chunk) for tag, pairs in made.items()]
        for (reason, detail), pairs in bad.items():
            body = message_of(self.tag, pairs).body
            messages.append(
                Message(self.tag, body, message.chunk, plain_bytes=len(body), problem=detail, reason=reason)
            )
        return Mapped(messages, skipped)

    def _shown(self, record: Any) -> Any:
        """Return a bad line's record as its dead letter keeps it.

        Where a project has private fields the line is left out: nobody can say which parts of it are private.
        """
        if not self._private or not isinstance(record, dict):
            return None if self._private else record
        return {name: value for name, value in record.items() if name not in self._fields}

    def _event(self, entry: Entry) -> tuple[str, int, dict[str, Any]] | None:
        """Return (tag, time, record) of the event that a line is, None where it is none. Raises `_Unreadable`."""
        if entry.time_ns is None or not isinstance(entry.record, dict):
            raise _Unreadable("the entry is not [time, record]")
        if is_deeper(entry.record):
            raise _Unreadable(TOO_DEEP_TEXT, TOO_DEEP)
        variables = self._variables(entry.record)
        request = request_of(variables)
        if request is None:
            return None
        status = variables.get("status") or ""
        answer = int(status) if status.isascii() and status.isdigit() and len(status) < 6 else 0
        for route in self._routes:
            if not route.matches(request.method, answer, request):
                continue
            record = route.record(variables, request)
            if record is None:
                return None
            own = entry.record.get("event_id")
            if own is not None:
                record.setdefault("event_id", own)
            time_ns = time_of(variables)
            return route.event, entry.time_ns if time_ns is None else time_ns, record
        return None

    def _variables(self, record: dict[Any, Any]) -> Variables:
        line = next((record[name] for name in self._fields if isinstance(record.get(name), str | bytes)), None)
        if line is None or (self._fields[0] not in record and _parsed(record)):
            if not _parsed(record):
                raise _Unreadable(f"the record has no field {self._fields[0]!r} with the line, nor a request's fields")
            return variables_of(record, escaped=self._escaped)
        text = line.decode("utf-8", "surrogateescape") if isinstance(line, bytes) else line
        try:
            variables = self._format.read(text)
        except TooDeep as error:
            raise _Unreadable(f"as JSON, {TOO_DEEP_TEXT}", TOO_DEEP) from error
        if variables is None:
            raise _Unreadable("the line is not of this log's format")
        return variables


def acked_together(parts: int, acked: Acked | None) -> Acked | None:
    """Return what each of `parts` messages is acked by: the last one to settle calls `acked`, with the sum of all.

    Without any part there is nothing to wait for, and `acked` is called at once.
    """
    if acked is None:
        return None
    if parts == 0:
        acked(Outcome(0, 0, 0))
        return None
    outcomes: list[Outcome] = []

    def one(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if len(outcomes) == parts:
            sums = (sum(o.appended for o in outcomes), sum(o.dead_lettered for o in outcomes))
            acked(Outcome(*sums, sum(o.repeated for o in outcomes)))

    return one


def mappers_of(project: Project) -> dict[str, Mapper]:
    """Return the mappers by tag. Raises `ConfigRejected` on a log format that cuts no line."""
    return {mapping.tag: Mapper(mapping, project) for mapping in project.mappings}


def _parsed(record: dict[Any, Any]) -> bool:
    return not record.keys().isdisjoint(("request", "method", "request_method"))


def _kinds(project: Project, tag: str) -> dict[str, str]:
    """Return the type of every field that an event of `tag` can carry."""
    envelope = {"event_id": "string", "request_id": "string", "place": "int64", "event_time_ms": "int64"}
    if tag == project.impression.tag:
        return {**envelope, "version": "string", **project.impression.fields}
    fields = next(feedback.fields for feedback in project.feedback if feedback.tag == tag)
    key = project.impression.key
    return {**envelope, "value": "float64", key: project.impression.fields[key], **fields}


def _listed(source: str) -> str:
    kind, _, name = source.partition(":")
    return name if kind == "log" and name in LISTED else ""


def _of_upstreams(name: str, text: str, kind: str) -> str:
    """Return what a field takes of one value for each upstream; empty where none is known.

    Text stays as nginx wrote it, and a list has each value. A number is that of the request: times and sizes are the
    sum over all that were asked, the status that of the last, whose answer the visitor got.
    """
    if kind not in ("int64", "float64") and not kind.startswith("list["):
        return "" if text == "-" else text
    values = listed_values(text)
    if kind.startswith("list["):
        return ",".join(values)
    if len(values) < 2 or name in ("upstream_status", "upstream_addr"):
        return values[-1] if values else ""
    return str(sum(map(Decimal, values))) if all(map(DECIMAL.fullmatch, values)) else text


def _converted(text: str, kind: str) -> Any:
    """Return a field's value; text that is none of its kind stays text, and the schema refuses it as `bad_type`."""
    if kind.startswith("list["):
        return [_converted(part, kind[5:-1]) for part in text.split(",") if part]
    if kind == "int64" and INTEGER.fullmatch(text):
        return int(text)
    if kind == "float64" and NUMBER.fullmatch(text):
        number = float(text)
        return number if math.isfinite(number) else text
    if kind == "bool":
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    return text
