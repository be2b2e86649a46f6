"""Decisions are those of the same call of a region, however often it is called."""

from __future__ import annotations

import pytest
import torch
from layer_runs import CONFIG, H, make_layer
from torch.utils.checkpoint import checkpoint

from distmoe.moe.routing_tape import RoutingTape


@pytest.mark.parametrize("contexts", [RoutingTape.contexts, RoutingTape().contexts])
def test_calls_with_the_same_contexts_have_tapes_of_their_own(contexts: object) -> None:
    """Also where the second forward comes before the first backward."""
    layer = make_layer(CONFIG)
    inputs = torch.randn(2, 150, H, generator=torch.Generator().manual_seed(0))

    def gradients(recompute: bool) -> list[torch.Tensor]:
        xs = [x.clone().requires_grad_() for x in inputs]
        if recompute:
            outs = [checkpoint(layer, x, use_reentrant=False, context_fn=contexts)[0] for x in xs]
        else:
            outs = [layer(x)[0] for x in xs]
        return [*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), xs)]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(got, want)
