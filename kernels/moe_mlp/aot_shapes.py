"""The sizes that kernels of moe_mlp are compiled for ahead of time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distmoe.kernels.moe_mlp.activations import ACTIVATIONS


@dataclass(frozen=True)
class Shape:
    """``dtype`` in Triton's names."""

    H: int = 1536
    I: int = 256
    activation: str = "swiglu"
    dtype: str = "bf16"

    @property
    def width(self) -> int:
        """G, columns of z."""
        return ACTIVATIONS[self.activation].width(self.I)

    @property
    def gated(self) -> bool:
        return ACTIVATIONS[self.activation].gated

    @property
    def aligned(self) -> bool:
        """Whether every row is a multiple of 16 bytes."""
        return self.H % 8 == 0 and self.I % 8 == 0

    def reduction(self, kernel: str) -> float:
        """Length of the sum behind an element; that of a weight gradient depends on the data."""
        lengths = {"up": self.H, "dgrad": self.H, "down": self.I, "dx": self.width}
        return lengths.get(kernel, math.inf)

    def columns(self, kernel: str) -> int:
        """Columns of the result, to which a tile is fitted."""
        widths = {"up": self.I, "dgrad": self.I, "wgrad_out": self.I}
        return widths.get(kernel, self.H)

    def __str__(self) -> str:
        return f"H{self.H} I{self.I} {self.activation} {self.dtype}"


# The 7B configuration of SonicMoE; widths that no tile divides; one that fits no 16 bytes.
SHAPE_7B = Shape()
RAGGED = Shape(H=1048, I=200)
UNALIGNED = Shape(H=1044, I=204)
