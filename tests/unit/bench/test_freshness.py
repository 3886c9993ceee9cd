"""The arithmetic of bench/freshness.py.

Goal: a click's wait ends with the first answer whose version contains its sample, and not before. Method: a hand-made
history of answers and steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from headrace.contract.formats.positions import Position
from headrace.contract.formats.steps import Step

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

from freshness import HOPS, Resolved, freshness_ms, hops_ms
from loop import sustained


def step(number: int, positions: dict[str, list[int]]) -> Step:
    return Step(model="shop", run="r", step=number, ranges=(), positions=positions)


STEPS = {
    f"r-{s.step}": s for s in (step(1, {"0": [5, 0]}), step(2, {"0": [5, 3], "1": [9, 0]}), step(3, {"0": [6, 0]}))
}
ANSWERS = [(10.0, "r-1"), (10.2, "r-1"), (10.4, "r-2"), (10.6, "r-unknown"), (10.8, "r-3")]


def test_the_wait_ends_with_the_first_answer_that_contains_the_click():
    flushed = {"a": 10.0, "b": 10.1, "c": 10.1, "d": 10.1}
    places = {"a": (0, Position(5, 0)), "b": (0, Position(5, 2)), "c": (1, Position(9, 0)), "d": (0, Position(6, 0))}
    assert freshness_ms(flushed, places, STEPS, ANSWERS) == pytest.approx([0.0, 300.0, 300.0, 700.0])


def test_a_click_that_no_answer_contains_has_no_wait():
    assert freshness_ms({"a": 1.0}, {"a": (1, Position(9, 1)), "stranger": (0, Position(0, 0))}, STEPS, ANSWERS) == []


def test_the_hops_of_a_click_add_up_to_its_wait():
    resolved = Resolved({"a": (0, Position(5, 2)), "b": (0, Position(7, 0))}, {"a": 10_060, "b": 10_070})
    read = [(10_090 + 30 * n, STEPS[f"r-{n}"]) for n in (1, 2, 3)]
    answers = [(10_200.0, STEPS["r-1"]), (10_250.0, None), (10_300.0, STEPS["r-3"])]
    found = hops_ms({"a": 10_000.0, "b": 10_000.0}, {"a": 10_025, "b": 10_025}, resolved, read, read[2:], answers)
    # The step that holds it is the second, the delta the third; "b" is in none.
    assert [found[hop] for hop in HOPS] == [[25.0], [35.0], [90.0], [30.0], [120.0]]


def test_a_rate_leaves_out_the_start_and_the_tail():
    rise = [(0.0, 100.0), (5.0, 100.0), *((5.0 + t, 100.0 + 20.0 * t) for t in range(1, 11)), (60.0, 300.0)]
    assert sustained(rise) == pytest.approx(20.0)
