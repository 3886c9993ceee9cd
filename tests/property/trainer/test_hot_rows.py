"""Goal: where a row lies changes no number. Method: `HotRows` beside `Tables`, equal batches, the cache's home the CPU.

The cache has room for fewer rows than come, so rows go and come back; slots share ids; ids are admitted, expire and
come again, whose rows others have had meanwhile.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.contract.spec import PAD
from headrace.trainer.model.digest import digest
from headrace.trainer.model.tables.admission import Admission
from headrace.trainer.model.tables.group import SlotTable, Tables
from headrace.trainer.model.tables.hot_rows import HotRows
from headrace.trainer.model.tables.optimizers import Optimizer

OPTIMIZERS = {
    "adagrad_row": Optimizer("adagrad_row", lr=0.1, l2=0.01, half_life_ms=5_000),
    "adagrad": Optimizer("adagrad", lr=0.1, l2=0.01),
    "ftrl": Optimizer("ftrl", lr=0.1, l1=0.5, l2=0.1),
    "adam": Optimizer("adam", lr=0.01, l2=0.01),
}
DIM, SLOTS, SWEEPS = 3, 4, 4_096


def tables(kind: str, after: int) -> Tables:
    """Return tables of two kinds of rows whose slots share ids within a kind."""
    wide, narrow = SlotTable(DIM, OPTIMIZERS[kind]), SlotTable(0, OPTIMIZERS["adagrad_row"])
    slots = [wide, wide, narrow, wide]
    return Tables(slots, seed=7, scale=0.3, admission=Admission(after), expire_after_ms=4_000)


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31), after=st.integers(1, 2), room=st.integers(1, 30))
def test_rows_learn_on_the_device_as_they_do_at_home(kind, seed, after, room):
    rng, home = np.random.default_rng(seed), tables(kind, after)
    hot, twin = (HotRows(tables(kind, after), device="cpu", rows=room) for _ in range(2))
    now_ms = 0
    for step in range(14):
        now_ms += int(rng.integers(0, 3_000))
        times_B = np.full(6, now_ms)
        keys_BF = rng.integers(0, 12, (6, SLOTS)) + np.array([0, 0, 100, 0])
        keys_BF[rng.random(keys_BF.shape) < 0.1] = PAD
        ids_of_each = [one.distinct_ids(keys_BF, times_B) for one in (home, hot, twin)]
        values_UV = [one.gather(ids) for one, ids in zip((home, hot, twin), ids_of_each, strict=True)]
        np.testing.assert_allclose(values_UV[1].numpy(), values_UV[0], atol=1e-4)
        grad_UV = rng.normal(size=values_UV[0].shape).astype(np.float32)
        touched = home.update(ids_of_each[0], grad_UV, times_B)
        for one, ids in ((hot, ids_of_each[1]), (twin, ids_of_each[2])):
            assert sorted(one.update(ids, torch.from_numpy(grad_UV), times_B).tolist()) == sorted(touched.tolist())
        for _ in range(SWEEPS if step % 5 == 4 else 1):
            gone = [one.expire(now_ms).tolist() for one in (home, hot, twin)]
            assert gone[0] == gone[1] == gone[2]
        asked = np.concatenate([np.arange(15), np.arange(100, 112), [PAD]])
        np.testing.assert_allclose(hot.lookup(asked), home.lookup(asked), atol=1e-4)
        assert len(hot) == len(home)
        if step == 7:
            state = hot.state()
            twin = HotRows(tables(kind, after), device="cpu", rows=room + 5)
            twin.load(state)
    assert digest(hot.state()) == digest(twin.state()), "a checkpoint and another size of cache change no bit"
    np.testing.assert_array_equal(hot.state()["0.last_s"], home.state()["0.last_s"])


def test_the_least_recently_used_go_home():
    hot = HotRows(Tables([SlotTable(1, Optimizer())], seed=1, scale=0.1), device="cpu", rows=8)
    held = hot.device_bytes
    for key in range(20):
        ids = hot.distinct_ids(np.array([[key], [0]]))
        hot.update(ids, torch.ones(hot.gather(ids).shape), np.zeros(2, np.int64))
    (cache,) = hot.caches
    on_device = set(cache.keys_H[cache.rows_H >= 0].tolist())
    assert {0, 19} <= on_device and 1 not in on_device and len(on_device) <= 8
    assert hot.device_bytes == held == 8 * 4 * (2 + 2)
    ids = hot.distinct_ids(np.arange(30)[:, None])
    hot.gather(ids)
    assert len(cache.rows_H) >= 30, "a batch that is larger than the cache extends it"
