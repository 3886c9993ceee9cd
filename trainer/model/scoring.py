"""DeepFM's forward pass in NumPy: what serving scores with. Imports no torch.

    logit = bias + sum_f w_f + x . numeric_weight + FM(v) + MLP([v_1 .. v_F, x])
    FM(v) = 1/2 sum_d ((sum_f v_fd)^2 - sum_f v_fd^2)

Dense weights by name: `bias` [1], `numeric` [D], `w0` [F * dim + D, H0], `b0` [H0], ... and last `w<n>` [H, 1],
`b<n>` [1]. The torch twin in `deepfm` computes the same; both agree within 1e-5.

Source: Guo et al., "DeepFM", IJCAI 2017; the factorisation machine's identity from Rendle, ICDM 2010.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Float32s = npt.NDArray[np.float32]
Lookup = Callable[[npt.NDArray[np.int64]], Float32s]
"""Gives the values of keys: int64 [K] to float32 [K, 1 + dim]."""


def logits(values_BFV: Float32s, numeric_BD: Float32s, dense: Mapping[str, Float32s]) -> Float32s:
    """Return float32 [B]."""
    batch, slots, width = values_BFV.shape
    embedding_BFE = values_BFV[:, :, 1:]
    sum_BE = embedding_BFE.sum(axis=1)
    fm_B = 0.5 * ((sum_BE * sum_BE).sum(axis=1) - (embedding_BFE * embedding_BFE).sum(axis=(1, 2)))
    x_BX = np.concatenate([embedding_BFE.reshape(batch, slots * (width - 1)), numeric_BD], axis=1)
    layer = 0
    while f"w{layer + 1}" in dense:
        x_BX = np.maximum(x_BX @ dense[f"w{layer}"] + dense[f"b{layer}"], 0)
        layer += 1
    deep_B = (x_BX @ dense[f"w{layer}"] + dense[f"b{layer}"])[:, 0]
    linear_B = values_BFV[:, :, 0].sum(axis=1) + numeric_BD @ dense["numeric"] + dense["bias"][0]
    out_B: Float32s = (linear_B + fm_B + deep_B).astype(np.float32)
    return out_B


def sigmoid(logits_B: Float32s) -> Float32s:
    """Return probabilities without overflow: float32 [B]."""
    small_B = np.exp(-np.abs(logits_B))
    out_B: Float32s = np.where(logits_B >= 0, 1 / (1 + small_B), small_B / (1 + small_B)).astype(np.float32)
    return out_B


def score(
    slots_BF: npt.NDArray[np.int64], numeric_BD: Float32s, *, lookup: Lookup, dense: Mapping[str, Float32s]
) -> Float32s:
    """Return the probability of a positive for each sample: float32 [B]."""
    batch, slots = slots_BF.shape
    values_NV = lookup(np.ascontiguousarray(slots_BF).reshape(-1))
    return sigmoid(logits(values_NV.reshape(batch, slots, values_NV.shape[-1]), numeric_BD, dense))
