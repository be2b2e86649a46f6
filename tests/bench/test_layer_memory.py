"""The formula of what a layer keeps and holds, against a real layer with the fused kernels."""

from __future__ import annotations

import pytest
import torch

from distmoe import MoEConfig
from distmoe.bench.layer_memory import Measured, shape_and_measured
from distmoe.config import RoundingConfig
from distmoe.planner.activation_memory import ActivationShape, keeps, transient

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T, H, I, E, K, TILE = 512, 192, 32, 4, 2, 32


def measured(
    rule: str, activation: str = "swiglu", num_tokens: int = T
) -> tuple[ActivationShape, Measured]:
    config = MoEConfig(
        hidden_size=H,
        intermediate_size=I,
        num_experts=E,
        top_k=K,
        activation=activation,
        rounding=RoundingConfig(rule, tile=TILE),
    )
    return shape_and_measured(config, num_tokens=num_tokens, device=DEVICE)


def test_formula() -> None:
    shape, result = measured("balance")
    for name, want in transient(shape).items():
        assert getattr(result, name) == pytest.approx(want, rel=0.05)
    kept = sum(keeps(shape).values()) - keeps(shape)["x"]
    assert result.kept == pytest.approx(kept, rel=0.02)
    # Autograd is given x and z, and nothing else of their size.
    x, z = ("float16", (T, H)), ("float16", (shape.pairs, 2 * I))
    assert result.saved[x] == keeps(shape)["x"]
    assert result.saved[z] == keeps(shape)["z"]
    others = {kind: size for kind, size in result.saved.items() if kind not in (x, z)}
    assert max(others.values()) < keeps(shape)["x"] / 3


def test_an_activation_without_a_gate_keeps_half_of_z() -> None:
    shape, result = measured("none", "relu2", num_tokens=64)
    assert result.saved["float16", (shape.pairs, I)] == keeps(shape)["z"]
