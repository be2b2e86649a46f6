"""The layer in a data-parallel wrapper: what all ranks have is averaged, experts are not."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from layer_runs import CONFIG, inputs, make_layer
from ranks import run_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distmoe import MoE
from distmoe.config import RoundingConfig

X, DOUT = inputs([24, 24], None)
NOT_ROUNDED = replace(CONFIG, rounding=RoundingConfig("none"))


def marked(layer: MoE) -> list[str]:
    return [name for name, p in layer.named_parameters() if not getattr(p, "allreduce", True)]


def step(rank: int, wrapped: bool) -> dict[str, Tensor]:
    layer = make_layer(NOT_ROUNDED, rank, 2)
    if wrapped:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(layer, marked(layer))
    rows = slice(24 * rank, 24 * (rank + 1))
    model = DistributedDataParallel(layer) if wrapped else layer
    out, losses = model(X[rows])
    ((out * DOUT[rows]).sum() + losses.load_balance).backward()
    return {name: p.grad for name, p in layer.named_parameters()}


def test_ddp_leaves_marked_experts_alone() -> None:
    plain, wrapped = (run_ranks(step, 2, flag, backend="gloo") for flag in (False, True))
    mean = (plain[0]["router_EH"] + plain[1]["router_EH"]) / 2
    for rank in range(2):
        # To halve is exact, before the sum or after.
        assert torch.equal(wrapped[rank]["router_EH"], mean)
        for name in ("experts.w_in_eGH", "experts.w_out_eHI"):
            assert torch.equal(wrapped[rank][name], plain[rank][name])


def test_marks_of_experts() -> None:
    """Only where other ranks have others; and a layer that was made without memory keeps them."""
    names = ["experts.w_in_eGH", "experts.w_out_eHI"]

    def on_meta(rank: int) -> list[str]:
        with torch.device("meta"):
            layer = MoE(CONFIG, dist.group.WORLD)
        return marked(layer.to_empty(device="cpu"))

    assert run_ranks(on_meta, 2) == [names, names]
    assert run_ranks(lambda rank: marked(make_layer(CONFIG, rank, 2)), 2) == [names, names]
    assert marked(MoE(CONFIG)) == []
