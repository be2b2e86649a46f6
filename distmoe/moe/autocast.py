"""What torch.autocast asks of operators that it does not know."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype of torch.autocast for its device, where that is on; differentiable."""
    return x.to(autocast_dtype(x))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What `autocast` makes of the dtype of ``x``."""
    device_type = x.device.type
    if not torch.amp.is_autocast_available(device_type):
        return x.dtype
    if not torch.is_autocast_enabled(device_type):
        return x.dtype
    return torch.get_autocast_dtype(device_type)
