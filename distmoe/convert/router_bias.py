"""The experts' bias: in Hugging Face it is in scores, in ours in whole units of keys, 2^-24.

Training lets all biases of a layer drift together, to 34 in one published model, while the choice
depends on their differences only, with groups too: a group always counts as equally many experts.
So what is beyond our range is first moved to be even around 0, which changes no choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.kernels.router_topk import BIAS_LIMIT, KEY_SCALE

LIMIT = BIAS_LIMIT / KEY_SCALE


def is_bias(name: str) -> bool:
    """Whether our tensor is one."""
    return name.endswith(".bias_E")


def bias_problem(bias_E: Tensor) -> str:
    """Why the biases of a layer cannot be ours; empty if they can."""
    low, high = bias_E.min().item(), bias_E.max().item()
    # Also of NaN.
    if not high - low <= 2 * LIMIT:
        return f"has biases from {low:g} to {high:g}; they must be at most {2 * LIMIT:g} apart"
    return ""


def bias_from_hf(bias_E: Tensor) -> Tensor:
    """[E] of scores -> [E] int32."""
    exact_E = bias_E.double()
    if exact_E.abs().max() > LIMIT:
        exact_E = exact_E - (exact_E.min() + exact_E.max()) / 2
    return (exact_E * KEY_SCALE).round().clamp(-BIAS_LIMIT, BIAS_LIMIT).int()


def bias_to_hf(bias_E: Tensor) -> Tensor:
    """[E] int32 -> [E] fp32 of scores, exactly; whatever dtype the weights have."""
    return bias_E.to(torch.float32) / KEY_SCALE
