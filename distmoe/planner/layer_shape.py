"""The sizes of one expert layer, as far as its time depends on them."""

from __future__ import annotations

from dataclasses import dataclass

ITEMSIZE = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class LayerShape:
    """T tokens on each rank, H, I, E experts in all, K, tile M; ``dtype`` is bf16 or fp32."""

    num_tokens: int
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    tile: int = 128
    dtype: str = "bf16"
    gated: bool = True

    @property
    def row_bytes(self) -> int:
        return self.hidden * ITEMSIZE[self.dtype]

    @property
    def flops_per_pair(self) -> int:
        """Of the forward, of dgrad, and of wgrad."""
        z_width = (2 if self.gated else 1) * self.intermediate
        return 2 * self.hidden * (z_width + self.intermediate)
