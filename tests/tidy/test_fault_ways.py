"""Goal: no way in which a call can fail falls out of a fault matrix unseen. Method: the ways are written down here once
more; rows cannot fall out, they are made from the contracts and held against what is called."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from fault_matrix import Call, Fault, faults_of

from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.log import Producer

TESTS = Path(__file__).resolve().parents[1]
ANY = {
    *("UNAVAILABLE", "UNEXPECTED", "MEMORY", "BARE", "AWAY"),
    *("NEVER", "NEVER_LATE", "NEVER_DONE"),
    *("DONE_UNAVAILABLE", "DONE_UNEXPECTED"),
    *("DIES_BEFORE", "DIES_IN", "DIES_AFTER"),
}
RECEIPT = {"UNAVAILABLE", "AWAY", "DONE_UNAVAILABLE", "NEVER", "NEVER_DONE", "DIES_BEFORE", "DIES_AFTER"}
TRAINER = {"unavailable", "unexpected", "no memory", "dies"}
TRAINER |= {"effect, then unavailable", "effect, then unexpected", "effect, then dies"}
TRAINER |= {"never returns", "effect, then never returns"}
UPDATER = {"unavailable", "runtime", "memory", "dies", "never returns"}


@pytest.mark.parametrize(
    ("call", "ways"),
    [
        (Call(Blobs, "put"), ANY),
        (Call(Producer, "send"), ANY | {"FULL"}),
        (Call(Producer, "send.delivered"), RECEIPT),
    ],
    ids=["call", "call that may be full", "receipt"],
)
def test_a_call_of_a_stage_fails_in_every_way(call: Call, ways: set[str]) -> None:
    assert {fault.name for fault in faults_of(call)} == ways
    assert {fault.name for fault in Fault} >= ways


@pytest.mark.parametrize(
    ("file", "ways"),
    [("simulation/trainer/test_trainer_faults.py", TRAINER), ("unit/serving/model/test_updater_faults.py", UPDATER)],
    ids=["trainer", "updater"],
)
def test_a_call_of_trainer_and_updater_fails_in_every_way(file: str, ways: set[str]) -> None:
    found = [literal_of(node) for node in ast.parse((TESTS / file).read_text()).body]
    assert ways in found, f"{file}: FAILURES has other ways than are written here"


def literal_of(node: ast.stmt) -> set[str]:
    """Return the texts of `FAILURES = (...)`, or the keys of `FAILURES = {...}`; nothing of another statement."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    value = getattr(node, "value", None)
    if not (isinstance(target, ast.Name) and target.id == "FAILURES"):
        return set()
    texts = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
    return {text.value for text in texts if isinstance(text, ast.Constant)}
