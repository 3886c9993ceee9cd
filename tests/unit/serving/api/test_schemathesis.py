"""Goal: what /openapi.json says of serving is so, and no request that it or its reverse allows ends in a 500.

Method: schemathesis makes requests of the page, right ones and wrong ones, for a server behind a real socket.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import checks
from serving_thread import answering
from serving_world import Trainer, World

from headrace.serving.api.app import make_app
from headrace.serving.api.openapi import OPERATIONS, Operation

LEFT_OUT = (
    # What fits the page may still be refused: tensors of two lengths, a version that is not served any more.
    checks.positive_data_acceptance,
)


@pytest.fixture(scope="module")
def schema() -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        trainer = Trainer(world)
        trainer.learn(Random(1))
        trainer.snapshot()
        world.follow()
        with answering(world.app) as served:
            yield schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def hold(schema: Any, operation: Operation, examples: int) -> None:
    """Send requests that the page allows, and some that it does not."""
    api = schema[operation.path][operation.method.upper()]
    left_out = list(LEFT_OUT) if "/v2/models" in operation.path or operation.query else []
    for mode in schemathesis.GenerationMode:

        @given(case=api.as_strategy(generation_mode=mode))
        @settings(max_examples=examples, phases=[Phase.explicit, Phase.generate], **COMMON)
        def run(case: Any) -> None:
            response = case.call(timeout=20.0)
            case.validate_response(response, excluded_checks=left_out)

        try:
            run()
        except Unsatisfiable:
            # Nothing about this operation can be wrong.
            assert mode is schemathesis.GenerationMode.NEGATIVE


COMMON: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "database": None,
}
NAMES = [f"{operation.method} {operation.path}" for operation in OPERATIONS]


@pytest.mark.parametrize("operation", OPERATIONS, ids=NAMES)
def test_the_page_is_kept(schema: Any, operation: Operation) -> None:
    hold(schema, operation, 10)


@pytest.mark.long
@pytest.mark.parametrize("operation", OPERATIONS, ids=NAMES)
def test_the_page_is_kept_for_long(schema: Any, operation: Operation) -> None:
    hold(schema, operation, 500)


def test_the_page_has_all_routes(tmp_path: Path) -> None:
    routes = make_app(World(tmp_path).app).routes
    there = {(method.lower(), route.path) for route in routes for method in route.methods - {"HEAD"}}
    assert there == {(operation.method, operation.path) for operation in OPERATIONS}
