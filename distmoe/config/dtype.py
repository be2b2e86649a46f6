"""What train.dtype is on a device: the one place where auto becomes a name."""

from __future__ import annotations

from distmoe.config.keys import with_values
from distmoe.config.schema import Config


def with_dtype(config: Config, device_type: str) -> Config:
    """``config`` with the compute dtype of a run on ``device_type``: where it is auto, bf16 on
    cuda and fp32 elsewhere."""
    if config.train.dtype != "auto":
        return config
    return with_values(config, {"train.dtype": "bf16" if device_type == "cuda" else "fp32"})
