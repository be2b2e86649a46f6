"""What a layer cannot compute with, found before its first message: a rank that fails behind one
keeps the others waiting for the next."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distmoe.moe.autocast import autocast_dtype

# Its logits are fp32 from rows and weights of any dtype.
OF_ANY_DTYPE = "router_EH"


def check_input(x: Tensor, layer: nn.Module, *, hidden_size: int) -> None:
    """ValueError for ``x`` [..., H] of another width than ``hidden_size``, or another dtype than
    the parameters of ``layer``. What FSDP gathers later has its dtype only then, and is checked
    where it is used."""
    if not x.ndim or x.shape[-1] != hidden_size:
        raise ValueError(
            f"x has the shape {tuple(x.shape)}; its last size must be hidden_size ({hidden_size})"
        )
    dtype = autocast_dtype(x)
    for name, parameter in layer.named_parameters():
        if name == OF_ANY_DTYPE or isinstance(parameter, DTensor):
            continue
        if autocast_dtype(parameter) != dtype:
            raise ValueError(
                f"x is {x.dtype} and {name} {parameter.dtype}; x and the parameters must have one "
                "dtype, or torch.autocast must be on"
            )
