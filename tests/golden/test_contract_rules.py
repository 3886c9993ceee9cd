"""Goal: a change of rules that was written once is read for ever. Method: records as they were written, byte for byte.

The file is never made anew: a build that can't read it can't read a log either.
"""

from __future__ import annotations

from pathlib import Path

from rules_world import WIDE

from headrace.contract.rules import Written, decode_change, decode_entry, encode_change, rules_of

CHANGE, WRITTEN = (Path(__file__).parent / "data" / "rules.jsonl").read_bytes().splitlines()


def test_a_change_is_read_and_passed_on_byte_for_byte():
    change = decode_change(CHANGE, where="golden")
    assert (change.number, change.digest) == (2, "b8e05f7f0fb3e9b6")
    assert change.rules == rules_of(WIDE)
    assert encode_change(change) == CHANGE


def test_where_it_lies_is_read():
    assert decode_entry(WRITTEN, where="golden") == Written(number=2, offsets={"0": 17, "1": 9})
