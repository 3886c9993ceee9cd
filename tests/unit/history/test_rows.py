"""Goal: what a history's files bring becomes events, or is refused with its reason; a mapping that is wrong is told by
name. Method: small files in every format, through the importer with a dry run or the checks alone."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as parquet
import pytest
from deltalake import write_deltalake
from history_world import History, content
from loop_world import START_MS

from headrace.contract.errors import ConfigRejected
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, FeatureSpec
from headrace.stream.history.mapping import read_mapping

DAY_MS = 86_400_000
PROJECT = Project(
    name="store",
    impression=ImpressionType(
        tag="store.impression",
        key="user_id",
        fields={"user_id": "int64", "item_id": "int64", "price": "float64", "new": "bool", "tags": "list[string]"},
    ),
    feedback=(FeedbackType(name="click", tag="store.click"),),
    tasks=(
        Task(name="click", feedback="click", window_ms=10_000),
        Task(name="later", feedback="click", window_ms=60_000),
    ),
    features=FeatureSpec(features=(Categorical(field="item_id"),)),
).checked()
EVENTS = '[impressions]\nfiles = "{}"\n'
LABELLED = '[labelled]\nfiles = "rows.parquet"\nlabels = {{click = "clicked", later = "clicked_later"}}\n{}'


def row(number: int, **fields: Any) -> dict[str, Any]:
    at_ms = START_MS + number * 1_000
    found = {"event_id": f"i{number}", "request_id": f"r{number}", "user_id": number, "item_id": 1, "price": 0.5}
    return {**found, "event_time_ms": at_ms, **fields}


def dry(folder: Path, mapping: str, **request: Any) -> tuple[Any, History]:
    (folder / "history.toml").write_text(mapping)
    history = History(folder, project=PROJECT)
    return history.run(dry_run=True, **request), history


def told(folder: Path, mapping: str) -> str:
    (folder / "history.toml").write_text(mapping)
    with pytest.raises(ConfigRejected) as refused:
        History(folder, project=PROJECT).run(dry_run=True)
    return str(refused.value)


def test_every_format_gives_the_same_samples(tmp_path: Path) -> None:
    rows = [row(n, new=n % 2 == 0, tags=["a", "b"] if n % 3 else None, price=n / 4) for n in range(50)]
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "rows.parquet")
    write_deltalake(str(tmp_path / "delta"), table)
    (tmp_path / "many").mkdir()
    parquet.write_table(table.slice(0, 20), tmp_path / "many" / "a.parquet")
    parquet.write_table(table.slice(20), tmp_path / "many" / "b.parquet")
    text = [None if each["tags"] is None else '["a","b"]' for each in rows]
    flat = table.set_column(table.column_names.index("tags"), "tags", pa.array(text))
    csv.write_csv(flat, tmp_path / "rows.csv")
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress((tmp_path / "rows.csv").read_bytes()))
    found = []
    for name in ("rows.parquet", "delta", "many", "many/*.parquet", "rows.csv", "rows.csv.gz"):
        (tmp_path / "history.toml").write_text(EVENTS.format(name))
        history = History(tmp_path, project=PROJECT, uri=str(tmp_path / f"lake {len(found)}"))
        assert history.run().refused == {}
        found.append(content(history.lake.read()))
    assert len(found[0]) == 100 and all(each == found[0] for each in found)


def test_each_reason_is_told_with_file_and_row(tmp_path: Path) -> None:
    rows = [
        row(1, event_time_ms=str(START_MS)),
        row(2, user_id=None),
        row(3, request_id=""),
        row(4, event_time_ms="yesterday"),
        row(5, event_time_ms=None),
        row(6, event_time_ms="1990-01-01T00:00:00Z"),
        row(7, event_time_ms="2999-01-01T00:00:00Z"),
        row(8, item_id="many"),
        row(9, event_time_ms=str(START_MS + 40 * DAY_MS)),
        row(10, event_time_ms=str(START_MS - 1)),
        row(1, event_time_ms=str(START_MS)),
    ]
    lines = [",".join(rows[0])] + [",".join("" if v is None else str(v) for v in r.values()) for r in rows]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    found, _ = dry(tmp_path, EVENTS.format("rows.csv"), from_ms=START_MS, until_ms=START_MS + 30 * DAY_MS)
    assert found.refused == {
        "after_until": 1, "bad_type": 3, "before_from": 1, "future": 1, "no_partition_key": 1, "no_request_id": 1,
        "past": 1, "repeat": 1,
    }  # fmt: skip
    assert found.events["impression"] == 2
    assert f"{tmp_path}/rows.csv, row 4: 'yesterday' is no time" in found.examples["bad_type"][0]
    assert "row 8: field 'item_id' is declared int64: got str" in found.examples["bad_type"][2]


def test_times_are_read_in_any_unit(tmp_path: Path) -> None:
    at = datetime.fromtimestamp(START_MS / 1_000, UTC)
    columns = {
        "s": pa.array([START_MS // 1_000]),
        "float_s": pa.array([START_MS / 1_000]),
        "ms": pa.array([START_MS]),
        "us": pa.array([START_MS * 1_000]),
        "ns": pa.array([START_MS * 1_000_000]),
        "iso": pa.array([at.isoformat()]),
        "naive": pa.array([at.replace(tzinfo=None)], pa.timestamp("us")),
        "zoned": pa.array([at], pa.timestamp("ns", "Europe/Berlin")),
        "text_s": pa.array([str(START_MS // 1_000)]),
    }
    for name, column in columns.items():
        plain = {field: [value] for field, value in row(0).items() if field != "event_time_ms"}
        parquet.write_table(pa.table({**plain, "at": column}), tmp_path / "rows.parquet")
        found, _ = dry(tmp_path, EVENTS.format("rows.parquet") + 'columns = {event_time_ms = "at"}\n')
        assert (found.refused, found.first_ms) == ({}, START_MS), name
    parquet.write_table(pa.table({**plain, "at": pa.array([5_000])}), tmp_path / "rows.parquet")
    unit = 'columns = {event_time_ms = "at"}\ntime_unit = "s"\n'
    found, _ = dry(tmp_path, EVENTS.format("rows.parquet") + unit)
    assert found.refused == {"past": 1} and "event time 5000000 ms" in found.examples["past"][0]


def test_labelled_rows_give_their_labels(tmp_path: Path) -> None:
    rows = [
        row(1, clicked=1, clicked_later=1, at=START_MS + 1_500),
        row(2, clicked=0, clicked_later=1, at=None),
        row(3, clicked=0, clicked_later=0, at=None),
        row(4, clicked=None, clicked_later=0, at=None),
        row(5, clicked=7, clicked_later=0, at=None),
        row(6, clicked=1, clicked_later=0, at=None),
        row(7, clicked=1, clicked_later=1, at=START_MS),
        {**row(8, clicked=1, clicked_later=1, at=None), "request_id": None, "event_id": None},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "history.toml").write_text(LABELLED.format('times = {click = "at"}\n'))
    history = History(tmp_path, project=PROJECT)
    found = history.run()
    assert found.refused == {"bad_label": 3, "no_label": 1}
    labels = {
        (r["event_time_ms"] - START_MS, r["task"]): (r["label"], r["feedback_time_ms"])
        for r in content(history.lake.read())
    }
    assert labels[1_000, "click"] == labels[1_000, "later"] == (1.0, START_MS + 1_500)
    assert labels[2_000, "click"] == (0.0, None) and labels[2_000, "later"] == (1.0, START_MS + 2_000 + 60_000)
    assert labels[3_000, "click"] == labels[3_000, "later"] == (0.0, None)
    assert labels[8_000, "click"] == labels[8_000, "later"] == (1.0, START_MS + 8_000 + 10_000)
    assert len(labels) == 8
    reasons = {r["row"]: r["detail"] for r in history.refused(found)}
    assert reasons[4] == "task 'click' has no label" and reasons[5] == "task 'click': '7' is neither 0 nor 1"
    assert "task 'later' is 0, its window is 60000 ms" in reasons[6] and "before the impression" in reasons[7]


def test_rows_without_an_id_count_once(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row(n // 2).items() if name != "event_id"} for n in range(6)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found, _ = dry(tmp_path, EVENTS.format("rows.parquet"))
    assert found.refused == {"repeat": 3} and found.samples == 6


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ("[impression]\n", "there is no 'impression'. Did you mean 'impressions'?"),
        ("", "it has either [impressions]"),
        ('[impressions]\nfiles = "none.parquet"\n', "there is none at"),
        ("[impressions]\nfiles = 7\n", "impressions.files: "),
        (EVENTS.format("rows.parquet") + 'columns = {event_tme_ms = "at"}\n', "Did you mean 'event_time_ms'?"),
        (EVENTS.format("rows.parquet") + 'columns = {price = "prise"}\n', "has no column 'prise'; it has"),
        (EVENTS.format("rows.parquet") + 'columns = {price = "prise"}\n', "Did you mean 'price'?"),
        (EVENTS.format("rows.parquet") + '[feedback.clik]\nfiles = "x"\n', "Did you mean 'click'?"),
        (
            '[labelled]\nfiles = "rows.parquet"\nlabels = {click = "price"}\n',
            "labelled.labels has no column for 'later'",
        ),
        (EVENTS.format("other.parquet"), "has no column 'event_time_ms', which every row needs"),
        (EVENTS.format("broken.parquet"), "can't be read"),
        (EVENTS.format("rows.txt"), "its name does not end in .parquet"),
        ("files = \n", "is not TOML"),
    ],
)
def test_a_wrong_mapping_is_told_by_name(tmp_path: Path, mapping: str, words: str) -> None:
    parquet.write_table(pa.Table.from_pylist([row(1)]), tmp_path / "rows.parquet")
    parquet.write_table(pa.Table.from_pylist([{"user_id": 1, "request_id": "r"}]), tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "rows.txt").write_text("x")
    assert words in told(tmp_path, mapping)


def test_a_mapping_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigRejected, match="No such file"):
        read_mapping(tmp_path / "none.toml", PROJECT)
