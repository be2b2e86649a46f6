"""What a layer cannot compute with, found before its first message: a rank that fails behind one
keeps the others waiting for the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distmoe.moe.autocast import autocast_dtype

# Its logits are fp32 from rows and weights of any dtype.
OF_ANY_DTYPE = "router_EH"


def check_input(x: Tensor, layer: nn.Module, *, hidden_size: int) -> None:
    """ValueError for ``x`` [..., H] of another width than ``hidden_size``, another dtype than the
    parameters of ``layer``, or on another device, which is torch's current one. What FSDP gathers
    later has its dtype only then, and is checked where it is used."""
    if not x.ndim or x.shape[-1] != hidden_size:
        raise ValueError(
            f"x has the shape {tuple(x.shape)}; its last size must be hidden_size ({hidden_size})"
        )
    _check_device(x)
    dtype = autocast_dtype(x)
    for name, parameter in layer.named_parameters():
        if isinstance(parameter, DTensor):
            continue
        if parameter.device != x.device:
            raise ValueError(
                f"x is on {x.device} and {name} on {parameter.device}; they must be on one device"
            )
        if name != OF_ANY_DTYPE and autocast_dtype(parameter) != dtype:
            raise ValueError(
                f"x is {x.dtype} and {name} {parameter.dtype}; x and the parameters must have one "
                "dtype, or torch.autocast must be on"
            )


def _check_device(x: Tensor) -> None:
    """Kernels are launched on the current GPU, and copies to the host are waited for there."""
    if not (x.is_cuda and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        return
    current = torch.cuda.current_device()
    if x.device.index != current:
        raise ValueError(
            f"x is on {x.device}, and torch's current device is cuda:{current}; it must be that of "
            f"x: torch.cuda.set_device({x.device.index})"
        )
