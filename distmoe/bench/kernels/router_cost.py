"""What routing and rounding cost beside the experts. The gate's own product is not in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distmoe.bench.kernels.clock import Clock, Samples, round_robin
from distmoe.bench.kernels.problem import random_logits, rounding_of
from distmoe.bench.kernels.shapes import Shape
from distmoe.comm import make_exchange
from distmoe.routing.round_tokens import Rounded, round_scores
from distmoe.routing.routers import Scores, make_router
from distmoe.routing.routing import Routing


@dataclass(frozen=True)
class RouterCost:
    """``top_k``: logits to scores, keys and the choice. ``rounding``: counts, targets, selection.
    ``index``: pairs and offsets. ``backward``: gradients of the logits from those of the weights.
    """

    rule: str
    samples: dict[str, Samples]

    @property
    def total_ms(self) -> float:
        return sum(sample.median for sample in self.samples.values())


def router_cost(
    shape: Shape, rule: str, device: torch.device, *, rounds: int, clock: Clock
) -> RouterCost:
    """Times on one rank, whose tokens are the whole population."""
    router = make_router("softmax_topk", top_k=shape.K, renormalize="topk")
    exchange, rounding = make_exchange(None), rounding_of(shape, rule)
    logits_TE = random_logits(shape, device).requires_grad_()
    scores = router(logits_TE)
    rounded = round_scores(scores, exchange, rounding)
    routing = _index(scores, rounded)
    dscore_N = torch.ones_like(routing.score_N)
    samples = round_robin(
        {
            "top_k": lambda: router(logits_TE),
            "rounding": lambda: round_scores(scores, exchange, rounding),
            "index": lambda: _index(scores, rounded),
            "backward": lambda: torch.autograd.grad(
                routing.score_N, logits_TE, dscore_N, retain_graph=True
            ),
        },
        rounds=rounds,
        clock=clock,
    )
    return RouterCost(rule, samples)


def _index(scores: Scores, rounded: Rounded) -> Routing:
    # With the bound that the host knows, as the layer does: nothing waits for the counts.
    weight_TE = scores.weight(rounded.selected_TE)
    return Routing.from_mask(rounded.selected_TE, weight_TE, max_pairs=rounded.max_pairs)
