"""The least time that an expert layer can take on a device: a roofline over its eight kernels.

Each kernel takes at least the longer of its computation at the speed of large dense products and
its memory traffic at the speed of a large copy, and kernels run one after the other. Speeds are
measured ones, which a kernel can reach, and not those of data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 2


@dataclass(frozen=True)
class DeviceSpeed:
    """``flops``: bf16 FLOP/s of large dense products; ``bytes_per_s`` of a large copy, read and
    written bytes together."""

    flops: float
    bytes_per_s: float


# By the name that the driver gives. A device that is no key has no roofline.
DEVICE_SPEEDS = {
    "NVIDIA H100 80GB HBM3": DeviceSpeed(flops=798e12, bytes_per_s=3.0e12),
    "NVIDIA H200": DeviceSpeed(flops=788e12, bytes_per_s=4.3e12),
}


@dataclass(frozen=True)
class LayerSize:
    """``rows`` R of width ``hidden`` H, ``pairs`` L over ``experts`` e of width ``intermediate``
    I; gated, so that z is 2I wide."""

    rows: int
    pairs: int
    experts: int
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class KernelWork:
    """What one kernel cannot do without: FLOPs, and bytes that it reads or writes once."""

    flops: int
    bytes: int

    def floor_s(self, speed: DeviceSpeed) -> float:
        return max(self.flops / speed.flops, self.bytes / speed.bytes_per_s)


FORWARD = ("up", "down", "sum_y")
BACKWARD = ("da", "dx", "sum_dx", "wgrad_out", "wgrad_in")


def layer_work(size: LayerSize) -> dict[str, KernelWork]:
    """Work of the kernels in `FORWARD` and `BACKWARD`, 16-bit operands.

    Gathered rows count once: the L2 cache serves the repeats in the best case.
    """
    L, H, I = size.pairs, size.hidden, size.intermediate
    row_RH, pair_LH, pair_LI = size.rows * H, L * H, L * I
    weight_out = size.experts * H * I
    weight_in = 2 * weight_out
    product = 2 * L * H * I
    elements = {
        "up": (2 * product, row_RH + weight_in + 3 * pair_LI),
        "down": (product, pair_LI + weight_out + pair_LH),
        "sum_y": (0, pair_LH + row_RH),
        "da": (product, row_RH + weight_out + 5 * pair_LI),
        "dx": (2 * product, 2 * pair_LI + weight_in + pair_LH),
        "sum_dx": (0, pair_LH + row_RH),
        "wgrad_out": (product, row_RH + pair_LI + weight_out),
        "wgrad_in": (2 * product, row_RH + 2 * pair_LI + weight_in),
    }
    return {name: KernelWork(flops, BYTES * count) for name, (flops, count) in elements.items()}


def layer_flops(pairs: int, hidden: int, intermediate: int) -> dict[str, int]:
    """Model FLOPs by mode: 6 L I H forward, 12 L I H backward."""
    unit = pairs * hidden * intermediate
    return {"forward": 6 * unit, "backward": 12 * unit, "both": 18 * unit}


def layer_floor_s(size: LayerSize, speed: DeviceSpeed) -> float:
    """The floor of forward and backward together, in seconds."""
    return sum(work.floor_s(speed) for work in layer_work(size).values())


def floor_ms(size: LayerSize, device_name: str) -> dict[str, float]:
    """The floor of every kernel and of forward, backward and both, in milliseconds; empty for a
    device that is not known."""
    speed = DEVICE_SPEEDS.get(device_name)
    if speed is None:
        return {}
    floors = {name: 1e3 * work.floor_s(speed) for name, work in layer_work(size).items()}
    forward = sum(floors[name] for name in FORWARD)
    backward = sum(floors[name] for name in BACKWARD)
    return floors | {"forward": forward, "backward": backward, "both": forward + backward}
