"""Which backend is picked by itself."""

from __future__ import annotations

import pytest
import torch

from distmoe.kernels import backends
from distmoe.kernels.moe_mlp import backend_for


def test_matrix_products_on_a_cpu() -> None:
    assert backend_for("auto", torch.device("cpu")) == "torch"


@pytest.mark.parametrize(
    ("capability", "triton", "name"),
    [
        ((9, 0), True, "triton"),
        ((8, 0), True, "triton"),
        ((7, 5), True, "torch"),
        ((9, 0), 0, "torch"),
    ],
)
def test_fused_kernels_on_a_gpu_that_they_run_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], triton: bool, name: str
) -> None:
    backends._supported.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(backends, "find_spec", lambda module: object() if triton else None)
    assert backend_for("auto", torch.device("cuda", 0)) == name
    backends._supported.cache_clear()


@pytest.mark.parametrize(
    ("capability", "hip", "name"),
    [
        ((9, 0), None, "triton"),
        ((8, 9), None, "triton"),
        ((8, 0), None, "torch"),
        ((9, 4), "6.4", "torch"),
    ],
)
def test_e4m3_is_triton_s_where_it_has_conversions(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, name: str
) -> None:
    monkeypatch.setattr(backends, "fused_kernels_run_on", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert backends.e4m3_or_torch(torch.device("cuda", 0)) == name


def test_a_name_is_taken_as_it_is() -> None:
    assert backend_for("reference", torch.device("cuda")) == "reference"
