"""Tile configurations: which the kernels ship with, and which one a problem gets.

Nothing is tuned while a job runs: a rank that tunes stalls its peers' collectives, and ranks that
tune apart end with different kernels. `tools/bench_moe.py --tune` times the candidates of a list;
the first is the default, unless a table (`tile_table`) has what was measured before. All candidates
are compiled ahead of time by the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class TileConfig:
    """BLAS letters: a program computes m x n of the result in steps of k.

    ``chunks``: parts in which an epilogue handles its tile, to keep registers few.
    ``tma``: contiguous operands come by TMA descriptors, else by pointers.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    chunks: int = 1
    tma: bool = True

    def __str__(self) -> str:
        chunks = f" c{self.chunks}" if self.chunks > 1 else ""
        pointers = "" if self.tma else " ptr"
        tile = f"{self.m}x{self.n}x{self.k} w{self.num_warps} s{self.num_stages}"
        return tile + chunks + pointers

    def fit(self, columns: int) -> TileConfig:
        """With n no wider than the power of two that holds ``columns``, and at least 16."""
        n = min(self.n, max(16, 1 << (columns - 1).bit_length()))
        chunks = max(1, min(self.chunks, n // 16))
        return self if n == self.n else replace(self, n=n, chunks=chunks)


class ExpertShape(NamedTuple):
    """The experts of a rank, as their kernels see them. ``gated``: G = 2I, else G = I."""

    H: int
    I: int
    e: int
    gated: bool
    dtype: torch.dtype

    @property
    def G(self) -> int:
        return 2 * self.I if self.gated else self.I

    def __str__(self) -> str:
        gated = "gated" if self.gated else "not gated"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"H{self.H} I{self.I} e{self.e} {gated} {dtype}"


@dataclass(frozen=True)
class TileSpace:
    """What the kernels of one backend may run with, a line of `registry.MOE_MLP_TILES`.

    ``candidates``: configurations by kernel, the default first. ``shared_bytes``: of shared memory
    that a program of a kernel needs at least, with a configuration and for a shape. ``override``:
    lets a kernel run with a configuration, whatever its default and its table are. ``check``: says
    why a kernel cannot run with a configuration ("key is value; it must ..."), "" if it can.
    """

    candidates: Mapping[str, Sequence[TileConfig]]
    shared_bytes: Callable[[str, TileConfig, ExpertShape], int]
    override: Callable[[str, TileConfig], AbstractContextManager[None]]
    check: Callable[[str, TileConfig], str] = lambda kernel, config: ""

    @property
    def most_candidates(self) -> int:
        """Of the kernel that has most."""
        return max(map(len, self.candidates.values()))

    @contextmanager
    def tiling(self, i: int) -> Iterator[None]:
        """Let every kernel run with its candidate ``i``, the last one where there are fewer."""
        with ExitStack() as stack:
            for kernel, configs in self.candidates.items():
                stack.enter_context(self.override(kernel, configs[min(i, len(configs) - 1)]))
            yield


class Overrides:
    """Configurations that kernels run with whatever else they have, for benches and tests."""

    def __init__(self, kernels: Collection[str]) -> None:
        self.kernels = kernels
        self.configs: dict[str, TileConfig] = {}

    @contextmanager
    def override(self, kernel: str, config: TileConfig) -> Iterator[None]:
        """Let ``kernel`` run with ``config``; ValueError lists the kernels that there are."""
        if kernel not in self.kernels:
            raise ValueError(f"unknown kernel {kernel!r}; known: {', '.join(self.kernels)}")
        before = dict(self.configs)
        self.configs[kernel] = config
        try:
            yield
        finally:
            self.configs = before


# Compute capability 9.0 and newer, 16-bit operands. In the GEMMs over rows m is rows; in those over
# weights m and n are both of the weight, and k is rows. An index that is loaded in the loop takes
# every other stage of the weight gradients, so s5 gives 3 buffers and s7 gives 4.
CANDIDATES: dict[str, list[TileConfig]] = {
    "up": [
        TileConfig(128, 128, 64, 8, 3),
        TileConfig(128, 128, 64, 8, 4),
        TileConfig(128, 64, 64, 4, 3),
        TileConfig(64, 128, 64, 4, 2),
    ],
    # With 2 stages three programs share a multiprocessor, not two: one loads or stores while others
    # multiply.
    "down": [
        TileConfig(128, 128, 64, 4, 3),
        TileConfig(128, 128, 64, 4, 2),
        TileConfig(128, 256, 64, 8, 4),
        TileConfig(128, 128, 64, 8, 3),
    ],
    # 8 chunks: 128 registers, so that two programs of 128 rows share a multiprocessor, and three of
    # 64 rows. The latter read a weight twice as often.
    "dgrad": [
        TileConfig(128, 128, 64, 8, 3, chunks=8),
        TileConfig(64, 128, 64, 4, 3, chunks=8),
        TileConfig(128, 256, 64, 8, 3, chunks=16),
        TileConfig(64, 128, 64, 4, 3, chunks=4),
    ],
    "dx": [
        TileConfig(128, 256, 64, 8, 4),
        TileConfig(128, 128, 64, 4, 3),
        TileConfig(128, 128, 64, 4, 2),
        TileConfig(128, 128, 64, 8, 3),
    ],
    # The gathered operand is the narrow side: it costs more instructions than TMA does.
    "wgrad_in": [
        TileConfig(256, 128, 64, 8, 5),
        TileConfig(256, 128, 64, 8, 7),
        TileConfig(128, 256, 64, 8, 5),
        TileConfig(128, 128, 64, 4, 5),
    ],
    "wgrad_out": [
        TileConfig(128, 256, 64, 8, 5),
        TileConfig(128, 256, 64, 8, 7),
        TileConfig(256, 128, 64, 8, 5),
        TileConfig(128, 128, 64, 4, 5),
    ],
}

# Without TMA: Ampere and Ada, AMD, and widths that are no multiple of 16 bytes.
POINTER_CONFIGS: dict[str, TileConfig] = {
    "up": TileConfig(128, 64, 32, 8, 3, tma=False),
    "down": TileConfig(128, 128, 32, 8, 3, tma=False),
    "dgrad": TileConfig(128, 64, 32, 8, 3, chunks=4, tma=False),
    "dx": TileConfig(128, 128, 32, 8, 3, tma=False),
    "wgrad_in": TileConfig(128, 128, 32, 8, 5, tma=False),
    "wgrad_out": TileConfig(128, 128, 32, 8, 5, tma=False),
}

# fp32 multiplies in fp32, without tensor cores: for parity tests on a GPU, not for speed.
FP32_CONFIG = TileConfig(32, 32, 32, 4, 2, tma=False)


def columns_of(kernel: str, shape: ExpertShape) -> int:
    """Columns of a kernel's result, to which its tiles are fitted."""
    return shape.I if kernel in ("up", "dgrad", "wgrad_out") else shape.H


def reduction_of(kernel: str, shape: ExpertShape) -> float:
    """Length of the sum behind an element of a kernel's result; that of a weight gradient, without
    bound here, depends on the data."""
    lengths = {"up": shape.H, "down": shape.I, "dgrad": shape.H, "dx": shape.G}
    return lengths.get(kernel, inf)


def shared_bytes(kernel: str, config: TileConfig, shape: ExpertShape) -> int:
    """Of the buffers of both operands, where rows then lie that are stored by TMA. Barriers and
    indices take some hundred bytes more."""
    config = config.fit(columns_of(kernel, shape))
    weights = 2 * config.n if kernel == "up" and shape.gated else config.n
    buffers = config.num_stages
    if kernel.startswith("wgrad"):
        buffers = (config.num_stages + 1) // 2
    # A loop of one step has nothing to load ahead.
    if reduction_of(kernel, shape) <= config.k:
        buffers = 1
    stored = config.m * config.n if kernel in ("down", "dx") and config.tma else 0
    return max((config.m + weights) * config.k * buffers, stored) * shape.dtype.itemsize


_overrides = Overrides(CANDIDATES)
override = _overrides.override
SPACE = TileSpace(CANDIDATES, shared_bytes, override)


def has_overrides() -> bool:
    """Whether `override` says anything, about any kernel."""
    return bool(_overrides.configs)


def config_for(
    kernel: str,
    *,
    dtype: torch.dtype,
    columns: int,
    has_tma: bool,
    tuned: TileConfig | None = None,
) -> TileConfig:
    """The configuration of ``kernel`` for operands of ``dtype`` and ``columns`` of the result.

    ``has_tma``: the device has it, and every row of the operands is a multiple of 16 bytes.
    ``tuned``: what a table has for it, instead of the default.
    """
    config = _overrides.configs.get(kernel, tuned)
    if config is None and dtype == torch.float32:
        config = FP32_CONFIG
    elif config is None:
        config = CANDIDATES[kernel][0] if has_tma else POINTER_CONFIGS[kernel]
    if config.tma and not has_tma:
        config = replace(config, tma=False)
    return config.fit(columns)
