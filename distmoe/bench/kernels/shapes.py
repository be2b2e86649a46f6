"""The layers that the bench knows, by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A layer on one device: T tokens, H hidden, I intermediate, E experts, K of them a token;
    ``tile`` M of token rounding."""

    name: str
    T: int
    H: int
    I: int
    E: int
    K: int
    tile: int = 128

    def __str__(self) -> str:
        return f"{self.name} (T={self.T} H={self.H} I={self.I} E={self.E} K={self.K})"


# SonicMoE (arXiv 2512.14080), table 9b: tokens and hidden of a size, then (I, E, K).
_SONICMOE = {
    "1.4B": (40960, 768, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
    "7B": (24576, 1536, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
    "30B": (32768, 4096, ((256, 256, 16), (512, 128, 8), (1024, 64, 4))),
    "120B": (32768, 4096, ((512, 256, 16), (1024, 128, 8), (2048, 64, 4))),
}
_ALL = [
    *(
        Shape(f"{size}-{I}", T, H, I, E, K)
        for size, (T, H, widths) in _SONICMOE.items()
        for I, E, K in widths
    ),
    # The example of SonicMoE's README.
    Shape("README", 32768, 4096, 1024, 128, 8),
    Shape("Qwen3-30B-A3B", 32768, 2048, 768, 128, 8),
    Shape("OLMoE-1B-7B", 32768, 2048, 1024, 64, 8),
    # What one of 32 expert-parallel ranks computes: its 8 of the 256 experts, for the rows that
    # 32 x 8192 tokens send it. A row that arrives has 1.1 pairs on average; here it has one.
    Shape("DeepSeek-V3-EP32", 65536, 7168, 2048, 8, 1),
    # Where SonicMoE reports most for token rounding: 256 tokens an expert, two tiles.
    Shape("TR", 16384, 4096, 1024, 256, 4),
    Shape("tiny", 64, 32, 16, 4, 2, tile=16),
]
SHAPES = {shape.name: shape for shape in _ALL}


def find_shapes(names: Iterable[str]) -> list[Shape]:
    """Shapes by name; a size of `SonicMoE`'s table, as 7B, is its three shapes. ValueError."""
    found: list[Shape] = []
    for name in names:
        group = [shape for shape in _ALL if name in (shape.name, shape.name.rpartition("-")[0])]
        if not group or (name not in SHAPES and name not in _SONICMOE):
            known = ", ".join([*_SONICMOE, *SHAPES])
            raise ValueError(f"unknown shape {name!r}; known: {known}")
        found += group
    return list(dict.fromkeys(found))
