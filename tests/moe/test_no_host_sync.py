"""With one rank, neither forward nor backward of the layer makes the host wait for the device; with
several the forward waits for sizes, and nothing else does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from distmoe import MoE, MoEConfig, update_expert_bias
from distmoe.config import DispatchConfig, RoundingConfig
from distmoe.kernels.moe_mlp import MoeMlp, load_backend
from distmoe.kernels.testing import NoHostSync
from distmoe.moe.host_copy import HostCopy
from distmoe.moe.int_array import IntArray
from distmoe.moe.routing_tape import RoutingTape
from distmoe.registry import ROUNDING_RULES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = MoEConfig(hidden_size=32, intermediate_size=16, num_experts=8, top_k=2, kernel="triton")


@pytest.fixture
def fused_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of a GPU, in the interpreter where there is none, which is not for threads."""
    ops = ("router_logits", "router_topk", "round_select", "routing_index", "balance_targets")
    for op in ops:
        monkeypatch.setattr(f"distmoe.kernels.{op}.fused_or_torch", lambda device: "triton")
    monkeypatch.setattr("distmoe.kernels.fp8_rows.e4m3_or_torch", lambda device: "triton")


def step(layer: MoE, x: torch.Tensor) -> None:
    out, losses = layer(x)
    (out.square().sum() + losses.load_balance + losses.z).backward()


def assert_no_wait(work: Callable[[], object]) -> None:
    """On a GPU torch says so, too."""
    if DEVICE.type == "cuda":
        # Compiles the kernels.
        work()
    with NoHostSync():
        work()
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("fused_router")
@pytest.mark.parametrize("rule", list(ROUNDING_RULES))
def test_layer(rule: str) -> None:
    # The operators of a capacity, and of a backward, are the same under every rule.
    factor = 1.0 if rule == "balance" else 0.0
    rounding = RoundingConfig(rule, tile=16, capacity_factor=factor, capacity_of="rank")
    layer = MoE(replace(CONFIG, rounding=rounding)).to(DEVICE).bfloat16()
    x = torch.randn(70, 32, device=DEVICE).bfloat16()
    assert_no_wait(lambda: step(layer, x) if rule == "balance" else layer(x))


# With every scope of the load-balance loss, the default of which is `global`.
ROUTINGS = {
    "sigmoid with a bias": {
        "router": "sigmoid_topk",
        "bias_update_rate": 0.001,
        "load_balance_scope": "sequence",
    },
    "softmax with a bias and a scale": {
        "bias_update_rate": 0.001,
        "score_scale": 2.5,
        "load_balance_scope": "micro_batch",
    },
    "groups": {"expert_groups": 4, "groups_per_token": 2, "group_score": "top2"},
    "groups with a bias": {
        "router": "sigmoid_topk",
        "bias_update_rate": 0.001,
        "expert_groups": 4,
        "groups_per_token": 2,
        "load_balance_scope": "ep",
    },
    "balanced": {"router": "balanced", "load_balance_scope": "rank"},
    "hash": {"router": "hash"},
    "short rows": {"dispatch": DispatchConfig(row_dtype="fp8", sum_dtype="bf16")},
}


@pytest.mark.usefixtures("fused_router")
@pytest.mark.parametrize("changes", ROUTINGS.values(), ids=ROUTINGS)
def test_a_step_of_two_micro_batches(changes: dict[str, Any]) -> None:
    layer = MoE(replace(CONFIG, rounding=RoundingConfig("down", tile=16), **changes))
    layer = layer.to(DEVICE).bfloat16()
    x = torch.randn(2, 9, 32, device=DEVICE).bfloat16()

    def whole_step() -> None:
        layer.begin_step()
        step(layer, x)
        # The counts of a second micro-batch, without the cost of its backward.
        layer(x)
        update_expert_bias([layer])

    assert_no_wait(whole_step)


def test_a_sync_is_seen() -> None:
    x = torch.arange(4)
    for wait in (lambda: int(x[0]), lambda: x.nonzero(), lambda: x[x > 1], lambda: x.bincount()):
        with pytest.raises(AssertionError, match="makes the host wait"), NoHostSync():
            wait()


@pytest.mark.usefixtures("fused_router")
def test_a_backend_that_loops_on_the_host_is_seen() -> None:
    layer = MoE(replace(CONFIG, kernel="torch")).to(DEVICE)
    layer.config = replace(layer.config, rounding=RoundingConfig("none"))
    x = torch.randn(70, 32, device=DEVICE)
    with pytest.raises(AssertionError, match="makes the host wait"), NoHostSync():
        step(layer, x)


class Unwatched:
    """A backend that loops on the host, which a test of the rest of the layer does not mind."""

    def __init__(self, mlp: MoeMlp) -> None:
        self.mlp = mlp

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with _disable_current_modes():
                return getattr(self.mlp, name)(*args, **options)

        return call


@pytest.mark.parametrize(
    ("level", "forward_waits"),
    # What to send, what arrives; between nodes also what to pass on, and when its sums are ready.
    [("copies", 2), ("rank", 2), ("node", 4)],
)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "recomputed"])
def test_several_ranks_wait_for_sizes_only(
    level: str, forward_waits: int, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    wait = HostCopy.wait
    rank_of = threading.local()

    def counted(copy: HostCopy) -> list[IntArray]:
        waits.append(rank_of.rank)
        with _disable_current_modes():
            return wait(copy)

    monkeypatch.setattr(HostCopy, "wait", counted)
    config = replace(
        CONFIG,
        rounding=RoundingConfig(tile=16, capacity_factor=1.0),
        # Without kernels for e4m3, as on an older GPU.
        dispatch=DispatchConfig(level=level, steps=2, row_dtype="fp8"),
        shared_intermediate_size=16,
        kernel="torch",
    )
    x = torch.randn(4, 70, 32)

    def run(rank: int) -> int:
        rank_of.rank = rank
        layer = MoE(config, dist.group.WORLD, ranks_per_node=2).to(DEVICE)
        layer._mlp = Unwatched(load_backend("torch", config.activation))
        tape = RoutingTape()
        x_TH = x[rank].to(DEVICE).requires_grad_()
        with NoHostSync():
            if checkpointed:
                out, _ = checkpoint(layer, x_TH, use_reentrant=False, context_fn=tape.contexts)
            else:
                out, _ = layer(x_TH)
            forward = waits.count(rank)
            out.sum().backward()
        assert waits.count(rank) == forward
        return forward

    assert run_ranks(run, 4) == [forward_waits] * 4
