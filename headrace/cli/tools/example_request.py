"""A request for scores that fits a project's declared fields, as a command to paste."""

from __future__ import annotations

import json
import shlex
from typing import Any

from headrace.contract.project import Project

_VALUES: dict[str, tuple[Any, Any]] = {
    "int64": (7, 8),
    "float64": (3.5, 2.0),
    "string": ("a", "b"),
    "bool": (True, False),
    "list[string]": (["a"], ["b", "c"]),
    "list[int64]": ([7], [8, 9]),
}
"""Of a field's type: the value of the first candidate and of the second."""


def example_request(project: Project, port: int) -> str:
    """Return a command that asks for two scores; the key is common to both, everything else is each one's own."""
    shown = project.impression
    own = {name: _VALUES[kind] for name, kind in shown.fields.items() if name != shown.key}
    body = {
        "request_id": "r-1",
        "context": {shown.key: _VALUES[shown.fields[shown.key]][0]},
        "candidates": [{name: both[number] for name, both in own.items()} for number in range(2)],
    }
    said = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl -s 127.0.0.1:{port}/v1/rank -H 'content-type: application/json' -d {said}"
