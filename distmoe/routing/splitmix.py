"""splitmix64 (Steele, Lea, Flood, OOPSLA 2014), in arithmetic modulo 2^64 on signed numbers."""

from __future__ import annotations

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST_FACTOR = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND_FACTOR = 0x94D049BB133111EB - (1 << 64)


def mix(x: Tensor) -> Tensor:
    """The mixing function of the generator: int64, one independent number for every number."""
    x = (x ^ shift_right(x, 30)) * FIRST_FACTOR
    x = (x ^ shift_right(x, 27)) * SECOND_FACTOR
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """With zeros from the left, whatever the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
