"""Learn the quantiles of a field from the lake and print them as features to paste into the project's Python file.

Edges stand in the feature specification, so that a value means the same whenever it comes. It reads only.
"""

from __future__ import annotations

import argparse
import json

import pyarrow.compute as pc

from headrace.cli.runtime import add_common, open_runtime
from headrace.contract.crawl import external_columns
from headrace.contract.errors import ConfigRejected, listed
from headrace.contract.project import LISTS
from headrace.stream.features.sketch import Sketch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `headrace quantiles`."""
    add_common(parser)
    parser.add_argument("--field", required=True, help="a raw field, counter.* or external.* column of numbers")
    parser.add_argument("--bins", type=int, default=16, help="how many parts of equal size (16)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Read the field's column, print its edges."""
    runtime = open_runtime(args)
    project = runtime.project
    columns: dict[str, str] = {
        **dict.fromkeys(project.features.counter_columns(), "float32"),
        **external_columns(project.crawls),
        **project.impression.fields,
    }
    kind = columns.get(args.field)
    if kind is None or kind in LISTS or kind in ("string", "bool"):
        numbers = [name for name, kind in columns.items() if kind not in (*LISTS, "string", "bool")]
        raise ConfigRejected(
            f"--field {args.field!r} is {kind or 'not declared'}; quantiles are of numbers: {listed(numbers)}."
        )
    if args.bins < 2:
        raise ConfigRejected(f"--bins is {args.bins}; two parts are the least.")
    lake = runtime.lake(with_leases=False)
    rows = lake.read(columns=[args.field, "task"])
    sketch = Sketch()
    # An impression is in the lake once a task.
    sketch.add(rows.filter(pc.equal(rows["task"], project.recipe.task)).column(args.field))
    edges = sketch.edges(args.bins)
    if args.json:
        print(json.dumps({"field": args.field, "count": sketch.count, "edges": edges}))
        return 0
    print(f"{sketch.count} values of {args.field}")
    print(f"Quantile(field={args.field!r}, edges={edges!r})")
    print(f"Bucket(field={args.field!r}, edges={edges[1:-1]!r})")
    return 0
