"""Bytes that a real MoE layer keeps for its backward, and holds at the most: what autograd and the
allocations say. `planner.activation_memory` has the formula."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmoe.bench.live_storages import LiveStorages
from distmoe.config import MoEConfig
from distmoe.moe.layer import MoE
from distmoe.planner.activation_memory import ActivationShape
from distmoe.registry import ROUNDING_RULES


@dataclass(frozen=True)
class Measured:
    """Bytes of one forward and backward of a layer; parameters and the layer's input are apart.

    ``saved``: what autograd holds for the backward, by (dtype, shape). ``kept``: all that lives
    after the forward, but for its result. ``forward``, ``backward``: what a pass added to that at
    the most.
    """

    saved: dict[tuple[str, tuple[int, ...]], int]
    kept: int
    forward: int
    backward: int


def shape_and_measured(
    config: MoEConfig, *, num_tokens: int, device: torch.device
) -> tuple[ActivationShape, Measured]:
    """What the formula takes of a layer in fp16 with the fused kernels, and what the layer has."""
    layer = MoE(replace(config, kernel="triton")).half().to(device)
    x_TH, dout_TH = torch.randn(2, num_tokens, config.hidden_size, device=device).half().unbind()
    # Storages of their own.
    measured = measure(layer, x_TH.clone().requires_grad_(), dout_TH.clone())
    rounding, E = config.rounding, config.num_experts
    added = ROUNDING_RULES.load(rounding.rule).most_added(E, rounding.tile)
    shape = ActivationShape(
        T=num_tokens,
        H=config.hidden_size,
        I=config.intermediate_size,
        E=E,
        G=layer.experts.w_in_eGH.shape[1],
        pairs=num_tokens * config.top_k + added,
    )
    return shape, measured


def measure(layer: MoE, x_TH: Tensor, dout_TH: Tensor) -> Measured:
    """Runs ``layer`` once. Interpreted kernels allocate what compiled ones do."""
    # By storage, without those of parameters.
    saved: dict[int, Tensor] = {}
    parameters = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in parameters:
            saved[storage] = tensor
        return tensor

    storages = LiveStorages(collects=True)
    storages.ignore(*layer.parameters(), x_TH, dout_TH)
    storages.phase = "forward"
    with storages:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out_TH, losses = layer(x_TH)
        gc.collect()
        by_kind, result = _by_kind(saved.values()), out_TH.untyped_storage().nbytes()
        saved.clear()
        kept = storages.read() - result
        storages.phase = "backward"
        torch.autograd.backward([out_TH, losses.load_balance + losses.z], [dout_TH, None])
    forward, backward = storages.peak["forward"], storages.peak["backward"]
    return Measured(by_kind, kept, forward - kept, backward - kept - result)


def _by_kind(tensors: Iterable[Tensor]) -> dict[tuple[str, tuple[int, ...]], int]:
    """Bytes by (dtype, shape), the largest first."""
    kinds: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for tensor in tensors:
        kind = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        kinds[kind] += tensor.untyped_storage().nbytes()
    return dict(kinds.most_common())
