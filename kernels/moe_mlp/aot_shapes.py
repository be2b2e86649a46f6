"""The sizes that kernels of moe_mlp are compiled for ahead of time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distmoe.kernels.moe_mlp.activations import ACTIVATIONS
from distmoe.kernels.moe_mlp.published_layers import LAYERS
from distmoe.kernels.moe_mlp.tiles import ExpertShape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """``dtype`` in Triton's names."""

    H: int = LAYERS["7B-256"].H
    I: int = LAYERS["7B-256"].I
    activation: str = "swiglu"
    dtype: str = "bf16"

    @property
    def experts(self) -> ExpertShape:
        """As launches see them; how many there are makes no other kernel."""
        gated = ACTIVATIONS[self.activation].gated
        return ExpertShape(self.H, self.I, e=1, gated=gated, dtype=DTYPES[self.dtype])

    @property
    def aligned(self) -> bool:
        """Whether every row is a multiple of 16 bytes."""
        return self.H % 8 == 0 and self.I % 8 == 0

    def __str__(self) -> str:
        return f"H{self.H} I{self.I} {self.activation} {self.dtype}"


SHAPE_7B = Shape()
SHAPE_README = Shape(LAYERS["README"].H, LAYERS["README"].I)
# Experts narrower than a tile; widths that no tile divides; one that fits no 16 bytes.
NARROW = Shape(H=2048, I=64)
RAGGED = Shape(H=1048, I=200)
UNALIGNED = Shape(H=1044, I=204)
