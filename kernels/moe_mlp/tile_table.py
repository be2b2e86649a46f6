"""Tile configurations that were measured: what a table holds, and which one a launch gets.

A table is keyed by the kernel, the shape of a rank's experts and a power of two for the number of
pairs, never the number itself, which changes from step to step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from distmoe.kernels.moe_mlp.tiles import ExpertShape, TileConfig


def bucket_of(pairs: int) -> int:
    """The power of two that is nearest to ``pairs``, at least 1; the greater one of two."""
    below = 1 << max(0, pairs.bit_length() - 1)
    return 2 * below if 2 * pairs >= 3 * below else below


@dataclass(frozen=True)
class TunedTile:
    """``ms``: median milliseconds of the call that it was timed in, without other kernels that can
    be timed alone; ``default_ms``: of the default; ``spread_ms``: the larger interquartile range of
    both."""

    config: TileConfig
    ms: float
    default_ms: float
    spread_ms: float


@dataclass(frozen=True)
class Origin:
    """How a layer was measured; ``date`` as 2030-12-31."""

    date: str
    driver: str
    torch: str
    triton: str
    command: str


@dataclass(frozen=True)
class TunedLayer:
    """What was chosen for the kernels of ``backend`` with about ``pairs`` pairs."""

    backend: str
    shape: ExpertShape
    pairs: int
    tiles: Mapping[str, TunedTile]
    origin: Origin

    @property
    def key(self) -> tuple[str, ExpertShape, int]:
        """What a file has once."""
        return self.backend, self.shape, bucket_of(self.pairs)

    def __str__(self) -> str:
        return f"{self.backend} {self.shape} bucket {bucket_of(self.pairs)}"


class TileTable:
    """The measured configurations of one backend on ``device``, none by default."""

    def __init__(self, device: str = "", layers: Iterable[TunedLayer] = ()) -> None:
        self.device, self.triton_versions = device, set[str]()
        self._buckets: dict[tuple[str, ExpertShape], dict[int, TileConfig]] = {}
        for layer in layers:
            self.triton_versions.add(layer.origin.triton)
            for kernel, tile in layer.tiles.items():
                of_shape = self._buckets.setdefault((kernel, layer.shape), {})
                of_shape[bucket_of(layer.pairs)] = tile.config

    def __len__(self) -> int:
        return sum(len(buckets) for buckets in self._buckets.values())

    def pick(self, kernel: str, shape: ExpertShape, pairs: int) -> TileConfig | None:
        """That of the nearest bucket which was measured for ``shape``, the lower one of two; None:
        nothing was, and the default is to be taken."""
        buckets = self._buckets.get((kernel, shape))
        if buckets is None:
            return None
        log = bucket_of(pairs).bit_length()
        return buckets[min(buckets, key=lambda b: (abs(b.bit_length() - log), b))]

    def digest(self) -> str:
        """Equal for tables from which all launches take the same."""
        entries = sorted(
            f"{kernel} {shape} {bucket} {config!r}"
            for (kernel, shape), buckets in self._buckets.items()
            for bucket, config in buckets.items()
        )
        return hashlib.sha256("\n".join(entries).encode()).hexdigest()[:12]

    def describe(self, triton_version: str, shape: ExpertShape | None = None) -> str:
        """In words, with a warning if it was not measured with this ``triton_version``, or has
        nothing for ``shape``."""
        if not len(self):
            return "defaults"
        entries = "1 entry" if len(self) == 1 else f"{len(self)} entries"
        words = f"tuned for {self.device} ({entries})"
        if shape is not None and all(shape != known for _, known in self._buckets):
            return f"defaults: {words}, but not for {shape}"
        others = sorted(self.triton_versions - {triton_version})
        if others:
            words += f"; measured with triton {', '.join(others)}, and this is {triton_version}"
        return words


DEFAULTS = TileTable()
