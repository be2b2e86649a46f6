"""The sizes of one expert layer, as far as its time depends on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distmoe.moe.row_formats import TravelFormats

ITEMSIZE = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class LayerShape:
    """T tokens on each rank, H, I, E experts in all, K, tile M; ``dtype`` is bf16 or fp32,
    ``row_dtype`` and ``sum_dtype`` as in `DispatchConfig`."""

    num_tokens: int
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    tile: int = 128
    dtype: str = "bf16"
    gated: bool = True
    row_dtype: str = "computed"
    sum_dtype: Literal["computed", "bf16"] = "computed"

    @property
    def row_bytes(self) -> int:
        """Of a row that experts compute with."""
        return self.hidden * ITEMSIZE[self.dtype]

    @property
    def there_bytes(self) -> int:
        """Of a row on its way to the experts."""
        return self._travel.rows.row_bytes(self.hidden, ITEMSIZE[self.dtype])

    @property
    def home_bytes(self) -> int:
        """Of a partial sum on its way home."""
        return self._travel.sums.row_bytes(self.hidden, ITEMSIZE[self.dtype])

    @property
    def _travel(self) -> TravelFormats:
        return TravelFormats.of(self)

    @property
    def flops_per_pair(self) -> int:
        """Of the forward, of dgrad, and of wgrad."""
        z_width = (2 if self.gated else 1) * self.intermediate
        return 2 * self.hidden * (z_width + self.intermediate)
