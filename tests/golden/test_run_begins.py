"""Goal: the records with which a run begins that somebody asked for are read by every later release.

Method: the bytes as they were written first; what stands in them today, and what a release without them would have
written.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from headrace.contract.formats.decision import decode_decision, encode_decision, key_of
from headrace.contract.formats.steps import Branch, PassedOver, decode_step, encode_step
from headrace.trainer.commit.decisions import decision_of

BRANCH, FRESH, DECISION = (Path(__file__).parent / "data" / "run-begins.jsonl").read_bytes().splitlines()


def test_the_first_record_of_a_branch_is_read():
    first = decode_step(BRANCH)
    left_out = PassedOver(partition=1, after=(9, 0), upto=(20, 1), following=31, why="skipped")
    assert (first.run, first.step, first.ranges) == ("r2", 7, ())
    assert first.branch == Branch(
        run="r1", step=7, instead_of="r1", passed_over=(left_out,), reason="clicks of a robot", by="ada@host",
        created_ms=1_795_568_400_000,
    )  # fmt: skip
    assert encode_step(first) == BRANCH


def test_the_first_record_of_a_fresh_run_is_read():
    first = decode_step(FRESH)
    assert first.step == 0 and first.branch is not None and first.branch.run == ""
    assert decision_of(first) is None and encode_step(first) == FRESH


def test_serving_is_told_what_the_record_says():
    decision = decision_of(decode_step(BRANCH))
    assert decision is not None and decision == decode_decision(DECISION)
    assert encode_decision(decision) == DECISION
    assert key_of(decision) == "store/decision/1795568400000"


def test_a_step_of_before_has_no_branch():
    plain = msgspec.json.decode(BRANCH)
    del plain["branch"]
    assert decode_step(msgspec.json.encode(plain)).branch is None
