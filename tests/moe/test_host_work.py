"""What a layer enqueues to plan, post and combine does not grow with the ranks."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from distmoe import MoE, MoEConfig
from distmoe.comm import Transfer
from distmoe.comm.threaded import ThreadedExchange
from distmoe.config import DispatchConfig, RoundingConfig
from distmoe.moe.host_copy import HostCopy
from distmoe.moe.int_array import IntArray

# Of them the device learns nothing.
VIEWS = {
    "alias", "detach", "expand", "narrow", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view",
    "empty", "empty_like", "new_empty",
}  # fmt: skip


# With four blocks of the rows of others.
MOST_WHILE_IDLE = 70

Enqueued = dict[int, tuple[Counter[str], Counter[str]]]


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
    """Kernels that compute nothing. ``before``: what was enqueued when the first was called."""

    def __init__(self, operators: Operators) -> None:
        self.operators = operators
        self.before: Counter[str] = Counter()

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.before = self.before or self.operators.calls.copy()

    def row_sum(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


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


def operators_of_a_forward(num_ranks: int) -> tuple[Counter[str], Counter[str]]:
    """Of rank 0, without kernels: all, and those for which the device waits: between the answer of
    the first wait for sizes and the question of the second, and between its answer and the first
    kernel of the experts."""
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

    def run(rank: int) -> tuple[Counter[str], Counter[str]]:
        layer = MoE(config, dist.group.WORLD)
        operators = Operators()
        mlp = NoMlp(operators)
        layer.exchange, layer._mlp = UncountedExchange(dist.group.WORLD), mlp
        if rank:
            layer(x[rank])
            return operators.calls, mlp.before
        asked: list[Counter[str]] = []
        answered: list[Counter[str]] = []
        ask, wait, own_thread = HostCopy.__init__, HostCopy.wait, threading.get_ident()

        def noted_ask(copy: HostCopy, *parts: Tensor) -> None:
            ask(copy, *parts)
            if threading.get_ident() == own_thread:
                asked.append(operators.calls.copy())

        def noted_wait(copy: HostCopy) -> list[IntArray]:
            if threading.get_ident() == own_thread:
                answered.append(operators.calls.copy())
            return wait(copy)

        with pytest.MonkeyPatch.context() as patch, operators:
            patch.setattr(HostCopy, "__init__", noted_ask)
            patch.setattr(HostCopy, "wait", noted_wait)
            layer(x[0])
        return operators.calls, (asked[1] - answered[0]) + (mlp.before - answered[1])

    return run_ranks(run, num_ranks)[0]


@pytest.fixture(scope="module")
def enqueued() -> Enqueued:
    return {num_ranks: operators_of_a_forward(num_ranks) for num_ranks in (8, 64)}


def test_operators_of_a_forward_do_not_grow_with_the_ranks(enqueued: Enqueued) -> None:
    assert enqueued[64][0] - enqueued[8][0] == Counter()


def test_little_is_enqueued_while_the_device_has_nothing_to_do(enqueued: Enqueued) -> None:
    _, idle = enqueued[8]
    # Of the pairs by row; a sort is many kernels.
    assert idle["sort"] == 1
    assert idle.total() <= MOST_WHILE_IDLE
