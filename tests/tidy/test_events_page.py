"""Goal: docs/events.md has every built-in column with its type. Method: its tables against the schemas."""

from __future__ import annotations

import re
from pathlib import Path

from headrace.contract.checks.names import LATER, PREFIXES, RESERVED
from headrace.contract.formats.events import ENVELOPE, VALUE, VERSION
from headrace.contract.formats.sample import LAKE_HOURS, LEAD, TAIL
from headrace.ingest.decode.validate import ID_BYTES_MAX, PLACE_MAX

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "events.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| ([^|]+?) \| (.+) \|$", re.MULTILINE)
ROWS = {name: (kind, rest) for name, kind, rest in ROW.findall(PAGE)}
FIELDS = {field.name: field for field in (*ENVELOPE, VERSION, VALUE, *LEAD, *TAIL, *LAKE_HOURS)}


def test_every_column_stands_there_with_its_type() -> None:
    def shown(kind: object) -> str:
        return re.sub(r"list<(?:item|element): (\w+)>", r"list[\1]", str(kind)).replace("double", "float64")

    types = {name: shown(field.type).replace("float", "float32", 1) for name, field in FIELDS.items()}
    types = {name: kind.replace("float3264", "float64").replace("[float32]", "[float]") for name, kind in types.items()}
    assert {name: kind for name, (kind, _) in ROWS.items()} == types


def test_every_name_that_is_refused_stands_there() -> None:
    assert set(ROWS) | LATER == RESERVED
    for name in (*LATER, *PREFIXES):
        assert f"`{name}`" in PAGE


def test_bounds_are_those_of_the_gateway() -> None:
    for name in ("event_id", "request_id"):
        assert f"longer than {ID_BYTES_MAX:,} characters" in ROWS[name][1]
    assert f"above {PLACE_MAX:,}" in ROWS["place"][1]
