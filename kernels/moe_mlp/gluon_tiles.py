"""Tile configurations of the warp-specialised kernels, in the manner of `tiles`."""

from __future__ import annotations

from distmoe.kernels.moe_mlp.tiles import ExpertShape, Overrides, TileConfig, TileSpace, columns_of

# A program has a multiprocessor to itself: 8 warps multiply and 4 load. Each begins with 168 of the
# registers that 12 warps can share, 32 times; warps that load keep 40 and leave the rest.
CONSUMER_WARPS, PRODUCER_WARPS = 8, 4
FIRST_REGISTERS, PRODUCER_REGISTERS = 168, 40
CONSUMER_REGISTERS = 232

# num_warps: of a group of consumers. With 8 there is one group; with 4 there are two, which have a
# tile each, and one stores while the other multiplies. n of "up" is columns of a: with a gate the
# accumulator is twice as wide.
CANDIDATES: dict[str, list[TileConfig]] = {
    "up": [
        TileConfig(128, 128, 64, 8, 4, chunks=2),
        TileConfig(128, 64, 64, 4, 6, chunks=2),
        TileConfig(128, 64, 64, 4, 5),
    ],
    "down": [
        TileConfig(128, 128, 64, 4, 6, chunks=2),
        TileConfig(128, 256, 64, 8, 4, chunks=4),
    ],
    # Its epilogue takes long: two groups. 128 rows spill 60 bytes on triton 3.9, none on 3.6.
    "dgrad": [
        TileConfig(64, 128, 64, 4, 7, chunks=4),
        TileConfig(128, 128, 64, 4, 5, chunks=8),
    ],
    "dx": [
        TileConfig(128, 256, 64, 8, 4, chunks=4),
        TileConfig(128, 128, 64, 4, 6, chunks=2),
    ],
    # The gathered operand is the narrow side: a thread has fewer rows to look up.
    "wgrad_in": [
        TileConfig(256, 128, 64, 8, 4, chunks=2),
        TileConfig(128, 128, 64, 4, 6, chunks=2),
    ],
    "wgrad_out": [
        TileConfig(128, 256, 64, 8, 4, chunks=4),
        TileConfig(128, 128, 64, 4, 6, chunks=2),
    ],
}

# Defaults of activations without a gate, where they differ: the accumulator is half as wide.
UNGATED_CONFIGS: dict[str, TileConfig] = {
    "up": TileConfig(128, 256, 64, 8, 4, chunks=4),
}

_overrides = Overrides(CANDIDATES)
override = _overrides.override


def shared_bytes(kernel: str, config: TileConfig, shape: ExpertShape) -> int:
    """Of the ring, and of the scratch by which an epilogue changes the layout of a chunk. Barriers
    take some hundred bytes more."""
    config = config.fit(columns_of(kernel, shape))
    columns = 2 * config.n if kernel == "up" and shape.gated else config.n
    ring = (config.m + columns) * config.k * config.num_stages
    width = config.n // config.chunks
    # As seen of triton 3.6 and 3.9: rows of a chunk that every consuming warp moves at a time.
    rows = 16 if width <= 16 * config.num_warps else 8
    scratch = CONSUMER_WARPS * rows * width
    return (ring + scratch) * shape.dtype.itemsize


def check(kernel: str, config: TileConfig) -> str:
    """Why ``kernel`` cannot run with ``config``, "" if it can."""
    rows = 16 * config.num_warps
    if config.num_warps not in (4, 8):
        return f"num_warps is {config.num_warps}; it must be one of 4, 8"
    # A stage is given back when the products of the next one are issued.
    if config.num_stages < 2:
        return f"num_stages is {config.num_stages}; it must be at least 2"
    # A warpgroup multiplies 64 rows at a time.
    if config.m % rows:
        return f"m is {config.m}; it must be a multiple of 16 * num_warps ({rows})"
    if not config.tma:
        return "tma is False; it must be True: these kernels have no other way to load"
    # The tiles of gate and up are one operand only with rows no longer than a swizzle, 128 bytes.
    if kernel == "up" and config.k > 64:
        return f"k is {config.k}; it must be at most 64"
    return ""


SPACE = TileSpace(CANDIDATES, shared_bytes, override, check)


def config_for(kernel: str, shape: ExpertShape, tuned: TileConfig | None = None) -> TileConfig:
    """The configuration of ``kernel``; ``tuned``: what a table has for it, if it has any."""
    default = CANDIDATES[kernel][0]
    if not shape.gated:
        default = UNGATED_CONFIGS.get(kernel, default)
    return _overrides.configs.get(kernel, tuned or default).fit(columns_of(kernel, shape))


def constants(config: TileConfig) -> dict[str, int]:
    """What every kernel has to know of its configuration, beside the sizes of its blocks."""
    return {
        "BK": config.k,
        "STAGES": config.num_stages,
        "CHUNKS": config.chunks,
        "GROUPS": CONSUMER_WARPS // config.num_warps,
        "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
    }
