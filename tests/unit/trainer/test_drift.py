"""Goal: a label rate that jumps is told, with numbers, and a steady one never is. Method: seeded coin tosses."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.trainer.validation.drift import LabelRateWatch


def changes(seed: int, rates: np.ndarray, rows: int = 400) -> list[tuple[int, float, float]]:
    """Feed windows of these rates; return (window, usual, rate) of every alarm."""
    rng, watch, found = np.random.default_rng(seed), LabelRateWatch(), []
    for at, rate in enumerate(rates):
        n = int(rng.integers(rows // 2, rows * 2))
        change = watch.take(float(rng.binomial(n, rate)), n)
        if change is not None and change.is_sudden:
            found.append((at, change.usual, change.rate))
    return found


@pytest.mark.parametrize("rate", [0.002, 0.02, 0.45, 0.9])
def test_a_steady_rate_never_alarms(rate):
    assert not [seed for seed in range(40) if changes(seed, np.full(300, rate))]


def test_daily_ups_and_downs_are_usual():
    wave = 0.3 + 0.03 * np.sin(np.arange(600) / 24)
    assert not [seed for seed in range(20) if changes(seed, wave)]


@pytest.mark.parametrize(("before", "after"), [(0.45, 0.3), (0.45, 0.7), (0.02, 0.05), (0.01, 0.03), (0.1, 0.0)])
def test_a_jump_alarms_once_soon_and_with_numbers(before, after):
    for seed in range(25):
        rates = np.concatenate([np.full(100, before), np.full(100, after)])
        found = changes(seed, rates)
        assert len(found) == 1, (seed, found)
        at, usual, rate = found[0]
        assert 100 <= at <= 116, seed
        assert abs(usual - before) < 0.25 * before
        assert (rate - before) * (after - before) > 0


def test_the_watch_goes_on_after_a_restart():
    rng, one = np.random.default_rng(3), LabelRateWatch()
    for _ in range(40):
        one.take(float(rng.binomial(700, 0.4)), 700)
    two = LabelRateWatch()
    two.load(one.state())
    for rate in (0.4, 0.4, 0.1, 0.1):
        clicks = float(rng.binomial(700, rate))
        assert one.take(clicks, 700) == two.take(clicks, 700)
