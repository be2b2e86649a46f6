"""DeepSpeed's own layer, `deepspeed.moe.layer.MoE`: a buffer of [E, C, H] in one all-to-all there
and one back, where C is the largest number of tokens that a rank has for an expert.

As fair as it gets: `drop_tokens=False`, so that C grows until nothing is dropped; k as large as
ours; the same router weights, expert weights and expert size; its gate runs once, before the clock
starts, and the layer then takes what it found, as our plans are made before. What stays different:
the routing is plain top-k, the experts are plain PyTorch (a Linear each) and compute the padding,
and the padding travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed  # type: ignore[import-not-found,import-untyped,unused-ignore]
import torch
import torch.distributed as dist
from deepspeed.moe.layer import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    MoE,
)
from torch import Tensor, nn

from distmoe.bench.dispatch.layer import Layer
from distmoe.bench.dispatch.sleeping_mlp import SleepingExpert
from distmoe.bench.dispatch.subjects import RowBytes, by_distance
from distmoe.moe.mlp import SwiGluMlp


class RecordedGate(nn.Module):
    """What a gate decided once; its weights of the pairs, ``gate_KT``, take gradients."""

    def __init__(self, decision: Sequence[Any]) -> None:
        super().__init__()
        self.aux_loss, capacity, self.num_experts, self.expert_KT, self.place_KT = decision[:5]
        self.gate_KT: Tensor = decision[5].detach().requires_grad_()
        self.capacity, self.counts = int(capacity), decision[6]

    def forward(self, *_: Any) -> tuple[Any, ...]:
        return (
            self.aux_loss, self.capacity, self.num_experts, self.expert_KT, self.place_KT,
            self.gate_KT, self.counts,
        )  # fmt: skip


class DeepSpeedMoE:
    """It, with the weights of ``layer``."""

    def __init__(self, layer: Layer) -> None:
        shape, num_ranks = layer.shape, layer.exchange.size
        if shape.top_k == 1:
            raise ValueError("top_k is 1, for which its gate does not renormalize weights")
        if num_ranks != dist.get_world_size():
            raise ValueError("its expert groups need every rank of the run")
        deepspeed.init_distributed("gloo", verbose=False)
        self.moe = MoE(
            shape.hidden,
            _expert(layer),
            num_experts=shape.num_experts,
            ep_size=num_ranks,
            k=shape.top_k,
            drop_tokens=False,
            top2_2nd_expert_sampling=False,
        )
        self.moe.set_deepspeed_parallelism()
        self.num_tokens = shape.num_tokens
        experts = self.moe.deepspeed_moe.experts.deepspeed_experts
        if not layer.device.sleeps:
            _copy_weights(experts, layer)
        self.gate = self._record(layer)
        self.x_TH = layer.x_TH
        self.weights = [*(w for expert in experts for w in expert.parameters())]
        self.leaves = [self.x_TH, *self.weights, self.gate.gate_KT]
        sent = 4 * (shape.num_experts // num_ranks) * self.gate.capacity * shape.row_bytes
        self._row_bytes = by_distance(
            [sent] * num_ranks, rank=layer.exchange.rank, ranks_per_node=layer.ranks_per_node
        )
        self.name, self.level = "DeepSpeed MoE", ""
        slots, pairs = self.gate.capacity * shape.num_experts, shape.num_tokens * shape.top_k
        self.note = (
            f"{deepspeed.__version__}; plain top-k without rounding; computes and sends "
            f"{slots / pairs:.2f} times the pairs: every expert has as many places as the fullest"
        )

    @torch.no_grad()
    def _record(self, layer: Layer) -> RecordedGate:
        gate = self.moe.deepspeed_moe.gate
        gate.wg.weight.copy_(layer.router_EH)
        recorded = RecordedGate(gate(layer.x_TH, None, True, False))
        self.moe.deepspeed_moe.gate = recorded
        return recorded

    def forward(self) -> Tensor:
        out_TH: Tensor = self.moe(self.x_TH)[0]
        return out_TH

    def contract_gradients(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        dx_TH, *dweights, dgate_KT = gradients
        expert_KT = self.gate.expert_KT.long()
        token_KT = torch.arange(self.num_tokens).expand_as(expert_KT)
        by_expert_N = (expert_KT * self.num_tokens + token_KT).reshape(-1).argsort()
        dscore_N = dgate_KT.reshape(-1)[by_expert_N]
        return [dx_TH, torch.stack(dweights[0::2]), torch.stack(dweights[1::2]), dscore_N]

    def row_bytes(self) -> RowBytes:
        return self._row_bytes


def _expert(layer: Layer) -> nn.Module:
    if layer.device.sleeps:
        return SleepingExpert(layer.device.pairs_per_s)
    return SwiGluMlp(layer.shape.hidden, layer.shape.intermediate)


@torch.no_grad()
def _copy_weights(experts: nn.ModuleList, layer: Layer) -> None:
    for expert, w_in_GH, w_out_HI in zip(experts, layer.w_in_eGH, layer.w_out_eHI, strict=True):
        for parameter, weight in zip(expert.parameters(), (w_in_GH, w_out_HI), strict=True):
            parameter.copy_(weight)


subject = DeepSpeedMoE
