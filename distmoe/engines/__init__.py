"""Engines own backward, clip and step. The gradient rule of all of them:

The loss of a rank is a SUM over its valid tokens divided by the number of valid tokens of the
GLOBAL batch, and gradients are SUMMED over ranks. Experts then need no factor of their own: the
token exchange has already summed over ep, the reduce-scatter sums over efsdp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distmoe.config import Config
from distmoe.config.dtype import with_dtype
from distmoe.mesh import Mesh
from distmoe.model.compile_dense import compile_dense
from distmoe.model.transformer import Transformer
from distmoe.registry import ENGINES


@dataclass(frozen=True)
class StepResult:
    """``grad_norm``: before clipping, over dense and expert parameters of all ranks.

    ``skipped``: the norm was not finite, and nothing was updated.
    """

    grad_norm: float
    skipped: bool


class Engine(Protocol):
    """One way to train ``model``. State dicts have logical names and shapes, for any engine."""

    model: Transformer

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradients; ``last`` of the step."""
        ...

    def step(self, lr: float) -> StepResult:
        """Clip, update and clear the gradients; collective."""
        ...

    def discard(self) -> None:
        """Clear the gradients without an update."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """``model`` and ``optimizer`` state, sharded, with fp32 master weights and the experts'
        biases (int32) where there are any."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        ...

    def close(self) -> None:
        """Let go of process groups of its own, before they are destroyed; after the last step."""
        ...


def make_engine(config: Config, mesh: Mesh | None, device: torch.device) -> Engine:
    """Build the model on the meta device, shard it, initialise it. No mesh: one rank alone."""
    config = with_dtype(config, device.type)
    engine: Engine = ENGINES.load(config.parallel.engine)(config, mesh, device)
    return engine


def meta_model(config: Config, device: torch.device, mesh: Mesh | None = None) -> Transformer:
    """The model on the meta device, before it is sharded, with what train.compile asks for. Without
    a mesh this rank is alone."""
    ep_group, cp_group = (mesh.ep_group, mesh.cp_group) if mesh else (None, None)
    with torch.device("meta"):
        model = Transformer(config, ep_group=ep_group, cp_group=cp_group)
    if config.train.compile == "dense":
        compile_dense(model, device)
    return model


def compute_dtype(config: Config) -> torch.dtype:
    """The dtype of forward and backward of a config that `with_dtype` has resolved."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[config.train.dtype]
