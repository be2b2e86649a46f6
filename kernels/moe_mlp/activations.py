"""The activations between the two projections: names, and what they are in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distmoe.registry import GATED_ACTIVATIONS


@dataclass(frozen=True)
class Activation:
    """``gated``: a = act(gate) * up, of the halves of z; otherwise a = act(z). ``act`` and its
    derivative ``slope`` are element by element, in fp32."""

    name: str
    gated: bool
    act: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]

    def width(self, intermediate_size: int) -> int:
        """G, the width of z."""
        return 2 * intermediate_size if self.gated else intermediate_size

    def __call__(self, z_LG: Tensor) -> Tensor:
        """[L, G] -> [L, I] in the dtype of z, computed in fp32."""
        z = z_LG.float()
        if self.gated:
            gate_LI, up_LI = z.chunk(2, dim=-1)
            a_LI: Tensor = self.act(gate_LI) * up_LI
        else:
            a_LI = self.act(z)
        return a_LI.to(z_LG.dtype)

    def backward(self, da_LI: Tensor, z_LG: Tensor) -> Tensor:
        """dz [L, G] fp32 from da [L, I] fp32 and the saved z."""
        z = z_LG.float()
        if not self.gated:
            return da_LI * self.slope(z)
        gate_LI, up_LI = z.chunk(2, dim=-1)
        return torch.cat([da_LI * up_LI * self.slope(gate_LI), da_LI * self.act(gate_LI)], dim=-1)


def _silu_slope(z: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return sigmoid + z * sigmoid * (1 - sigmoid)


def _gelu_slope(z: Tensor) -> Tensor:
    """Of z * Phi(z) with the exact error function: Phi(z) + z * phi(z)."""
    phi: Tensor = torch.exp(-0.5 * z.square()) * (2 * torch.pi) ** -0.5
    below = 0.5 * (1 + torch.erf(z * 2**-0.5))
    return below + z * phi


def _relu_slope(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


def _relu2(z: Tensor) -> Tensor:
    return F.relu(z).square()


def _relu2_slope(z: Tensor) -> Tensor:
    return 2 * F.relu(z)


Elementwise = Callable[[Tensor], Tensor]
_FUNCTIONS: dict[str, tuple[Elementwise, Elementwise]] = {
    "swiglu": (F.silu, _silu_slope),
    "geglu": (F.gelu, _gelu_slope),
    "reglu": (F.relu, _relu_slope),
    "silu": (F.silu, _silu_slope),
    "gelu": (F.gelu, _gelu_slope),
    "relu2": (_relu2, _relu2_slope),
}
ACTIVATIONS = {
    name: Activation(name, gated, *_FUNCTIONS[name]) for name, gated in GATED_ACTIVATIONS.items()
}


def activation_called(name: str) -> Activation:
    """ValueError lists the names if there is none called ``name``."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]
