"""Goal: a number in text is decimal digits at every door, and none is longer than what reads it takes."""

from __future__ import annotations

import math

import pytest

from headrace.ingest.decode.numbers import DECIMAL, INTEGER, NUMBER

NONE = ("", " 1", "1 ", "1_0", "inf", "nan", "0x1", "\u0663", "1,5", "--1", "1e", ".", "e5", "1\n")


@pytest.mark.parametrize("text", NONE)
def test_what_only_python_reads_is_no_number(text: str) -> None:
    assert not any(pattern.fullmatch(text) for pattern in (INTEGER, DECIMAL, NUMBER))


@pytest.mark.parametrize("text", ["0", "-5", "+7", "007", "9" * 20])
def test_an_integer_is_of_all_kinds(text: str) -> None:
    assert all(pattern.fullmatch(text) for pattern in (INTEGER, DECIMAL, NUMBER))


@pytest.mark.parametrize("text", ["1.5", "-0.25", "1772368496.123456789"])
def test_a_decimal_is_no_integer(text: str) -> None:
    assert not INTEGER.fullmatch(text) and DECIMAL.fullmatch(text) and NUMBER.fullmatch(text)


@pytest.mark.parametrize("text", ["1e5", "1.", ".5", "-2.5E-7", repr(1.7976931348623157e308), "1" + "0" * 308])
def test_whatever_a_float_holds_is_a_number(text: str) -> None:
    assert NUMBER.fullmatch(text) and math.isfinite(float(text))


def test_none_is_longer_than_python_reads() -> None:
    for pattern in (INTEGER, DECIMAL, NUMBER):
        assert not pattern.fullmatch("1" * 4_301)
