"""Inputs of one measurement: rows, weights, and a routing as a random router makes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmoe.bench.kernels.shapes import Shape
from distmoe.comm import make_exchange
from distmoe.config import RoundingConfig
from distmoe.kernels.moe_mlp import PairIndex
from distmoe.planner.roofline import LayerSize
from distmoe.routing.round_tokens import round_scores
from distmoe.routing.routers import make_router
from distmoe.routing.routing import Routing


@dataclass(frozen=True)
class Problem:
    """``rule``: rounding rule, none for plain top-k. ``x_RH``, ``dy_RH`` [T, H] and the weights in
    the dtype of the bench, ``score_L`` fp32; ``expert_L`` int32 [L]."""

    shape: Shape
    rule: str
    x_RH: Tensor
    dy_RH: Tensor
    w_in_eGH: Tensor
    w_out_eHI: Tensor
    score_L: Tensor
    expert_L: Tensor
    index: PairIndex

    @property
    def num_pairs(self) -> int:
        return self.expert_L.numel()

    @property
    def device(self) -> torch.device:
        return self.x_RH.device

    @property
    def size(self) -> LayerSize:
        shape = self.shape
        return LayerSize(shape.T, self.num_pairs, shape.E, shape.H, shape.I)

    @property
    def fixed_top_k(self) -> bool:
        """Every token has K experts."""
        return self.rule == "none"

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype."""
        names = ("x_RH", "dy_RH", "w_in_eGH", "w_out_eHI")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})


def random_logits(shape: Shape, device: torch.device) -> Tensor:
    """[T, E] fp32, the same in every call."""
    generator = torch.Generator(device).manual_seed(shape.E * 1000 + shape.K)
    return torch.randn(shape.T, shape.E, generator=generator, device=device)


def rounding_of(shape: Shape, rule: str) -> RoundingConfig:
    """The settings with which the bench rounds."""
    return RoundingConfig(rule=rule, tile=shape.tile)


@torch.no_grad()
def make_problem(shape: Shape, rule: str, device: torch.device, dtype: torch.dtype) -> Problem:
    """Random numbers of the scales of a trained layer, the same in every call."""
    scores = make_router("softmax_topk", top_k=shape.K, renormalize="topk")(
        random_logits(shape, device)
    )
    rounded = round_scores(scores, make_exchange(None), rounding_of(shape, rule))
    routing = Routing.from_mask(rounded.selected_TE, scores.weight(rounded.selected_TE))
    generator = torch.Generator(device).manual_seed(1)

    def normal(*size: int) -> Tensor:
        # What a generator draws in 16 bits depends on the version of torch.
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    return Problem(
        shape=shape,
        rule=rule,
        x_RH=normal(shape.T, shape.H),
        dy_RH=normal(shape.T, shape.H),
        w_in_eGH=normal(shape.E, 2 * shape.I, shape.H) * shape.H**-0.5,
        w_out_eHI=normal(shape.E, shape.H, shape.I) * shape.I**-0.5,
        # Numbers that the dtype holds, so that peers that take scores in it get the same ones.
        score_L=routing.score_N.to(dtype).float(),
        expert_L=routing.expert_N,
        index=_pair_index(routing),
    )


def _pair_index(routing: Routing) -> PairIndex:
    ends_E = routing.counts_E.cumsum(0)
    return PairIndex(
        row_L=routing.token_N,
        offsets_e1=torch.cat([ends_E.new_zeros(1), ends_E]).int(),
        by_row_L=routing.by_token_N,
        row_offsets_R1=routing.token_offsets_T1,
    )
