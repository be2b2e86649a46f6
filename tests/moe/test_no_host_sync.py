"""With one rank, neither forward nor backward of the layer makes the host wait for the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distmoe import MoE, MoEConfig
from distmoe.config import RoundingConfig
from distmoe.kernels.testing import NoHostSync
from distmoe.registry import ROUNDING_RULES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = MoEConfig(hidden_size=32, intermediate_size=16, num_experts=8, top_k=2, kernel="triton")


@pytest.fixture(autouse=True)
def _fused_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of a GPU, in the interpreter where there is none."""
    for op in ("router_logits", "router_topk", "round_select", "routing_index"):
        monkeypatch.setattr(f"distmoe.kernels.{op}.fused_or_torch", lambda device: "triton")


def step(layer: MoE, x: torch.Tensor) -> None:
    out, losses = layer(x)
    (out.square().sum() + losses.load_balance + losses.z).backward()


@pytest.mark.parametrize("rule", list(ROUNDING_RULES))
def test_layer(rule: str) -> None:
    layer = MoE(replace(CONFIG, rounding=RoundingConfig(rule, tile=16))).to(DEVICE).bfloat16()
    x = torch.randn(70, 32, device=DEVICE).bfloat16()
    step(layer, x)
    with NoHostSync():
        step(layer, x)
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(layer, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_sync_is_seen() -> None:
    x = torch.arange(4)
    for wait in (lambda: int(x[0]), lambda: x.nonzero(), lambda: x[x > 1], lambda: x.bincount()):
        with pytest.raises(AssertionError, match="makes the host wait"), NoHostSync():
            wait()


def test_a_backend_that_loops_on_the_host_is_seen() -> None:
    layer = MoE(replace(CONFIG, kernel="torch")).to(DEVICE)
    layer.config = replace(layer.config, rounding=RoundingConfig("none"))
    x = torch.randn(70, 32, device=DEVICE)
    with pytest.raises(AssertionError, match="makes the host wait"), NoHostSync():
        step(layer, x)
