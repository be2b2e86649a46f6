"""Balance without a loss: a bias on the keys of each expert follows its load (arXiv 2408.15664).

    bias_e += rate * sign(mean over experts of c - c_e)

with c_e the top-k pairs, before rounding, of all tokens of the step. In integers throughout: counts
are summed exactly, E c_e is compared with the total, and the rate is a whole number of key units,
2^-24. So every rank, and a run on any number of ranks, has the same bias bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.comm.torch_group import several_ranks
from distmoe.kernels.router_topk import BIAS_LIMIT, KEY_SCALE
from distmoe.moe.layer import MoE


@torch.no_grad()
def update_expert_bias(
    layers: Sequence[MoE], rate: float | None = None, *, group: dist.ProcessGroup | None = None
) -> None:
    """Move the biases of ``layers`` by what their forwards in training chose since the last call,
    or since `MoE.begin_step`; call it after each optimizer step.

    ``rate``: in units of scores, by default each layer's config.bias_update_rate. ``group``: ranks
    whose tokens are counted; by default the layers' loss_group, else all ranks. Collective, one
    all-reduce for all layers; nothing waits for the device. Layers without a bias are passed over.
    ValueError for a rate that is not in [0, 1].
    """
    if rate is not None and not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}; it must be in [0, 1]")
    biased = [(layer, layer.bias_E) for layer in layers if layer.bias_E is not None]
    if not biased:
        return
    freq = torch.cat([_take_counts(layer, bias_E) for layer, bias_E in biased])
    group = several_ranks(biased[0][0].loss_group if group is None else group)
    if group is not None:
        dist.all_reduce(freq, group=group)
    parts = torch.split(freq, [len(bias_E) for _, bias_E in biased])
    for (layer, bias_E), freq_E in zip(biased, parts, strict=True):
        own_rate = layer.config.bias_update_rate if rate is None else rate
        bias_E.copy_(moved(bias_E, freq_E, by=round(own_rate * KEY_SCALE)))


def moved(bias_E: Tensor, freq_E: Tensor, *, by: int) -> Tensor:
    """[E] int32: up where an expert has fewer pairs than the mean, down where it has more."""
    step_E = by * torch.sign(freq_E.sum() - len(freq_E) * freq_E)
    return (bias_E + step_E).clamp(-BIAS_LIMIT, BIAS_LIMIT).int()


def _take_counts(layer: MoE, bias_E: Tensor) -> Tensor:
    """[E] int64 pairs of this rank; zeros if the layer has not run."""
    counted_E1 = layer.step_counts.take()
    if counted_E1 is None:
        return torch.zeros_like(bias_E, dtype=torch.int64)
    return counted_E1[:-1]
