"""Initial weights that do not depend on how the model is cut.

Every logical parameter has a generator of its own, seeded by (run seed, name), and an expert's
matrix by (run seed, name, expert): expert 17 starts equal wherever it lives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distmoe.model.transformer import Transformer
from distmoe.moe.experts import Experts

RESIDUAL_OUTPUTS = ("o_proj.weight", "out_proj.weight", "w_out_eHI")


@torch.no_grad()
def initialize(model: Transformer, *, seed: int, first_expert: int = 0) -> None:
    """Fill every parameter in place: norms with 1, biases with 0, matrices with N(0, init_std^2),
    the outputs of residual branches with that over sqrt(2 n_layers). Buffers, the experts' biases,
    with 0.

    Parameters may be plain tensors or DTensors sharded by FSDP; each rank draws the logical
    tensor and keeps its part. ``first_expert``: logical id of the first expert of this rank.
    """
    config = model.config.model
    residual_std = config.init_std / (2 * config.n_layers) ** 0.5
    expert_names = set(_expert_parameters(model))
    for name, parameter in model.named_parameters():
        std = residual_std if name.endswith(RESIDUAL_OUTPUTS) else config.init_std
        if name.endswith("norm.weight"):
            full = torch.ones(parameter.shape)
        elif name.endswith("proj.bias"):
            full = torch.zeros(parameter.shape)
        elif name in expert_names:
            full = _draw_experts(name, parameter, std=std, seed=seed, first=first_expert)
        else:
            full = _draw(tuple(parameter.shape), std, f"{seed}/{name}")
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(own_shard(full, parameter))
    for buffer in model.buffers():
        buffer.zero_()


def _expert_parameters(model: nn.Module) -> Iterator[str]:
    for module_name, module in model.named_modules():
        if isinstance(module, Experts):
            for name, _ in module.named_parameters():
                yield f"{module_name}.{name}"


def _draw(shape: tuple[int, ...], std: float, key: str) -> Tensor:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _draw_experts(name: str, parameter: Tensor, *, std: float, seed: int, first: int) -> Tensor:
    num_local = parameter.shape[0]
    if isinstance(parameter, DTensor) and "ep" in (parameter.device_mesh.mesh_dim_names or ()):
        num_local //= parameter.device_mesh["ep"].size()
    shape = tuple(parameter.shape[1:])
    return torch.stack([_draw(shape, std, f"{seed}/{name}/{first + i}") for i in range(num_local)])


def own_shard(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of ``full`` under the FSDP axes of ``like``; ``ep`` is cut already."""
    if not isinstance(like, DTensor):
        return full
    mesh = like.device_mesh
    for axis, placement in zip(mesh.mesh_dim_names or (), like.placements, strict=True):
        if axis == "ep" or not (placement.is_shard() or hasattr(placement, "split_factor")):
            continue
        dim: int = placement.dim  # type: ignore[attr-defined]
        chunks = full.chunk(mesh[axis].size(), dim)
        rank = mesh[axis].get_local_rank()
        full = chunks[rank] if rank < len(chunks) else full.narrow(dim, 0, 0)
    return full
