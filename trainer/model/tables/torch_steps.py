"""The steps of `optimizers` in torch, for rows that live on a device. The same formulas, distinct rows.

Axes: K distinct rows, V values (the linear weight, then the embedding), S optimizer's numbers.
"""

from __future__ import annotations

import math

import torch

from headrace.trainer.model.tables.optimizers import Optimizer

_EPSILON, _ADAM_EPSILON = 1e-6, 1e-8


def step(
    optimizer: Optimizer, values_KV: torch.Tensor, states_KS: torch.Tensor, grad_KV: torch.Tensor, idle_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and optimizer's numbers after one step.

    Args:
        grad_KV: sums of gradients.
        idle_K: seconds since each row's last use, for the half-life of Adagrad's sums.
    """
    how = {"adagrad_row": _adagrad_row, "adagrad": _adagrad, "ftrl": _ftrl, "adam": _adam}[optimizer.kind]
    # FTRL has l2 in its formula.
    grad_KV = grad_KV if optimizer.kind == "ftrl" or not optimizer.l2 else grad_KV + optimizer.l2 * values_KV
    kept_K1 = torch.exp2(-idle_K / (optimizer.half_life_ms / 1_000))[:, None] if optimizer.half_life_ms else 1.0
    return how(optimizer, values_KV, states_KS, grad_KV, kept_K1)


def _adagrad_row(
    o: Optimizer, w_KV: torch.Tensor, s_KS: torch.Tensor, g_KV: torch.Tensor, kept_K1: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    squares_KV = g_KV * g_KV
    if w_KV.shape[1] == 1:
        s_KS = torch.cat([kept_K1 * s_KS[:, :1] + squares_KV, s_KS[:, 1:]], 1)
        return w_KV - o.lr * g_KV / (s_KS[:, :1].sqrt() + _EPSILON), s_KS
    s_KS = kept_K1 * s_KS + torch.stack([squares_KV[:, 0], squares_KV[:, 1:].mean(1)], 1)
    rate_K2 = o.lr / (s_KS.sqrt() + _EPSILON)
    rate_KV = torch.cat([rate_K2[:, :1], rate_K2[:, 1:].expand(-1, w_KV.shape[1] - 1)], 1)
    return w_KV - rate_KV * g_KV, s_KS


def _adagrad(
    o: Optimizer, w_KV: torch.Tensor, s_KV: torch.Tensor, g_KV: torch.Tensor, kept_K1: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    s_KV = kept_K1 * s_KV + g_KV * g_KV
    return w_KV - o.lr * g_KV / (s_KV.sqrt() + _EPSILON), s_KV


def _ftrl(
    o: Optimizer, w_KV: torch.Tensor, s_KS: torch.Tensor, g_KV: torch.Tensor, kept_K1: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    z_KV, n_KV = s_KS.chunk(2, 1)
    root_KV = (n_KV + g_KV * g_KV).sqrt()
    z_KV = z_KV + g_KV - (root_KV - n_KV.sqrt()) / o.lr * w_KV
    solved_KV = -(z_KV - z_KV.sign() * o.l1) / ((o.beta + root_KV) / o.lr + o.l2)
    w_KV = torch.where(z_KV.abs() <= o.l1, 0.0, solved_KV)
    return w_KV, torch.cat([z_KV, n_KV + g_KV * g_KV], 1)


def _adam(
    o: Optimizer, w_KV: torch.Tensor, s_KS: torch.Tensor, g_KV: torch.Tensor, kept_K1: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    width = w_KV.shape[1]
    m_KV, v_KV, t_K1 = s_KS[:, :width], s_KS[:, width : 2 * width], s_KS[:, 2 * width :] + 1
    m_KV = o.beta1 * m_KV + (1 - o.beta1) * g_KV
    v_KV = o.beta2 * v_KV + (1 - o.beta2) * g_KV * g_KV
    steps_K1 = t_K1.double()
    rate_K1 = (
        o.lr * (1 - torch.exp(steps_K1 * math.log(o.beta2))).sqrt() / (1 - torch.exp(steps_K1 * math.log(o.beta1)))
    )
    return w_KV - rate_K1.float() * m_KV / (v_KV.sqrt() + _ADAM_EPSILON), torch.cat([m_KV, v_KV, t_K1], 1)
