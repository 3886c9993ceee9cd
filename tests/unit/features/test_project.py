"""Goal: what a project's file declares is there in every stage. Method: load a project from disk, ask the command."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from headrace.backends.lake.delta import DeltaLake
from headrace.cli.main import main
from headrace.cli.project_folder import load_project
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.positions import Position
from headrace.stream.features.featurize import featurize

FILE = """
from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.functions import feature_function
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Custom, FeatureSpec, MultiValued


@feature_function("NAME.double", version=1)
def double(price: pa.Array) -> pa.Array:
    return pc.multiply(price, 2)


PROJECT = Project(
    impression=ImpressionType(tag="i", key="user", fields={"user": "int64", "price": "int64", "tags": "list[string]"}),
    feedback=(FeedbackType(name="click", tag="c"),),
    tasks=(Task(name="click", feedback="click", window_ms=10),),
    features=FeatureSpec(
        features=(
            Custom(function="NAME.double", version=1, fields=("price",), gives="numbers"),
            MultiValued(field="tags", values_max=2),
        )
    ),
)
"""


@pytest.fixture
def folder(tmp_path, request):
    (tmp_path / "headrace.toml").write_text("")
    (tmp_path / "project.py").write_text(FILE.replace("NAME", request.node.name))
    return tmp_path


def test_functions_of_the_file_are_found(folder):
    for _ in range(2):
        _, project = load_project(folder)
    columns = {"user": pa.array([1]), "price": pa.array([21]), "tags": pa.array([["a"]])}
    assert featurize(columns, project.features)[1].tolist() == [[42.0]]


def test_a_function_that_changes_needs_a_new_version(folder):
    _, before = load_project(folder)
    text = (folder / "project.py").read_text()
    (folder / "project.py").write_text(text.replace("multiply(price, 2)", "multiply(price, 3)"))
    with pytest.raises(ConfigRejected, match="give the changed function a new version"):
        load_project(folder)
    newer = text.replace("price, 2", "price, 3").replace("version=1", "version=2")
    (folder / "project.py").write_text(newer)
    _, after = load_project(folder)
    columns = {"user": pa.array([1]), "price": pa.array([10]), "tags": pa.array([["a"]])}
    # Samples and models of both digests can be featurized side by side.
    assert featurize(columns, after.features)[1].tolist() == [[30.0]]
    assert featurize(columns, before.features)[1].tolist() == [[20.0]]
    assert before.features.digest() != after.features.digest()


def test_quantiles_are_learnt_from_the_lake_once_an_impression(folder, tmp_path, capsys):
    lake = DeltaLake(str(tmp_path / "lake" / "samples"))
    rows = [{"price": price, "task": task} for price in range(100) for task in ("click", "order")]
    lake.append([pa.RecordBatch.from_pylist(rows)], {0: 1}, {0: Position(1, 0)})
    flags = ["--project", str(folder), "--store", f"file:{tmp_path}", "--home", str(tmp_path / "home")]
    assert main(["quantiles", "--field", "price", "--bins", "4", "--json", *flags]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"field": "price", "count": 100, "edges": [0.0, 24.0, 49.0, 74.0, 99.0]}
    assert main(["quantiles", "--field", "price", "--bins", "2", *flags]) == 0
    assert "Quantile(field='price', edges=(0.0, 49.0, 99.0))" in capsys.readouterr().out
    assert main(["quantiles", "--field", "tags", *flags]) == 2


def test_quantiles_of_what_was_crawled_leave_out_what_was_not_known(folder, tmp_path, capsys):
    """A source that was declared later: older rows and unknown items have null."""
    crawls = """crawls=(
        Crawl(
            name="catalogue", joins="user", kind="json", start=("http://127.0.0.1/x",),
            key=Extract(at="id", type="int64"),
            fields={"price": Extract(at="price", type="float64"), "name": Extract(at="name")},
        ),
    ),
    features="""
    text = (folder / "project.py").read_text().replace("features=", crawls, 1)
    imports = "from headrace.contract.crawl import Crawl, Extract\nimport pyarrow as pa\n"
    (folder / "project.py").write_text(text.replace("import pyarrow as pa\n", imports, 1))
    lake = DeltaLake(str(tmp_path / "lake" / "samples"))
    lake.append([pa.RecordBatch.from_pylist([{"task": "click"}] * 7)], {0: 1}, {0: Position(1, 0)})
    rows = [{"external.catalogue.price": price, "task": "click"} for price in (1.5, None, 3.5, 2.5)]
    lake.append([pa.RecordBatch.from_pylist(rows)], {0: 2}, {0: Position(2, 0)})
    flags = ["--project", str(folder), "--store", f"file:{tmp_path}", "--home", str(tmp_path / "home")]
    assert main(["quantiles", "--field", "external.catalogue.price", "--bins", "2", "--json", *flags]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"field": "external.catalogue.price", "count": 3, "edges": [1.5, 2.5, 3.5]}
    assert main(["quantiles", "--field", "external.catalogue.name", *flags]) == 2
    assert "external.catalogue.price" in capsys.readouterr().err
