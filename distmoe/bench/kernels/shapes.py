"""The layers that the bench knows, by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from distmoe.kernels.moe_mlp.published_layers import GROUPS, LAYERS


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


SHAPES = {
    **{name: Shape(name, *size) for name, size in LAYERS.items()},
    "tiny": Shape("tiny", 64, 32, 16, 4, 2, tile=16),
}


def find_shapes(names: Iterable[str]) -> list[Shape]:
    """Shapes by name; a size of `SonicMoE`'s table, as 7B, is its three shapes. ValueError."""
    found: list[Shape] = []
    for name in names:
        if name not in GROUPS and name not in SHAPES:
            raise ValueError(f"unknown shape {name!r}; known: {', '.join([*GROUPS, *SHAPES])}")
        found += [SHAPES[one] for one in GROUPS.get(name, (name,))]
    return list(dict.fromkeys(found))
