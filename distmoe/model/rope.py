"""Rotary position embedding (arXiv 2104.09864), halves convention of Llama and Qwen."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(
    num_positions: int, head_dim: int, *, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin, each [S, D/2] in fp32. Computed, not stored: a buffer would not survive meta."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    position = torch.arange(num_positions, device=device, dtype=torch.float32)
    angle = torch.outer(position, theta**-exponent)
    return angle.cos(), angle.sin()


def rotate(x_BASD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of every head by its position's angles, in fp32."""
    low, high = x_BASD.float().chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x_BASD.dtype)
