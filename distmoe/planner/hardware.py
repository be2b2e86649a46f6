"""The machine of a planned job: a known one, or a profile that was measured, with what is assumed
where nobody measured.

Known machines take their speeds from `machine_profile.PRESETS`, whose products and copies are those
of `roofline.DEVICE_SPEEDS`, and their peak from `metrics.flops`: no figure is written twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distmoe.config import Config, ConfigError
from distmoe.config.keys import with_values
from distmoe.metrics.flops import peak_flops
from distmoe.planner.machine_profile import (
    B200,
    H100,
    H200,
    PRESETS,
    Profile,
    ProfileError,
    load_profile,
)
from distmoe.planner.row_volumes import RankLayout

KNOWN = {"h100": H100, "h200": H200, "b200": B200}
"""What --hardware may be, beside a file -> the device's name."""

# Assumed of known machines; a measured profile has its own rates.
DENSE_EFFICIENCY = 0.85
"""Products of a block, of the rate of large ones. No source."""
ATTENTION_SHARE = 0.35
"""FlashAttention-2 of the H100's peak, by the paper of its successor (arXiv 2407.08608)."""


@dataclass(frozen=True)
class Hardware:
    """``memory_bytes`` of a rank's device; ``peak_flops``: dense bf16, None where it is not
    known."""

    name: str
    profile: Profile
    memory_bytes: int
    ranks_per_node: int
    peak_flops: float | None

    @property
    def bytes_per_s(self) -> float:
        """Of the device's memory, read and written bytes together."""
        return 2 * self.profile.link("own").bytes_per_s

    def missing_link(self, world: int) -> str:
        """The first link class that ``world`` ranks use and the profile lacks, or ""."""
        used = RankLayout.of_group(world, self.ranks_per_node).link_classes
        return next((name for name in used if name not in self.profile.links), "")

    def dense_flops(self, dtype: str) -> float:
        """FLOP/s of the products of a block; where a profile lacks them, of the experts'."""
        rates, measured = self.profile.dense_flops, self.profile.gemm_flops
        if not measured:
            return DENSE_EFFICIENCY * rates[dtype]
        return rates[dtype] if dtype in rates else measured[dtype]

    def attention_flops(self, dtype: str) -> float:
        """FLOP/s of causal attention, of those that the mask leaves."""
        if dtype in self.profile.attention_flops:
            return self.profile.attention_flops[dtype]
        return ATTENTION_SHARE * self.peak_flops if self.peak_flops else self.dense_flops(dtype)


def find_hardware(text: str, *, memory_gib: float = 0.0, ranks_per_node: int = 0) -> Hardware:
    """The known machine called ``text``, or the profile in the file ``text``; what is given beside
    it wins. ConfigError names what is wrong or missing."""
    name = KNOWN.get(text.lower())
    if name is None and not Path(text).is_file():
        raise ConfigError(
            f"--hardware is '{text}'; it must be one of {', '.join(KNOWN)}, or a file that "
            "`distmoe doctor comm --save` wrote"
        )
    try:
        profile = PRESETS[name] if name else load_profile(text)
    except ProfileError as error:
        raise ConfigError(f"--hardware: {error}") from error
    memory = int(memory_gib * 2**30) or profile.memory_bytes
    per_node = ranks_per_node or profile.ranks_per_node
    for missing, key, option in (
        (not memory, "memory_bytes", "--memory-gib"),
        (not per_node, "ranks_per_node", "--ranks-per-node"),
    ):
        if missing:
            raise ConfigError(f"profile '{text}' has no {key}; add it, or give {option}")
    return Hardware(
        name=profile.origin.device or text,
        profile=profile,
        memory_bytes=memory,
        ranks_per_node=per_node,
        peak_flops=peak_flops(profile.origin.device),
    )


def on_hardware(config: Config, hardware: Hardware) -> Config:
    """``config`` with what auto means there: the dtype of `dtype_on`, and as run.device a GPU,
    unless all that is known of the machine is how fast it computes in fp32."""
    dtype, device = dtype_on(config, hardware), config.run.device
    if device == "auto":
        device = "cpu" if dtype == "fp32" and hardware.peak_flops is None else "cuda"
    return with_values(config, {"train.dtype": dtype, "run.device": device})


def dtype_on(config: Config, hardware: Hardware) -> str:
    """What the run computes in: auto is the dtype that the profile has a rate for. ConfigError if
    it has none for the one that the config asks for."""
    rates = hardware.profile.dtypes
    dtype = next(iter(rates), "") if config.train.dtype == "auto" else config.train.dtype
    if dtype not in rates:
        raise ConfigError(
            f"train.dtype is {config.train.dtype}; {hardware.name} has a rate of the expert "
            f"products for {', '.join(rates) or 'none'}"
        )
    return dtype
