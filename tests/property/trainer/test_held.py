"""Goal: a task of a long window is learnt in the order of its impressions, whatever the stream and its cuts.

Method: streams from hypothesis. A plain loop over single samples, with a list for what waits, is the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.contract.recipe import Recipe
from headrace.trainer.model import held
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.held import Held

RECIPE = Recipe(task="click", tasks=("click", "buy", "pay"))
ORDERED = ("buy", "pay")
SAMPLES = st.lists(
    st.tuples(
        st.integers(0, 2),  # task
        st.sampled_from([0.0, 0.0, 1.0, 2.5]),  # label or value
        st.integers(0, 30),  # impression time
        st.booleans(),  # a correction, where it is positive
    ),
    max_size=40,
)


def batch_of(samples: list[tuple[int, float, int, bool]], first: int = 0) -> Batch:
    """Return samples whose id is their number."""
    task, label, time, correction = (list(column) for column in zip(*samples, strict=True)) if samples else ([],) * 4
    numbers = np.arange(first, first + len(samples))
    label_B = np.array(label, np.float32)
    return Batch(
        numbers[:, None].astype(np.int64),
        numbers[:, None].astype(np.float32),
        label_B,
        np.ones(len(samples), np.float32),
        np.array(time, np.int64),
        np.array(task, np.int8),
        numbers.astype(np.int64),
        np.array(correction, np.bool_) & (label_B != 0),
    )


def new() -> Held:
    return Held(RECIPE, ORDERED, slots=1, numerics=1)


def plain(samples: list[tuple[int, float, int, bool]]) -> tuple[list[int], list[int]]:
    """Return the numbers of samples as they are learnt, and of those that still wait."""
    front, waiting, learnt = {}, [], []
    for number, (task, label, time, correction) in enumerate(samples):
        is_ordered, positive = RECIPE.heads[task] in ORDERED, label != 0
        if is_ordered and positive and not correction and time > front.get(task, -1):
            waiting.append(number)
            continue
        learnt.append(number)
        if is_ordered and not positive:
            front[task] = max(time, front.get(task, -1))
            reached = [n for n in waiting if samples[n][0] == task and samples[n][2] <= front[task]]
            learnt += reached
            waiting = [n for n in waiting if n not in reached]
    return learnt, waiting


@given(SAMPLES, st.lists(st.integers(0, 40), max_size=5))
def test_positives_follow_the_negatives_of_their_time(samples, cuts):
    """However the stream is cut, and with a load of the state between any two batches."""
    bounds, one, learnt = sorted({0, len(samples), *(cut for cut in cuts if cut < len(samples))}), new(), []
    for begin, end in itertools.pairwise(bounds):
        batch = batch_of(samples[begin:end], begin)
        before = one.batch.id_B.tolist()
        freed = one.freed_slots(batch)[:, 0].tolist()
        taken = one.take(batch)
        numbers = taken.batch.id_B.tolist()
        learnt += numbers
        # Whence each came: a place in the batch, or what was held.
        assert [n for n, place in zip(numbers, taken.place_M, strict=True) if place < 0] == [
            n for n in numbers if n in before
        ]
        assert sorted(freed) == sorted(n for n in numbers if n in before)
        assert all(batch.id_B[place] == n for n, place in zip(numbers, taken.place_M, strict=True) if place >= 0)
        assert {begin + int(at) for at in np.flatnonzero(taken.waits_B)} == set(one.batch.id_B.tolist()) - set(before)
        again = new()
        again.load(one.state())
        one = again
    wanted, waiting = plain(samples)
    assert learnt == wanted
    assert one.batch.id_B.tolist() == waiting and len(one) == len(waiting)


@given(SAMPLES)
def test_what_is_learnt_are_whole_samples(samples):
    one, rest = new(), batch_of([(1, 0.0, 31, False), (2, 0.0, 31, False)], len(samples))
    parts = [one.take(batch_of(samples)).batch, one.take(rest).batch]
    for part in parts:
        every = batch_of([*samples, (1, 0.0, 31, False), (2, 0.0, 31, False)])
        for name in Batch.__dataclass_fields__:
            assert np.array_equal(getattr(part, name), getattr(every, name)[part.id_B])
    assert sum(map(len, parts)) == len(samples) + 2 and not len(one)


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1,) * 7])
def test_what_waits_is_bounded_and_those_that_came_first_give_way(sizes, monkeypatch):
    monkeypatch.setattr(held, "HELD_MAX", 4)
    one, learnt, at = new(), [], 0
    for size in sizes:
        batch = batch_of([(1, 1.0, 9 - n, False) for n in range(at, at + size)], at)
        freed, taken = one.freed_slots(batch)[:, 0].tolist(), one.take(batch)
        assert freed == [n for n, place in zip(taken.batch.id_B.tolist(), taken.place_M, strict=True) if place < 0]
        learnt += taken.batch.id_B.tolist()
        at += size
    assert learnt == [0, 1, 2] and one.batch.id_B.tolist() == [3, 4, 5, 6]
