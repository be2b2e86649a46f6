"""Sizes of published layers, by name: benches time them all, and kernels are compiled ahead of time
for some."""

from __future__ import annotations

from typing import NamedTuple


class PublishedLayer(NamedTuple):
    """T tokens, H hidden, I intermediate, E experts, K of them a token."""

    T: int
    H: int
    I: int
    E: int
    K: int


# SonicMoE (arXiv 2512.14080), table 9b: tokens and hidden of a size, then (I, E, K).
_SONICMOE = {
    "1.4B": (40960, 768, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
    "7B": (24576, 1536, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
    "30B": (32768, 4096, ((256, 256, 16), (512, 128, 8), (1024, 64, 4))),
    "120B": (32768, 4096, ((512, 256, 16), (1024, 128, 8), (2048, 64, 4))),
}
GROUPS = {
    size: tuple(f"{size}-{I}" for I, _, _ in widths) for size, (_, _, widths) in _SONICMOE.items()
}
"""Names of the three layers of a size of SonicMoE's table."""
LAYERS = {
    **{
        f"{size}-{I}": PublishedLayer(T, H, I, E, K)
        for size, (T, H, widths) in _SONICMOE.items()
        for I, E, K in widths
    },
    # The example of SonicMoE's README.
    "README": PublishedLayer(32768, 4096, 1024, 128, 8),
    "Qwen3-30B-A3B": PublishedLayer(32768, 2048, 768, 128, 8),
    "OLMoE-1B-7B": PublishedLayer(32768, 2048, 1024, 64, 8),
    # What one of 32 expert-parallel ranks computes: its 8 of the 256 experts, for the rows that
    # 32 x 8192 tokens send it. A row that arrives has 1.1 pairs on average; here it has one.
    "DeepSeek-V3-EP32": PublishedLayer(65536, 7168, 2048, 8, 1),
    # Where SonicMoE reports most for token rounding: 256 tokens an expert, two tiles.
    "TR": PublishedLayer(16384, 4096, 1024, 256, 4),
}
