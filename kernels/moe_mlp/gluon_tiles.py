"""Tile configurations of the warp-specialised kernels, in the manner of `tiles`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

# A program has a multiprocessor to itself: 8 warps multiply, 4 load, and share 64 Ki registers. The
# compiler gives each of the 12 warps 168 at first; a warpgroup's number is a multiple of 8.
CONSUMER_WARPS, PRODUCER_WARPS = 8, 4
REGISTERS = 168 * (CONSUMER_WARPS + PRODUCER_WARPS)


@dataclass(frozen=True)
class SpecialisedConfig:
    """BLAS letters: m x n of the result in steps of k, of which ``stages`` are loaded ahead.

    ``groups``: 1, all consumer warps work on one tile; 2, half of them each on a tile of its own,
    and one half stores while the other multiplies. ``chunks``: parts in which an epilogue handles
    its n columns. ``producer_registers``: of a thread that loads.
    """

    m: int
    n: int
    k: int
    stages: int
    groups: int
    chunks: int = 1
    producer_registers: int = 40

    @property
    def num_warps(self) -> int:
        """Of a group of consumers, which is what a launch is told."""
        return CONSUMER_WARPS // self.groups

    @property
    def consumer_registers(self) -> int:
        left = REGISTERS - PRODUCER_WARPS * self.producer_registers
        return left // CONSUMER_WARPS // 8 * 8

    def __str__(self) -> str:
        chunks = f" c{self.chunks}" if self.chunks > 1 else ""
        return f"{self.m}x{self.n}x{self.k} g{self.groups} s{self.stages}{chunks}"

    def fit(self, columns: int) -> SpecialisedConfig:
        """With n no wider than the power of two that holds ``columns``, and at least 16."""
        n = min(self.n, max(16, 1 << (columns - 1).bit_length()))
        return replace(self, n=n, chunks=max(1, min(self.chunks, n // 16)))

    def constants(self) -> dict[str, int]:
        """Those that every kernel has, beside its blocks."""
        return {
            "BK": self.k,
            "STAGES": self.stages,
            "CHUNKS": self.chunks,
            "GROUPS": self.groups,
            "CONSUMER_REGISTERS": self.consumer_registers,
            "PRODUCER_REGISTERS": self.producer_registers,
        }


# n of "up" is columns of a: an accumulator of a gated activation is twice as wide.
CANDIDATES: dict[str, list[SpecialisedConfig]] = {
    "up": [
        SpecialisedConfig(128, 128, 64, 4, groups=1, chunks=2),
        SpecialisedConfig(128, 64, 64, 6, groups=2, chunks=2),
        SpecialisedConfig(128, 64, 64, 5, groups=2),
    ],
    "up_ungated": [
        SpecialisedConfig(128, 256, 64, 4, groups=1, chunks=4),
        SpecialisedConfig(128, 128, 64, 6, groups=2, chunks=2),
    ],
    "down": [
        SpecialisedConfig(128, 128, 64, 6, groups=2, chunks=2),
        SpecialisedConfig(128, 256, 64, 4, groups=1, chunks=4),
    ],
    # Its epilogue takes as long as its products: two groups.
    "dgrad": [
        SpecialisedConfig(128, 128, 64, 5, groups=2, chunks=8),
        SpecialisedConfig(64, 128, 64, 7, groups=2, chunks=4),
        SpecialisedConfig(64, 256, 64, 4, groups=2, chunks=8),
    ],
    # Larger ones spill a few registers.
    "dgrad_ungated": [
        SpecialisedConfig(64, 128, 64, 7, groups=2, chunks=4),
    ],
    "dx": [
        SpecialisedConfig(128, 256, 64, 4, groups=1, chunks=4),
        SpecialisedConfig(128, 128, 64, 6, groups=2, chunks=2),
    ],
    # The gathered operand is the narrow side: a thread has fewer rows to look up.
    "wgrad_in": [
        SpecialisedConfig(256, 128, 64, 4, groups=1, chunks=2),
        SpecialisedConfig(128, 128, 64, 6, groups=2, chunks=2),
    ],
    "wgrad_out": [
        SpecialisedConfig(128, 256, 64, 4, groups=1, chunks=4),
        SpecialisedConfig(128, 128, 64, 6, groups=2, chunks=2),
    ],
}

_overrides: dict[str, SpecialisedConfig] = {}


@contextmanager
def override(kernel: str, config: SpecialisedConfig) -> Iterator[None]:
    """Let ``kernel`` (a name in `CANDIDATES`) run with ``config``, for benches and tests."""
    if kernel not in CANDIDATES:
        raise ValueError(f"unknown kernel {kernel!r}; known: {', '.join(CANDIDATES)}")
    before = dict(_overrides)
    _overrides[kernel] = config
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def config_for(kernel: str, *, columns: int) -> SpecialisedConfig:
    """The configuration of ``kernel`` for that many ``columns`` of the result."""
    return _overrides.get(kernel, CANDIDATES[kernel][0]).fit(columns)
