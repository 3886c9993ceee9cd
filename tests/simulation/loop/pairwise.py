"""Rows of a matrix of options: few of them have every level, more have every pair of levels that goes together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

Row = dict[str, Any]
Pair = frozenset[tuple[str, Any]]
TRIES = 60


def pairwise(factors: Mapping[str, Sequence[Any]], is_possible: Callable[[Row], bool], seed: int = 1) -> list[Row]:
    """Return rows of one level a factor, so that each possible pair of levels is in one. The first rows have the most.

    Greedy and seeded: a row begins with a pair that no row has, and takes, factor by factor in random order, the level
    that brings the most new pairs; the best of some tries counts.
    """
    random, names = Random(seed), list(factors)
    missing = {
        frozenset({(one, a), (other, b)})
        for one, other in itertools.combinations(names, 2)
        for a, b in itertools.product(factors[one], factors[other])
        if is_possible({one: a, other: b})
    }
    rows = list[Row]()
    while missing:
        tries = [_row(factors, is_possible, missing, random) for _ in range(TRIES)]
        best = max(tries, key=lambda row: len(_pairs(row) & missing))
        missing -= _pairs(best)
        rows.append(best)
    return rows


def covering(rows: Sequence[Row]) -> list[Row]:
    """Return as few of the rows as have each level that any of them has, greedily."""
    missing, left, chosen = {level for row in rows for level in row.items()}, list(rows), list[Row]()
    while missing:
        best = max(left, key=lambda row: len(row.items() & missing))
        missing -= best.items()
        left.remove(best)
        chosen.append(best)
    return chosen


def _row(
    factors: Mapping[str, Sequence[Any]], is_possible: Callable[[Row], bool], missing: set[Pair], random: Random
) -> Row:
    # Sorted, since a set's order is that of ids.
    row: Row = dict(random.choice(sorted(missing, key=_name)))
    names = [name for name in factors if name not in row]
    random.shuffle(names)
    for name in names:
        levels = [level for level in factors[name] if is_possible({**row, name: level})]
        random.shuffle(levels)
        row[name] = max(levels, key=lambda level: len(_pairs({**row, name: level}) & missing))
    return {name: row[name] for name in factors}


def _pairs(row: Row) -> set[Pair]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def _name(pair: Pair) -> list[str]:
    return sorted(f"{factor}={level.__name__}" for factor, level in pair)
