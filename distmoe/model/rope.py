"""Rotary position embedding (arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.config import ModelConfig
from distmoe.model.yarn import scaled_frequencies, table_scale


def rope_tables(
    position_S: Tensor, rotary_dim: int, *, model: ModelConfig
) -> tuple[Tensor, Tensor]:
    """cos and sin of these positions, each [S, rotary_dim / 2] in fp32. Computed, not stored: a
    buffer would not survive meta."""
    steps = torch.arange(0, rotary_dim, 2, device=position_S.device, dtype=torch.float32)
    exponent = steps / rotary_dim
    freq_R = scaled_frequencies(
        model.rope_theta**-exponent, theta=model.rope_theta, yarn=model.yarn
    )
    angle, scale = torch.outer(position_S.float(), freq_R), table_scale(model.yarn)
    return angle.cos() * scale, angle.sin() * scale


def rotate(x_BASD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + R/2]) of the first R values of every head, R being twice the
    width of cos, by its position's angles, in fp32: the convention of Llama, Qwen and GLM."""
    rotary_dim = 2 * cos.shape[-1]
    low, high = x_BASD[..., :rotary_dim].float().chunk(2, dim=-1)
    turned_BASR = _turned(low, high, cos, sin).to(x_BASD.dtype)
    if rotary_dim == x_BASD.shape[-1]:
        return turned_BASR
    return torch.cat([turned_BASR, x_BASD[..., rotary_dim:]], dim=-1)


def rotate_neighbours(x_BASR: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same of the pairs (x[2i], x[2i + 1]), the convention of DeepSeek. The result has the
    first of all pairs before the second: scores need but the same order in queries and keys."""
    even, odd = x_BASR.float().view(*x_BASR.shape[:-1], -1, 2).unbind(-1)
    return _turned(even, odd, cos, sin).to(x_BASR.dtype)


def _turned(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
