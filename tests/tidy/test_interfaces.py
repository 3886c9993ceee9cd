"""Goal: no method of the contract's interfaces is seen by no fault matrix without anyone noticing.

Method: every method of every interface is found in the code. A stage of a matrix calls it, or it is listed here with
what happens where it fails or never returns: that some other method of its interface has a row is not enough. A new one
is in neither, and a listed one that is no more, or that a stage calls now, is noticed.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from fault_crawl import ROWS as CRAWL_ROWS
from fault_gateway import GATEWAY
from fault_matrix import calls_of, contract_interfaces
from fault_retry import RETRY
from fault_stages import ROWS as STREAM_ROWS

TESTS = Path(__file__).resolve().parents[1]
TRAINER = "simulation/trainer/test_trainer_faults.py"
ROWS = (*STREAM_ROWS, *CRAWL_ROWS, GATEWAY, RETRY)
TIME = "the machine's own clock: it asks nobody"
SHOWN = "writes a line on the terminal; what it raises ends the run, which goes on from its steps"
LATE = "the settler waits while it is away, ends the gateway for what is unexpected, `CallWatch` where it hangs"
ARCHIVE_READS = [f"ArchiveReader.{name}" for name in ("state", "last", "read", "offset_at", "hold", "let_go")]
WITHOUT_ROW = {
    **dict.fromkeys(ARCHIVE_READS, "asked by the ledger and a retry, commands that change nothing of what is archived"),
    "TimeSeeker.offset_at": "asked by a retry's look-up, as the reads of the archive",
    "LakeReader.seals": "asked by the ledger, a command that changes nothing of what is stored",
    "LakeReader.imported": "asked by the ledger, a command that changes nothing of what is stored",
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


def literal(name: str) -> ast.Dict:
    """Return `NAME = {...}` of the trainer's matrix."""
    for node in ast.parse((TESTS / TRAINER).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            assert isinstance(node.value, ast.Dict)
            return node.value
    raise AssertionError(f"{TRAINER} has no {name}")


def trainers(found: list[type]) -> set[str]:
    """Return the calls that the trainer's matrix makes its rows of, but for those that it says others make."""
    contracts = literal("CONTRACTS")
    rooms = {ast.literal_eval(key): ast.unparse(of) for key, of in zip(contracts.keys, contracts.values, strict=True)}
    calls = {str(call) for each in found if each.__name__ in rooms.values() for call in calls_of(each)}
    said = literal("NOT_AFTER_A_COMMIT")
    for key, why in zip(said.keys, said.values, strict=True):
        if key is not None and re.fullmatch("asked by the .* only", ast.literal_eval(why)):
            room, method = ast.literal_eval(key)
            calls.discard(f"{rooms[room]}.{method}")
    return calls


def seen() -> set[str]:
    """Return the calls that have rows in a matrix: a stage that makes them, not only their interface."""
    return trainers(contract_interfaces()) | {str(call) for row in ROWS for call in row.rows()}


def unseen(interfaces: list[type]) -> set[str]:
    return {str(call) for each in interfaces for call in calls_of(each)} - seen()


def test_every_method_of_the_contract_has_a_row_or_a_reason() -> None:
    found = contract_interfaces()
    assert len(found) > 8
    assert unseen(found) == set(WITHOUT_ROW)


@pytest.mark.parametrize("name", ["StoredIds", "Admin", "Reader", "Blobs", "Clock", "Progress", "Newcomer"])
def test_a_new_method_or_interface_is_seen(name: str) -> None:
    def renew(self: object) -> None:
        """Nobody has listed it."""

    grown = type(name, (), {"renew": renew})
    assert unseen([grown]) - set(WITHOUT_ROW) == {f"{name}.renew"}
