"""The dense SwiGLU MLP: of the first blocks, and of the shared expert."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGluMlp(nn.Module):
    """silu(x W_gate^T) * (x W_up^T), then W_out; gate and up are one matrix, gate first."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.out_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.stacked_rows = {"in_proj.weight": (intermediate_size,) * 2}

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.in_proj(x).chunk(2, dim=-1)
        out: Tensor = self.out_proj(F.silu(gate) * up)
        return out
