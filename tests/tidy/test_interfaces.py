"""Goal: no method of the contract's interfaces is seen by no fault matrix without anyone noticing.

Method: every method of every interface is found in the code. It is one of an interface that a matrix makes its rows of,
or it is listed here with what happens where it fails or never returns. A new one is in neither, and a listed one that
is no more is noticed.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from fault_crawl import ROWS as CRAWL_ROWS
from fault_gateway import GATEWAY
from fault_matrix import calls_of, contract_interfaces
from fault_retry import RETRY
from fault_stages import ROWS as STREAM_ROWS

TESTS = Path(__file__).resolve().parents[1]
TRAINER = "simulation/trainer/test_trainer_faults.py"
START = "asked by a command before its stage begins: what it raises ends the command, and `CallWatch` where it hangs"
ROWS = (*STREAM_ROWS, *CRAWL_ROWS, GATEWAY, RETRY)
TIME = "the machine's own clock: it asks nobody"
SHOWN = "writes a line on the terminal; what it raises ends the run, which goes on from its steps"
LATE = "the settler waits while it is away, ends the gateway for what is unexpected, `CallWatch` where it hangs"
WITHOUT_ROW = {
    "Admin.ensure_topics": START,
    "Admin.topic_id": START,
    "Clock.now_ms": TIME,
    "Clock.monotonic": TIME,
    "Clock.sleep": TIME,
    "JoinedUpTo.joined": LATE,
    "Progress.begin": SHOWN,
    "Progress.done": SHOWN,
    "Progress.end": SHOWN,
    "StoredIds.state": LATE,
    "StoredIds.stored": LATE,
}


def trainers() -> set[str]:
    """Return the names in `CONTRACTS = {...}` of the trainer's matrix."""
    for node in ast.parse((TESTS / TRAINER).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONTRACTS":
            assert isinstance(node.value, ast.Dict)
            return {ast.unparse(value) for value in node.value.values}
    raise AssertionError(f"{TRAINER} has no CONTRACTS")


def rows() -> set[str]:
    """Return the interfaces that a matrix makes its rows of."""
    return trainers() | {each.__name__ for row in ROWS for each in row.interfaces}


def unseen(interfaces: list[type]) -> set[str]:
    return {str(call) for each in interfaces if each.__name__ not in rows() for call in calls_of(each)}


def test_every_method_of_the_contract_has_a_row_or_a_reason() -> None:
    found = contract_interfaces()
    assert len(found) > 8
    assert unseen(found) == set(WITHOUT_ROW)


@pytest.mark.parametrize("name", ["StoredIds", "Admin", "Clock", "Progress", "Newcomer"])
def test_a_new_method_or_interface_is_seen(name: str) -> None:
    def renew(self: object) -> None:
        """Nobody has listed it."""

    grown = type(name, (), {"renew": renew})
    assert unseen([grown]) - set(WITHOUT_ROW) == {f"{name}.renew"}
