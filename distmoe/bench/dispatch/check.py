"""Whether a peer computes what our layer computes: outputs and every gradient, on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.bench.dispatch.layer import Layer
from distmoe.bench.dispatch.subjects import OwnWay, Subject, gradients_of
from distmoe.bench.dispatch.ways import Way

# Of the largest number of a tensor, in fp32.
MOST_WRONG = 1e-5
NAMES = ("out", "dx", "dw_in", "dw_out", "dscore")


def worst_errors(layer: Layer, peer: Subject) -> dict[str, float]:
    """max |peer - ours| / max |ours| of the worst rank, by tensor; collective. Needs a layer that
    computes."""
    theirs = gradients_of(peer, layer.dout_TH)
    ours = gradients_of(OwnWay(layer, Way("rank", overlap=True)), layer.dout_TH)
    found = [
        _error(got, want)
        for got, want in zip([theirs[0], *theirs[1]], [ours[0], *ours[1]], strict=True)
    ]
    worst = torch.tensor(found)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=layer.group)
    return dict(zip(NAMES, worst.tolist(), strict=True))


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    return float((got - want).abs().max() / want.abs().max())
