"""AdamW over parameter groups that are uniform in mesh and in weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distmoe.config import OptimConfig
from distmoe.engines.optimizer_state import STEP

MOMENTS = ("exp_avg", "exp_avg_sq")


def decays(name: str) -> bool:
    """Matrices decay; norms and embeddings do not."""
    return not (name.endswith("norm.weight") or name.startswith("embedding."))


def build_adamw(
    named: Iterable[tuple[str, Tensor]],
    optim: OptimConfig,
    matrix_rows: Mapping[str, tuple[int, ...]],
) -> torch.optim.AdamW:
    """AdamW with decoupled decay, element by element: ``matrix_rows`` makes no difference. One
    group per (mesh, decay): a fused update of tensors from two meshes is refused by DTensor."""
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for name, parameter in named:
        mesh = str(parameter.device_mesh) if isinstance(parameter, DTensor) else ""
        groups.setdefault((mesh, decays(name)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": optim.weight_decay if decay else 0.0,
                "states": (*MOMENTS, STEP),
            }
            for (_, decay), parameters in groups.items()
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
