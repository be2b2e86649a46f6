"""Single kernels and tile configurations of a backend, timed alone."""

from types import SimpleNamespace

import pytest
import torch

from distmoe.bench.kernels import pieces
from distmoe.bench.kernels.check import Expected, expect
from distmoe.bench.kernels.clock import Samples, cpu_clock
from distmoe.bench.kernels.pieces import (
    KERNELS_OF,
    Trial,
    check_trials,
    time_pieces,
    time_trials,
)
from distmoe.bench.kernels.record import _piece
from distmoe.bench.kernels.shapes import Shape
from distmoe.bench.kernels.subjects import ContractSubject, Workspace
from distmoe.kernels.moe_mlp import load_backend
from distmoe.kernels.moe_mlp import tiles as moe_tiles
from distmoe.kernels.moe_mlp.tiles import TileConfig, TileSpace, override
from distmoe.planner.roofline import BACKWARD, FORWARD, LayerSize
from distmoe.registry import MOE_MLP_TILES

SHAPE = Shape("small", T=16, H=32, I=16, E=2, K=1, tile=8)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def expected() -> Expected:
    return expect(SHAPE, "none", DEVICE, torch.float16)


def subject_of(backend: str, expected: Expected) -> ContractSubject:
    problem = expected.problem
    return ContractSubject(load_backend(backend), problem, Workspace.of(problem))


def test_pieces_cover_every_kernel_once(expected: Expected) -> None:
    """With halves of forward and dgrad (triton) and without (torch)."""
    for backend in ("triton", "torch"):
        times = time_pieces(subject_of(backend, expected), rounds=2, clock=cpu_clock())
        kernels = [kernel for piece in times for kernel in KERNELS_OF[piece]]
        assert sorted(kernels) == sorted([*FORWARD, *BACKWARD])
        assert ("up" in times) == (backend == "triton")


def test_tile_configurations_are_checked_then_timed(
    expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, no_power_of_two = TileConfig(16, 16, 16, 4, 2), TileConfig(48, 16, 16, 4, 2)
    candidates = {"down": [good, no_power_of_two], "wgrad_in": [good]}
    monkeypatch.setattr(moe_tiles, "SPACE", TileSpace(candidates, moe_tiles.shared_bytes, override))
    subject = subject_of("triton", expected)
    trials = check_trials("triton", subject, expected)
    time_trials(trials, subject, rounds=2, clock=cpu_clock())
    assert [(trial.kernel, trial.samples is None) for trial in trials] == [
        ("down", False),
        ("down", True),
        ("wgrad_in", False),
    ]
    assert trials[1].why_not is not None
    assert trials[1].ms == float("inf")
    assert trials[0].ms < trials[0].samples.median  # type: ignore[union-attr]


def test_time_of_a_trial_is_without_the_other_kernels() -> None:
    trial = Trial("triton", "down", TileConfig(16, 16, 16, 4, 2), Samples([3.0]), others_ms=1.0)
    assert trial.ms == 2.0


def test_a_difference_without_time_has_no_rate() -> None:
    result = SimpleNamespace(size=LayerSize(16, 16, 2, 32, 16))
    figures = _piece(result, "down", 0.0, {})  # type: ignore[arg-type]
    assert figures == {"ms": 0.0, "tflops": None, "gb_per_s": None, "of_floor": None}


@pytest.mark.parametrize("backend", list(MOE_MLP_TILES))
def test_every_kernel_with_configurations_can_be_timed(backend: str) -> None:
    assert set(pieces._TIMED_IN) == set(MOE_MLP_TILES.load(backend).candidates)
