"""Activations inside kernels: value and slope in fp32, by the names of `activations`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def act(z, ACTIVATION: tl.constexpr):
    """The activation of z, element by element; for gated ones that of the gate."""
    if ACTIVATION == "swiglu" or ACTIVATION == "silu":
        value = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "geglu" or ACTIVATION == "gelu":
        value = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "reglu":
        value = tl.maximum(z, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2", "unknown activation")
        positive = tl.maximum(z, 0.0)
        value = positive * positive
    return value


@triton.jit
def act_and_slope(z, ACTIVATION: tl.constexpr):
    """The activation of z and its derivative."""
    if ACTIVATION == "swiglu" or ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        value = z * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
    elif ACTIVATION == "geglu" or ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        value = z * below
        slope = below + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACTIVATION == "reglu":
        value = tl.maximum(z, 0.0)
        slope = tl.where(z > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2", "unknown activation")
        positive = tl.maximum(z, 0.0)
        value = positive * positive
        slope = 2.0 * positive
    return value, slope
