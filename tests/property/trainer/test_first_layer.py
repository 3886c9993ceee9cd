"""Goal: multiplying distinct ids gives what multiplying every sample's ids gives. Method: both ways, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.trainer.model.layers.first_layer import DeviceFirstLayer, FirstLayerWeights, HostFirstLayer, Read
from headrace.trainer.model.tables.distinct_ids import DistinctIds, distinct


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    samples=st.integers(1, 20),
    slots=st.integers(0, 4),
    ids=st.integers(1, 15),
    width=st.integers(0, 9),
    numerics=st.integers(0, 3),
    hidden=st.integers(1, 9),
    has_crosses=st.booleans(),
)
def test_both_ways_agree(seed, samples, slots, ids, width, numerics, hidden, has_crosses):
    rng = np.random.default_rng(seed)

    def some(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    keys_U, index_FB, begin_F = distinct(rng.integers(0, ids, (samples, slots)))
    distinct_ids, values_UV = DistinctIds(keys_U, keys_U, index_FB, begin_F), some(len(keys_U), 1 + width)
    numeric_BD, fan_in = torch.from_numpy(some(samples, numerics)), slots * width + numerics
    weights = torch.from_numpy(some(fan_in, hidden)), torch.from_numpy(some(hidden))
    grads = Read(
        *(torch.from_numpy(x) for x in (some(samples), some(samples), some(samples, hidden))),
        torch.from_numpy(some(samples, fan_in)) if has_crosses else None,
    )
    found = []
    for make in (HostFirstLayer, DeviceFirstLayer):
        layer = FirstLayerWeights(*weights, torch.full((fan_in, hidden), torch.nan), torch.full((hidden,), torch.nan))
        first_layer = make(layer, has_crosses=has_crosses)
        read = first_layer.forward(values_UV, distinct_ids, numeric_BD)
        assert (read.x_BX is not None) == has_crosses
        found.append([*read[: 4 if has_crosses else 3], first_layer.backward(grads), layer.grad_XH, layer.grad_H])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("admitted", [False, True])
def test_ids_of_a_slot_are_told_apart_whatever_their_hash(admitted):
    """Ids that share the low or the high half of their bits, all different: each its own place."""
    keys_BF = np.stack([np.arange(300) << 32, np.arange(300), np.full(300, -(2**63))], axis=1)
    keys_U, index_FB, begin_F = distinct(keys_BF, np.ones(keys_BF.shape, np.bool_) if admitted else None)
    assert begin_F.tolist() == [0, 300, 600, 601] and (keys_U[index_FB.T] == keys_BF).all()
