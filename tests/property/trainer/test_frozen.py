"""Goal: a view of a table has the bits of the moment at which it was frozen, whatever is learnt while it is read.

Method: keys are learnt, expire and begin anew, at random; between reads of the view more of it happens. The oracle is
the learner's own state, copied at the freeze. Pages are made small, so that there are many.
"""

from __future__ import annotations

import gc
import weakref

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_world import CHANGING as RECIPES
from learner_world import CHANGING_SPEC as SPEC
from learner_world import learn

from headrace.contract.errors import InvariantBroken
from headrace.trainer.model.frozen import Frozen, Watch
from headrace.trainer.model.learner import TableLearner, make_learner
from headrace.trainer.model.tables import changes
from headrace.trainer.model.tables.table import Table


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "PAGE_BYTES", 300)


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def read(frozen: Frozen, learner: TableLearner, rng: np.random.Generator, clock: list[int]) -> dict[str, np.ndarray]:
    """Read the view while more is learnt between and in the middle of its reads."""
    for table in frozen.tables.values():
        rows = table.rows
        plain = rows._changes.saved

        def learns_first(view: object, plain: object = plain) -> object:
            learn(learner, rng, clock, int(rng.integers(0, 3)))
            return plain(view)  # type: ignore[operator]

        rows._changes.saved = learns_first  # type: ignore[method-assign, assignment]
    try:
        return frozen.state()
    finally:
        for table in frozen.tables.values():
            del table.rows._changes.saved


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_view_has_the_bits_of_its_moment(recipe, seed):
    rng, clock = np.random.default_rng(seed), [0]
    learner = make_learner(recipe, SPEC)
    checkpoint, snapshot = Watch(learner, between=True), Watch(learner, between=False)
    for _ in range(3):
        learn(learner, rng, clock, int(rng.integers(1, 6)))
        state, weights = learner.state(), learner.weights()
        one, two = checkpoint.freeze(), snapshot.freeze()
        learn(learner, rng, clock, int(rng.integers(0, 6)))
        same(read(one, learner, rng, clock), state)
        said = two.weights()
        np.testing.assert_array_equal(said.keys_K, weights.keys_K)
        np.testing.assert_array_equal(said.values_KV, weights.values_KV)
        same(said.dense, weights.dense)
        one.close()
        two.close()
        assert checkpoint.saved_bytes == snapshot.saved_bytes == 0
    snapshot.end()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_row_that_changed_between_two_freezes_is_noted(recipe, seed):
    rng, clock = np.random.default_rng(seed), [0]
    learner = make_learner(recipe, SPEC)
    watch = Watch(learner, between=True)
    before: dict[str, np.ndarray] = {}
    for _ in range(4):
        learn(learner, rng, clock, int(rng.integers(0, 5)))
        frozen = watch.freeze()
        for name, table in frozen.tables.items():
            words_RW = table.rows._changes.words_RW[: table.rows.high].copy()
            old_RW = before.get(name, words_RW[:0])
            differ_R = np.ones(len(words_RW), np.bool_)
            differ_R[: len(old_RW)] = (words_RW[: len(old_RW)] != old_RW).any(1)
            assert set(np.flatnonzero(differ_R).tolist()) <= set(table.rows.changed().tolist())
            before[name] = words_RW
        frozen.close()


def test_a_view_has_what_a_device_had_learnt():
    """Rows that are hot on a device are brought home when the view is made."""
    deep = msgspec.structs.replace(RECIPES["rows expire"], model="deepfm", hidden=(4,))
    rng, clock = np.random.default_rng(6), [0]
    learner = make_learner(deep, SPEC, device="cpu", device_rows=12)
    watch = Watch(learner, between=True)
    for _ in range(6):
        learn(learner, rng, clock, 3)
        frozen = watch.freeze()
        state = learner.state()
        learn(learner, rng, clock, 3)
        same(frozen.state(), state)
        frozen.close()


def test_a_state_of_one_row_is_a_copy():
    """A single row is contiguous where it lies."""
    learner = make_learner(RECIPES["rows expire"], SPEC)
    table = learner.table.tables[0]  # type: ignore[attr-defined]
    table.index.insert(np.array([5], np.int64))
    for column in table.state().values():
        assert not np.shares_memory(column, table.index.arrays.words_RW)


def test_marks_begin_anew_after_255_freezes():
    rng, clock = np.random.default_rng(1), [0]
    learner = make_learner(RECIPES["rows expire"], SPEC)
    watch = Watch(learner, between=True)
    for _ in range(600):
        learn(learner, rng, clock, 1)
        state, frozen = learner.state(), watch.freeze()
        learn(learner, rng, clock, 1)
        assert len(frozen.tables["table.0."].rows.changed()) > 0
        same(frozen.state(), state)


def test_a_row_that_is_not_told_of_is_seen_in_the_view(monkeypatch):
    """Planted: the optimizer changes rows and says nothing."""
    rng, clock = np.random.default_rng(3), [0]
    learner = make_learner(RECIPES["rows expire"], SPEC)
    learn(learner, rng, clock, 4)
    watch = Watch(learner, between=True)
    plain = Table.update

    def silent(table: Table, *args: object) -> object:
        listeners, table.index.listeners = table.index.listeners, []
        try:
            return plain(table, *args)  # type: ignore[arg-type]
        finally:
            table.index.listeners = listeners

    monkeypatch.setattr(Table, "update", silent)
    state, frozen = learner.state(), watch.freeze()
    learn(learner, rng, clock, 4)
    with pytest.raises(AssertionError):
        same(frozen.state(), state)


def test_a_view_that_was_closed_is_not_read():
    learner = make_learner(RECIPES["in order"], SPEC)
    learn(learner, np.random.default_rng(2), [0], 3)
    watch = Watch(learner, between=True)
    frozen = watch.freeze()
    watch.freeze()
    with pytest.raises(InvariantBroken, match="after it was closed"):
        frozen.state()
    learner.load(learner.state())
    with pytest.raises(InvariantBroken, match="loaded anew"):
        watch.freeze()


def test_a_learner_that_nobody_has_takes_its_memory_along():
    """Tables reserve much: they must not wait for the collector of circles."""
    learner = make_learner(RECIPES["rows expire"], SPEC)
    learn(learner, np.random.default_rng(2), [0], 3)
    watch = Watch(learner, between=True)
    watch.freeze().state()
    gone = weakref.ref(learner.table.tables[0].index)  # type: ignore[attr-defined]
    gc.disable()
    try:
        del learner, watch
        assert gone() is None
    finally:
        gc.enable()
