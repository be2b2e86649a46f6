"""An optimizer's state by parameter name, so that a checkpoint does not know groups or engines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# The one state that is a number, and not shaped as its parameter.
STEP = "step"


def optimizer_state(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """name -> its states, as the parameter's group lists them: of AdamW {exp_avg, exp_avg_sq,
    step}. Before the first step they are made, as zeros, so that a checkpoint can be loaded into
    them."""
    states = {
        parameter: group["states"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    # A fused update counts its steps on the device.
    fused = any(group.get("fused") for group in optimizer.param_groups)
    found: dict[str, dict[str, Any]] = {}
    for name, parameter in named:
        own = optimizer.state[parameter]
        if not own:
            step = torch.zeros((), device=parameter.device if fused else "cpu")
            for key in states[parameter]:
                own[key] = step if key == STEP else torch.zeros_like(parameter)
        found[name] = {key: own[key] for key in states[parameter]}
    return found


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    named: Iterable[tuple[str, Tensor]],
    state: dict[str, dict[str, Any]],
) -> None:
    """Put back what `optimizer_state` gave."""
    for name, parameter in named:
        optimizer.state[parameter] = dict(state[name])
