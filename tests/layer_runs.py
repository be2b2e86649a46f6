"""An expert-parallel layer on P ranks, and the reference on the concatenated tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe import MoE, MoEConfig
from distmoe.moe.reference import moe_reference
from distmoe.routing.losses import load_balance_loss, z_loss
from distmoe.routing.round_tokens import round_tokens
from distmoe.routing.routers import scores_from_probabilities
from distmoe.routing.routing import Routing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
H, I, E, K = 16, 8, 8, 3
CONFIG = MoEConfig(hidden_size=H, intermediate_size=I, num_experts=E, top_k=K)
TILE = 8

# Tokens of each rank, and what the router prefers.
CASES = {
    "even": (lambda P: [48 // P] * P, None),
    "uneven": (lambda P: [48 // P + 3 * r for r in range(P)], None),
    "a_rank_without_tokens": (lambda P: [0] + [24] * (P - 1) if P > 1 else [24], None),
    "all_to_one_expert": (lambda P: [40 // P] * P, 5),
    "one_rank_starved": (lambda P: [24] * P, 0),
}


def weights(num_experts: int = E) -> dict[str, Tensor]:
    """Of the first of E experts."""
    generator = torch.Generator().manual_seed(0)
    whole = {
        "router": torch.randn(E, H, generator=generator),
        "w_in": torch.randn(E, 2 * I, H, generator=generator) * H**-0.5,
        "w_out": torch.randn(E, H, I, generator=generator) * I**-0.5,
    }
    return {name: weight[:num_experts].clone() for name, weight in whole.items()}


def inputs(tokens: list[int], favourite: int | None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(tokens))
    x = torch.randn(sum(tokens), H, generator=generator)
    if favourite is not None:
        # Along one router row: every token likes that expert, and the same few others.
        x = x * 0.05 + weights()["router"][favourite] * 0.5
    return x, torch.randn(sum(tokens), H, generator=generator)


def make_layer(
    config: MoEConfig, rank: int = 0, num_ranks: int = 1, *, ranks_per_node: int = 0
) -> MoE:
    """The layer of a rank, with its share of `weights`."""
    group = dist.group.WORLD if num_ranks > 1 else None
    layer = MoE(config, group, ranks_per_node=ranks_per_node)
    num_local = config.num_experts // num_ranks
    own = slice(rank * num_local, (rank + 1) * num_local)
    w = weights(config.num_experts)
    with torch.no_grad():
        layer.router_EH.copy_(w["router"])
        layer.experts.w_in_eGH.copy_(w["w_in"][own])
        layer.experts.w_out_eHI.copy_(w["w_out"][own])
    return layer


def run_layer(
    rank: int,
    config: MoEConfig,
    tokens: list[int],
    x: Tensor,
    dout: Tensor,
    ranks_per_node: int = 0,
):
    layer = make_layer(config, rank, len(tokens), ranks_per_node=ranks_per_node).to(DEVICE)
    begin = sum(tokens[:rank])
    rows = slice(begin, begin + tokens[rank])
    x_TH = x[rows].clone().to(DEVICE).requires_grad_()
    out_TH, losses = layer(x_TH)
    objective = (out_TH * dout[rows].to(DEVICE)).sum() + losses.load_balance + losses.z
    objective.backward()
    result = {
        "out": out_TH.detach(),
        "dx": x_TH.grad,
        "d_router": layer.router_EH.grad,
        "dw_in": layer.experts.w_in_eGH.grad,
        "dw_out": layer.experts.w_out_eHI.grad,
        "loss": torch.stack([losses.load_balance, losses.z]).detach(),
        "target": layer.stats.target_E,
        "rows_sent": layer.stats.rows_sent,
        "copies_sent": layer.stats.copies_sent,
        "traffic": layer.exchange.traffic.bytes_sent,
        "links": [e.traffic.bytes_sent for e in layer.links.all()] if layer.links else [],
    }
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in result.items()}


def together(results: list[dict]) -> dict[str, Tensor]:
    """What the ranks give together: rows one after the other, shared gradients summed."""
    joined = {
        name: torch.cat([r[name] for r in results]) for name in ("out", "dx", "dw_in", "dw_out")
    }
    joined |= {
        name: torch.stack([r[name] for r in results]).sum(0) for name in ("d_router", "loss")
    }
    return joined


class Sent(torch.autograd.Function):
    """Rows, and their gradients, rounded to the format in which they travel."""

    @staticmethod
    def forward(ctx: Any, v_TH: Tensor, row_dtype: str, gradient_dtype: str) -> Tensor:
        ctx.gradient_dtype = gradient_dtype
        return as_sent(v_TH, row_dtype)

    @staticmethod
    def backward(ctx: Any, dv_TH: Tensor) -> tuple[Tensor, None, None]:
        return as_sent(dv_TH, ctx.gradient_dtype), None, None


def as_sent(v_TH: Tensor, row_dtype: str) -> Tensor:
    """What comes out at the other end."""
    if row_dtype == "bf16":
        return v_TH.bfloat16().to(v_TH.dtype)
    if row_dtype == "fp8":
        # One group: the power of two that brings the largest value to at most 448.
        largest_T1 = v_TH.abs().amax(1, keepdim=True)
        scale_T1 = torch.exp2(torch.ceil(torch.log2(largest_T1 / 448).clamp(min=-126)))
        return (v_TH / scale_T1).float().to(torch.float8_e4m3fn).to(v_TH.dtype) * scale_T1
    return v_TH.clone()


def by_reference(config: MoEConfig, x: Tensor, dout: Tensor, groups: int, dtype: torch.dtype):
    """The same layer as plain autograd over all tokens and experts."""
    w = {
        name: value.to(dtype).requires_grad_()
        for name, value in weights(config.num_experts).items()
    }
    x_TH = x.to(dtype).clone().requires_grad_()
    logits_TE = x_TH @ w["router"].T
    prob_TE = logits_TE.softmax(1)
    rounded = round_tokens(
        prob_TE.detach().float(),
        K,
        tile=config.rounding.tile,
        rule=config.rounding.rule,
        balance_groups=groups,
        capacity_factor=config.rounding.capacity_factor,
        capacity_of=config.rounding.capacity_of,
    )
    scores = scores_from_probabilities(prob_TE, top_k=K, renormalize="topk")
    mask_TE = torch.zeros_like(prob_TE, dtype=torch.bool)
    mask_TE[rounded.token_N.long(), rounded.expert_N.long()] = True
    routing = Routing.from_mask(mask_TE, scores.weight(mask_TE))
    sent_TH = Sent.apply(x_TH, config.dispatch.row_dtype, "computed")
    out_TH = Sent.apply(
        moe_reference(sent_TH, routing, w["w_in"], w["w_out"]),
        "computed",
        config.dispatch.row_dtype,
    )
    counts_E = scores.chosen_TE.sum(0)
    losses = [
        load_balance_loss(prob_TE, counts_E, freq_tokens=len(x), num_tokens=len(x), top_k=K),
        z_loss(logits_TE, num_tokens=len(x)),
    ]
    ((out_TH * dout.to(dtype)).sum() + losses[0] + losses[1]).backward()
    return {
        "out": out_TH.detach(),
        "dx": x_TH.grad,
        "d_router": w["router"].grad,
        "dw_in": w["w_in"].grad,
        "dw_out": w["w_out"].grad,
        "loss": torch.stack(losses).detach(),
    }, rounded
