"""Targets of `balance`: the fused kernel finds those of the reference."""

from __future__ import annotations

import pytest
import torch

from distmoe.kernels.balance_targets import balance_targets, fits
from distmoe.registry import BALANCE_TARGETS_BACKENDS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Experts, runs, tile, most pairs of an expert.
CASES = [
    (64, 8, 16, 100),
    (20, 5, 7, 30),
    (12, 1, 8, 40),
    (9, 9, 4, 20),
    (1, 1, 128, 500),
    (30, 3, 1, 50),
    (4096, 64, 128, 4000),
]


def counts(case: tuple[int, int, int, int], seed: int) -> torch.Tensor:
    """Ragged, with experts of equal remainders, of none, and without pairs."""
    experts, _, tile, most = case
    g = torch.Generator().manual_seed(seed)
    freq_E = torch.randint(most + 1, (experts,), generator=g)
    if seed % 3 == 1:
        # One run has far more than the others.
        freq_E[: experts // 2] += 5 * most
    if seed % 3 == 2:
        freq_E = freq_E // tile * tile + (torch.rand(experts, generator=g) < 0.6) * (tile // 2)
    return freq_E.to(DEVICE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_targets(case: tuple[int, int, int, int]) -> None:
    experts, groups, tile, most = case
    for seed in range(3):
        freq_E = counts(case, seed)
        g = torch.Generator().manual_seed(seed)
        room_E = torch.randint(7 * most, (experts,), generator=g).to(DEVICE)
        for room in (room_E, freq_E.max()[None], 10 * most):
            want_E, got_E = (
                balance_targets(freq_E, room, tile=tile, groups=groups, backend=backend)
                for backend in ("torch", "triton")
            )
            assert got_E.dtype == torch.int64
            assert got_E.tolist() == want_E.tolist()


def test_more_than_a_program_keeps_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    load = type(BALANCE_TARGETS_BACKENDS).load

    def noted(registry: object, name: str) -> object:
        asked.append(name)
        return load(BALANCE_TARGETS_BACKENDS, "torch")

    monkeypatch.setattr(type(BALANCE_TARGETS_BACKENDS), "load", noted)
    monkeypatch.setattr("distmoe.kernels.balance_targets.fused_or_torch", lambda _: "triton")
    for experts, tile in ((4096, 128), (4098, 128), (64, 1 << 24)):
        freq_E = torch.arange(experts, device=DEVICE)
        balance_targets(freq_E, 10 * experts, tile=tile, groups=2)
        assert (asked[-1] == "triton") == fits(experts, tile)
    assert asked == ["triton", "torch", "torch"]
