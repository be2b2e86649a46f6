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
    """Matrices decay; norms, biases and embeddings do not."""
    return not (name.endswith(("norm.weight", ".bias")) or name.startswith("embedding."))


def build_adamw(
    named: Iterable[tuple[str, Tensor]],
    optim: OptimConfig,
    matrix_rows: Mapping[str, tuple[int, ...]],
) -> torch.optim.AdamW:
    """AdamW with decoupled decay, element by element: ``matrix_rows`` makes no difference. One
    group per (mesh, decay): a fused update of tensors from two meshes is refused by DTensor."""
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    on_gpu = False
    for name, parameter in named:
        on_gpu = on_gpu or parameter.is_cuda
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
        # The default of a GPU, an operator after the other over all parameters, takes a copy of
        # them all for what lies in between.
        fused=on_gpu or None,
    )
