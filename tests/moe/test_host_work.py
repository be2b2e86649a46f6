"""What a layer enqueues to plan, post and combine does not grow with the ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from distmoe import MoE, MoEConfig
from distmoe.comm import Transfer
from distmoe.comm.threaded import ThreadedExchange
from distmoe.config import DispatchConfig, RoundingConfig

# Of them the device learns nothing.
VIEWS = {
    "alias", "detach", "expand", "narrow", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view",
    "empty", "empty_like", "new_empty",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts what is enqueued inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in VIEWS:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


class NoMlp:
    """Kernels that compute nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class UncountedExchange(ThreadedExchange):
    """Its own copies are no part of the layer."""

    def _send(self, transfer: Transfer) -> None:
        with _disable_current_modes():
            super()._send(transfer)

    def _take(self, peer: int, buffer: Tensor, tag: int) -> None:
        with _disable_current_modes():
            super()._take(peer, buffer, tag)

    def _gather(self, x: Tensor) -> Tensor:
        with _disable_current_modes():
            return super()._gather(x)


def operators_of_a_forward(num_ranks: int) -> Counter[str]:
    """Of rank 0, without kernels."""
    config = MoEConfig(
        hidden_size=4,
        intermediate_size=2,
        num_experts=64,
        top_k=4,
        load_balance_scope="rank",
        rounding=RoundingConfig("none", tile=2),
        dispatch=DispatchConfig(order="tokens", steps=4),
        kernel="torch",
    )
    x = torch.randn(num_ranks, 16, 4, generator=torch.Generator().manual_seed(0))

    def run(rank: int) -> Counter[str]:
        layer = MoE(config, dist.group.WORLD)
        layer.exchange, layer._mlp = UncountedExchange(dist.group.WORLD), NoMlp()
        operators = Operators()
        if rank:
            layer(x[rank])
        else:
            with operators:
                layer(x[0])
        return operators.calls

    return run_ranks(run, num_ranks)[0]


def test_operators_of_a_forward_do_not_grow_with_the_ranks() -> None:
    few, many = (operators_of_a_forward(num_ranks) for num_ranks in (8, 64))
    assert many - few == Counter()
