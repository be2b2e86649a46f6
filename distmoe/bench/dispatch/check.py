"""Whether a peer computes what our layer computes, and whether rows that travel in fewer bytes are
only rounded: outputs and every gradient, on every rank."""

from __future__ import annotations

from dataclasses import replace

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
    return _worst(layer, theirs, ours)


def rounding_errors(layer: Layer, way: Way) -> dict[str, float]:
    """The same of ``way`` and of rows that were rounded beforehand and then travel as they are
    computed: 0, whichever rank owns a row. Partial sums, which are rounded in between, are left as
    they are."""
    way = replace(way, sum_dtype="computed")
    plain = OwnWay(layer, replace(way, row_dtype="computed"))
    x_TH, dout_TH = (way.travel.pack(v.detach()).unpacked() for v in (layer.x_TH, layer.dout_TH))
    plain.leaves = [x_TH.requires_grad_(), *layer.leaves[1:]]
    got = gradients_of(OwnWay(layer, way), layer.dout_TH)
    return _worst(layer, got, gradients_of(plain, dout_TH))


def _worst(
    layer: Layer, got: tuple[Tensor, list[Tensor]], want: tuple[Tensor, list[Tensor]]
) -> dict[str, float]:
    found = [_error(a, b) for a, b in zip([got[0], *got[1]], [want[0], *want[1]], strict=True)]
    worst = torch.tensor(found)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=layer.group)
    return dict(zip(NAMES, worst.tolist(), strict=True))


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    return float((got - want).abs().max() / want.abs().max())
