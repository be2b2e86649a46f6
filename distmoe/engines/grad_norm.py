"""One gradient norm over dense and expert parameters, and one clip."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def grad_norm(gradients: list[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """L2 norm, fp32 scalar, of everything that the ranks of ``group`` hold in shards.

    Dense gradients are sharded over dp_shard and experts over (efsdp, ep), which are the same
    ranks: each holds a distinct part of both, so one sum of squares over them serves both.
    """
    local = local_tensors(gradients)
    device = local[0].device if local else torch.device("cpu")
    squares = torch.zeros((), dtype=torch.float32, device=device)
    if local:
        norms = torch._foreach_norm(local, 2, dtype=torch.float32)
        squares = torch.stack(norms).square().sum()
    if group is not None:
        dist.all_reduce(squares, group=group)
    return squares.sqrt()


@torch.no_grad()
def clip(gradients: list[Tensor], norm: Tensor, clip_norm: float) -> None:
    """Scale in place so that the norm is at most ``clip_norm``; 0 leaves them alone."""
    if clip_norm > 0 and gradients:
        scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local_tensors(gradients), scale)


def local_tensors(tensors: list[Tensor]) -> list[Tensor]:
    """The parts of DTensors that this rank holds; empty parts are left out."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return [t for t in local if t.numel()]
