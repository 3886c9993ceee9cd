"""Goal: no declared name takes the place of a column of ours. Method: each name of every schema, in each place."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest
from msgspec import structs

from headrace.backends.lake.hour_files import with_hours
from headrace.contract.checks.names import RESERVED
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.events import feedback_schema, impression_schema
from headrace.contract.formats.sample import sample_schema
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Counter, FeatureSpec

BARE = Project(
    impression=ImpressionType(tag="i", key="user", fields={"user": "int64"}),
    feedback=(FeedbackType(name="click", tag="c"),),
    tasks=(Task(name="click", feedback="click", window_ms=10),),
    features=FeatureSpec(),
)


def with_field(name: str, *, of: str = "impression") -> Project:
    """Return the project with one field more."""
    if of == "impression":
        return structs.replace(
            BARE, impression=structs.replace(BARE.impression, fields={"user": "int64", name: "int64"})
        )
    return structs.replace(BARE, feedback=(structs.replace(BARE.feedback[0], fields={name: "int64"}),))


def own_columns() -> set[str]:
    """Return what all schemas hold that nobody declared."""
    schemas = [impression_schema(BARE), feedback_schema(BARE, BARE.feedback[0]), sample_schema(BARE)]
    stored = with_hours(pa.Table.from_batches([], schema=pa.schema([pa.field("event_time_ms", pa.int64())])))
    return {name for schema in (*schemas, stored.schema) for name in schema.names} - {"user"}


def test_every_column_of_every_schema_is_reserved() -> None:
    assert own_columns() <= RESERVED
    assert {"served", "score", "propensity", "arm", "sent_at", "history"} <= RESERVED


def test_the_manual_lists_them_all() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "project.md").read_text()
    listed = text.split("refused at its start:")[1].split("and all that begin")[0]
    assert set(re.findall(r"`([a-z_]+)`", listed)) == RESERVED


@pytest.mark.parametrize("of", ["impression", "click"])
@pytest.mark.parametrize("name", [*sorted(RESERVED), "Label", "EVENT_ID", "counter.user.impression", "external.a.b"])
def test_a_field_of_such_a_name_is_refused_with_what_to_do(name: str, of: str) -> None:
    with pytest.raises(ConfigRejected, match=re.escape(repr(name)) + r"(?s:.*)another one.*spec apply"):
        with_field(name, of=of).checked()


@pytest.mark.parametrize("of", ["impression", "click"])
@pytest.mark.parametrize("name", ["", "a\0b", "a\nb"])
def test_a_name_that_nobody_can_read_is_refused(name: str, of: str) -> None:
    with pytest.raises(ConfigRejected, match="letters"):
        with_field(name, of=of).checked()


@pytest.mark.parametrize("name", ["labels", "item_weight", "counter", "user_version", "preis_\u20ac", "Overlay"])
def test_other_names_are_taken(name: str) -> None:
    assert with_field(name).checked() and with_field(name, of="click").checked()


USER = Counter(name="user", key="user", counts=("impression",))
TWICE = {
    "User": with_field("User"),
    "User ": with_field("User", of="click"),
    "counters": structs.replace(BARE, features=FeatureSpec(counters=(USER, structs.replace(USER, name="USER")))),
    "one counter": structs.replace(BARE, features=FeatureSpec(counters=(USER, USER))),
    "entries": structs.replace(
        BARE,
        feedback=(*BARE.feedback, FeedbackType(name="Click", tag="d")),
        features=FeatureSpec(counters=(structs.replace(USER, counts=("click", "Click")),)),
    ),
    "types": structs.replace(BARE, feedback=(*BARE.feedback, FeedbackType(name="click", tag="d"))),
    "impression": structs.replace(BARE, feedback=(*BARE.feedback, FeedbackType(name="impression", tag="d"))),
    "tags": structs.replace(BARE, feedback=(*BARE.feedback, FeedbackType(name="order", tag="i"))),
    "tasks": structs.replace(BARE, tasks=(*BARE.tasks, structs.replace(BARE.tasks[0], window_ms=20))),
}


@pytest.mark.parametrize("name", TWICE)
def test_two_names_that_are_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigRejected, match=r"are one|differ only by case"):
        TWICE[name].checked()


def test_what_every_event_brings_cannot_be_private() -> None:
    for name in ("event_id", "request_id", "event_time_ms", "version"):
        kind = structs.replace(BARE.impression, private={name: "drop"})
        with pytest.raises(ConfigRejected, match=name):
            structs.replace(BARE, impression=kind).checked()
