"""What a layer enqueues beside the kernels of its experts, on a GPU: it is little, and does not
grow with the ranks."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.jit import KernelInterface

from distmoe import MoE, MoEConfig
from distmoe.comm import Transfer
from distmoe.comm.threaded import ThreadedExchange
from distmoe.config import DispatchConfig, RoundingConfig
from distmoe.moe.host_copy import HostCopy
from distmoe.moe.int_array import IntArray
from distmoe.planner.layer_time import MOE_OPS_OF_ONE, MOE_OPS_OF_SEVERAL
from distmoe.registry import Registry

# Of them the device learns nothing.
VIEWS = {
    "alias", "detach", "expand", "narrow", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view",
    "empty", "empty_like", "new_empty",
}  # fmt: skip


# With eight ranks and four blocks of the rows of others, launches of kernels among them.
MOST_WHILE_IDLE = 12
MOST_OF_A_FORWARD = 170
ALL_REDUCE = dist.all_reduce

WITH_KERNELS = (
    "router_logits", "router_topk", "round_select", "routing_index", "balance_targets",
    "arrange_pairs",
)  # fmt: skip


@dataclass(frozen=True)
class Enqueued:
    """``forward`` and ``backward`` of rank 0 by name, without the kernels of the experts, and
    ``idle``, those for which the device waits: between the answer of the first wait for sizes and
    the question of the second, and between its answer and the first kernel of the experts."""

    forward: Counter[str]
    backward: Counter[str]
    idle: Counter[str]


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
    """Kernels that compute nothing. ``before``: what was enqueued when the first was called;
    ``weights``: their own gradients."""

    def __init__(self, operators: Operators, weights: tuple[Tensor, Tensor]) -> None:
        self.operators, self.weights = operators, weights
        self.before: Counter[str] = Counter()

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.before = self.before or self.operators.calls.copy()

    def row_sum(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    dgrad = row_sum

    def wgrad(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.weights


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


def uncounted_all_reduce(*args: Any, **options: Any) -> Any:
    """That of ranks as threads copies; that of a GPU is one call."""
    with _disable_current_modes():
        return ALL_REDUCE(*args, **options)


class Fused:
    """A backend of rank 0: what the kernels of a GPU enqueue is counted, a launch as one, and not
    computed; the results are those of the backend ``torch``."""

    def __init__(self, counted: Any, computed: Any) -> None:
        self.counted, self.computed = counted, computed

    def __getattr__(self, name: str) -> Fused:
        return Fused(getattr(self.counted, name), getattr(self.computed, name))

    def __call__(self, *args: Any, **options: Any) -> Any:
        counted = self.counted(*args, **options)
        with _disable_current_modes():
            computed = self.computed(*args, **options)
        # A backend is made before it is asked.
        return Fused(counted, computed) if isinstance(self.counted, type) else computed


def take_fused(patch: pytest.MonkeyPatch, operators: Operators) -> None:
    """For all ops of this thread; other ranks compute as ever."""
    own_thread, load = threading.get_ident(), Registry.load

    def load_here(registry: Registry, name: str) -> Any:
        if name != "triton":
            return load(registry, name)
        return Fused(load(registry, "triton"), load(registry, "torch"))

    def launch(kernel: Any, grid: tuple[int, ...]) -> Any:
        return lambda *args, **constants: operators.calls.update([kernel.fn.__name__])

    def fused_here(device: torch.device) -> str:
        return "triton" if threading.get_ident() == own_thread else "torch"

    patch.setattr(Registry, "load", load_here)
    patch.setattr(KernelInterface, "__getitem__", launch)
    for op in WITH_KERNELS:
        patch.setattr(f"distmoe.kernels.{op}.fused_or_torch", fused_here)


class Waits:
    """What was enqueued when the host asked for sizes, and when it had its answers."""

    def __init__(self, patch: pytest.MonkeyPatch, operators: Operators) -> None:
        self.asked: list[Counter[str]] = []
        self.answered: list[Counter[str]] = []
        ask, wait, own_thread = HostCopy.__init__, HostCopy.wait, threading.get_ident()

        def noted_ask(copy: HostCopy, *parts: Tensor) -> None:
            ask(copy, *parts)
            if threading.get_ident() == own_thread:
                self.asked.append(operators.calls.copy())

        def noted_wait(copy: HostCopy) -> list[IntArray]:
            if threading.get_ident() == own_thread:
                self.answered.append(operators.calls.copy())
            return wait(copy)

        patch.setattr(HostCopy, "__init__", noted_ask)
        patch.setattr(HostCopy, "wait", noted_wait)


def enqueued(num_ranks: int, rounding: RoundingConfig) -> Enqueued:
    config = MoEConfig(
        hidden_size=4,
        intermediate_size=2,
        num_experts=64,
        top_k=4,
        rounding=rounding,
        dispatch=DispatchConfig(order="tokens", steps=4),
        kernel="torch",
    )
    x = torch.randn(num_ranks, 16, 4, generator=torch.Generator().manual_seed(0))

    def run(rank: int) -> Enqueued:
        layer = MoE(config, dist.group.WORLD)
        operators = Operators()
        mlp = NoMlp(operators, (layer.experts.w_in_eGH.detach(), layer.experts.w_out_eHI.detach()))
        if num_ranks > 1:
            layer.exchange = UncountedExchange(dist.group.WORLD)
        layer._mlp = mlp
        own_x = x[rank].requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            if rank:
                loss_of(layer, own_x).backward()
                return Enqueued(Counter(), Counter(), Counter())
            take_fused(patch, operators)
            patch.setattr(dist, "all_reduce", uncounted_all_reduce)
            waits = Waits(patch, operators)
            with operators:
                loss = loss_of(layer, own_x)
                forward = operators.calls.copy()
                loss.backward()
        idle: Counter[str] = Counter()
        if num_ranks > 1:
            idle = (waits.asked[1] - waits.answered[0]) + (mlp.before - waits.answered[1])
        return Enqueued(forward, operators.calls - forward, idle)

    return run_ranks(run, num_ranks)[0]


def loss_of(layer: MoE, x_TH: Tensor) -> Tensor:
    """Of what the layer gives, without operators that are counted."""
    out_TH, losses = layer(x_TH)
    with _disable_current_modes():
        return out_TH.sum() + losses.load_balance + losses.z


@pytest.fixture(scope="module")
def of_eight() -> Enqueued:
    return enqueued(8, RoundingConfig("balance", tile=2))


def test_operators_of_a_forward_do_not_grow_with_the_ranks(of_eight: Enqueued) -> None:
    # The candidates of so many go to the owners of the experts otherwise, a round more.
    rounding = RoundingConfig("balance", tile=2, transport="all_gather")
    of_many = enqueued(64, rounding)
    assert of_many.forward - of_eight.forward == Counter()
    assert of_many.backward - of_eight.backward == Counter()


def test_little_is_enqueued_for_a_forward(of_eight: Enqueued) -> None:
    assert of_eight.forward.total() <= MOST_OF_A_FORWARD


def test_a_plan_knows_how_much_is_enqueued(of_eight: Enqueued) -> None:
    of_one = enqueued(1, RoundingConfig("balance", tile=2))
    for counted, planned in ((of_one, MOE_OPS_OF_ONE), (of_eight, MOE_OPS_OF_SEVERAL)):
        for counts, ops in zip((counted.forward, counted.backward), planned, strict=True):
            assert abs(counts.total() - ops) <= 0.05 * ops


def test_little_is_enqueued_while_the_device_has_nothing_to_do(of_eight: Enqueued) -> None:
    assert of_eight.idle["segment_kernel"] == 1
    # A sort is many kernels.
    assert of_eight.idle["sort"] == 0
    assert of_eight.idle.total() <= MOST_WHILE_IDLE
