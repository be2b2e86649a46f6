"""AdamW's moments by parameter name, so that a checkpoint does not know groups or engines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_state(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """name -> {exp_avg, exp_avg_sq, step}. Before the first step the moments are made, as zeros,
    so that a checkpoint can be loaded into them."""
    state: dict[str, dict[str, Any]] = {}
    # A fused update counts its steps on the device.
    fused = any(group["fused"] for group in optimizer.param_groups)
    for name, parameter in named:
        own = optimizer.state[parameter]
        if not own:
            own["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
            for moment in MOMENTS:
                own[moment] = torch.zeros_like(parameter)
        state[name] = {key: own[key] for key in (*MOMENTS, "step")}
    return state


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    named: Iterable[tuple[str, Tensor]],
    state: dict[str, dict[str, Any]],
) -> None:
    """Put back what `optimizer_state` gave."""
    for name, parameter in named:
        optimizer.state[parameter] = dict(state[name])
