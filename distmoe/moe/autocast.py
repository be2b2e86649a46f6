"""What torch.autocast asks of operators that it does not know."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype of torch.autocast for its device, where that is on; differentiable."""
    device_type = x.device.type
    if not torch.amp.is_autocast_available(device_type):
        return x
    if not torch.is_autocast_enabled(device_type):
        return x
    return x.to(torch.get_autocast_dtype(device_type))
