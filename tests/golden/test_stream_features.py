"""Goal: no transform ever changes its bits, no specification its digest, no salt its text. Method: golden vectors.

`python tests/golden/test_stream_features.py` writes cases that are not in the file yet; it never changes one that is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from headrace.contract.functions import feature_function
from headrace.contract.spec import FeatureSpec
from headrace.stream.features.featurize import featurize

FILE = Path(__file__).parent / "data" / "features.json"
GOLDEN: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"schema": {}, "rows": [], "cases": {}}
TYPES = {
    "int64": pa.int64(),
    "float64": pa.float64(),
    "float32": pa.float32(),
    "string": pa.string(),
    "bool": pa.bool_(),
    "list[string]": pa.list_(pa.string()),
    "list[int64]": pa.list_(pa.int64()),
}


@feature_function("golden.title_chars", version=1)
def title_chars(title):
    return pc.utf8_length(title)


@feature_function("golden.city_and_count", version=1)
def city_and_count(city, tags):
    counts = pc.fill_null(pc.list_value_length(tags), -1)
    return np.stack([pc.utf8_length(pc.fill_null(city, "none")).to_numpy(), counts.to_numpy()], axis=1)


def batch_of(golden: dict[str, Any]) -> pa.RecordBatch:
    schema = pa.schema([(name, TYPES[kind]) for name, kind in golden["schema"].items()])
    return pa.RecordBatch.from_pylist(golden["rows"], schema=schema)


def bits(array: np.ndarray) -> list[list[str]]:
    return [[f"{v:0{2 * array.itemsize}x}" for v in row] for row in array.view(f"u{array.itemsize}").tolist()]


def outcome(spec_json: dict[str, Any], batch: pa.RecordBatch) -> dict[str, Any]:
    spec = msgspec.convert(spec_json, FeatureSpec)
    slots_NF, numeric_ND = featurize(batch, spec)
    text = msgspec.json.encode(spec).decode()
    return {"json": text, "digest": spec.digest(), "slots": bits(slots_NF), "numeric": bits(numeric_ND)}


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_golden_bits(name):
    case = GOLDEN["cases"][name]
    found = outcome(case["spec"], batch_of(GOLDEN))
    assert found["digest"] == case["digest"], "an old specification has another digest: all its samples are made again"
    assert found["json"] == case["json"], "states, checkpoints and recipes of an old specification are refused"
    assert found["slots"] == case["slots"], "an old specification makes other slots under the same digest"
    assert found["numeric"] == case["numeric"], "an old specification makes other numbers under the same digest"


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_a_specification_survives_json(name):
    spec = msgspec.convert(GOLDEN["cases"][name]["spec"], FeatureSpec)
    text = msgspec.json.encode(spec)
    again = msgspec.json.decode(text, type=FeatureSpec)
    assert again == spec and again.digest() == spec.digest() and msgspec.json.encode(again) == text


def write_missing(cases: dict[str, Any]) -> None:
    batch = batch_of(GOLDEN)
    for name, spec in cases.items():
        if name not in GOLDEN["cases"]:
            GOLDEN["cases"][name] = {"spec": spec, **outcome(spec, batch)}
            print("new:", name)
    FILE.write_text(json.dumps(GOLDEN, ensure_ascii=True, indent=1) + "\n")
