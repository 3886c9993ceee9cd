"""How a user says which files are their history, and which column is which field: one TOML file.

[impressions]                     # a row an impression
files = ["shown/*.parquet"]       # files, folders or patterns, relative to this file
columns = {event_time_ms = "shown_at", user_id = "uid"}

[feedback.click]                  # a row a click
files = "clicks.csv"
columns = {event_time_ms = "at"}

A field takes the column of its own name where `columns` says nothing. Or, where one row has an impression and how it
ended:

[labelled]
files = "rows.parquet"
columns = {event_time_ms = "shown_at"}
labels = {click = "clicked"}      # task = column: 1 or 0, true or false
times = {click = "clicked_at"}    # when its feedback came; without it: at the end of the task's window
values = {click = "price"}        # the feedback's value
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from headrace.contract.errors import ConfigRejected, listed, meant, wanted
from headrace.contract.formats.events import feedback_schema, impression_schema
from headrace.contract.project import Project

Unit = Literal["s", "ms", "us", "ns"]
Format = Literal["parquet", "csv", "delta"]
TIME = "event_time_ms"


class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Files of one kind of rows."""

    files: str | tuple[str, ...]
    columns: dict[str, str] = {}
    """Field to column, where their names differ."""
    time_unit: Unit | None = None
    """Of times that are numbers; None: their size tells it."""
    format: Format | None = None
    """None: a name that ends in .parquet, .csv, .csv.gz or .tsv tells it, and a folder with a `_delta_log` is Delta."""


class Labelled(Input, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Files whose rows have an impression and its labels."""

    labels: dict[str, str]
    times: dict[str, str] = {}
    values: dict[str, str] = {}


class History(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    impressions: Input | None = None
    feedback: dict[str, Input] = {}
    labelled: Labelled | None = None


def read_mapping(path: Path, project: Project) -> History:
    """Return what the file says, checked against the project. Raises `ConfigRejected` with the key that is wrong."""
    try:
        history = msgspec.toml.decode(path.read_bytes(), type=History)
    except OSError as error:
        raise ConfigRejected(
            f"{path}: {error.strerror}. It is the TOML file that names the history's files."
        ) from error
    except msgspec.ValidationError as error:
        said, _, at = str(error).partition(" - at `$.")
        known = [*Labelled.__struct_fields__, *History.__struct_fields__]
        name = said.partition("unknown field `")[2].rstrip("`")
        word = f"there is no {name!r}.{meant(name, known)}" if name else wanted(said)
        raise ConfigRejected(f"{path}: {at.rstrip('`') or 'the file'}: {word}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigRejected(f"{path} is not TOML: {error}.") from error
    if (history.labelled is None) == (history.impressions is None):
        raise ConfigRejected(f"{path}: it has either [impressions], with [feedback.NAME] beside it, or [labelled].")
    if history.labelled is not None and history.feedback:
        raise ConfigRejected(f"{path}: [feedback] goes with [impressions]; rows of [labelled] have their labels.")
    _check_names(history, project, path)
    return history


def fields_of(project: Project, feedback: str | None = None) -> tuple[str, ...]:
    """Return the fields that rows of a type may bring: of impressions, or of a type of feedback."""
    if feedback is None:
        schema = impression_schema(project)
    else:
        schema = feedback_schema(project, next(f for f in project.feedback if f.name == feedback))
    private = project.impression.private
    return tuple(name for name in [*schema.names, *private] if name != "key")


def _check_names(history: History, project: Project, path: Path) -> None:
    kinds, tasks = [f.name for f in project.feedback], [t.name for t in project.tasks]
    _check(history.feedback, kinds, f"{path}: [feedback.NAME]", "type of feedback")
    for name, each in history.feedback.items():
        _check(each.columns, fields_of(project, name), f"{path}: feedback.{name}.columns", "field")
    for where, rows in (("impressions", history.impressions), ("labelled", history.labelled)):
        if rows is not None:
            _check(rows.columns, fields_of(project), f"{path}: {where}.columns", "field")
    if history.labelled is None:
        return
    for where in ("labels", "times", "values"):
        _check(getattr(history.labelled, where), tasks, f"{path}: labelled.{where}", "task")
    if missing := set(tasks) - history.labelled.labels.keys():
        raise ConfigRejected(
            f"{path}: labelled.labels has no column for {listed(missing)}: without it every row of the task would be a "
            "negative."
        )


def _check(names: Iterable[str], known: Iterable[str], where: str, what: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise ConfigRejected(
                f"{where}: the project has no {what} {name!r}; it has {listed(known)}.{meant(name, known)}"
            )


def columns_of(columns: Mapping[str, str], fields: Iterable[str], there: Iterable[str], where: str) -> dict[str, str]:
    """Return, by field, the column of a file that has its values; fields that the file lacks are left out.

    Args:
        columns: what the mapping says.
        there: the file's columns.

    Raises `ConfigRejected` for a column that is told and not there.
    """
    there, found = list(there), {}
    for field in fields:
        name = columns.get(field, field)
        if name in there:
            found[field] = name
        elif field in columns:
            raise ConfigRejected(f"{where} has no column {name!r}; it has {listed(there)}.{meant(name, there)}")
    return found


def required(found: Mapping[str, str], fields: Iterable[str], there: Iterable[str], where: str) -> None:
    """Raise `ConfigRejected` where a field that each row needs has no column."""
    for field in fields:
        if field not in found:
            near = meant(field, there)
            raise ConfigRejected(
                f"{where} has no column {field!r}, which every row needs; it has {listed(there)}.{near} Say which "
                f'column it is: columns = {{{field} = "..."}}.'
            )
