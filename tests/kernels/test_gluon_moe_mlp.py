"""The warp-specialised kernels with small tiles, and with other moments of loads and partitions.

Tiles so small that a program walks many of them through a ring of few stages. Without a GPU the
Gluon interpreter runs them, which looks for races, wrong phases and deadlocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from test_moe_mlp import (
    CASES,
    DEVICE,
    backend_or_skip,
    check,
    index_of,
    make_problem,
    steps_of,
    through_pieces,
)

from distmoe.kernels.moe_mlp import Runs
from distmoe.kernels.moe_mlp.activations import ACTIVATIONS
from distmoe.kernels.moe_mlp.gluon_backend import multiprocessors
from distmoe.kernels.moe_mlp.gluon_tiles import CANDIDATES, SpecialisedConfig, config_for, override

TILINGS = {
    "two groups": SpecialisedConfig(64, 16, 16, stages=3, groups=2),
    "one group": SpecialisedConfig(128, 32, 16, stages=2, groups=1, chunks=2),
    "two chunks": SpecialisedConfig(64, 64, 32, stages=2, groups=2, chunks=2),
}


@contextmanager
def tiling(config: SpecialisedConfig) -> Iterator[None]:
    with ExitStack() as stack:
        for kernel in CANDIDATES:
            stack.enter_context(override(kernel, config))
        yield


@contextmanager
def moments(landing: str) -> Iterator[None]:
    """When loads land, and which partition goes on; a GPU decides by itself."""
    if DEVICE.type == "cuda":
        yield
        return
    from gluon_interpreter import timing

    with timing(landing, seed=1):
        yield


@pytest.mark.parametrize("landing", ["late", "at once", "random"])
@pytest.mark.parametrize("tiles", TILINGS)
def test_many_tiles_through_few_stages(tiles: str, landing: str) -> None:
    mlp = backend_or_skip("gluon")
    problem = make_problem("many_tiles").to(torch.bfloat16)
    index = index_of(problem, CASES["many_tiles"][0])
    with tiling(TILINGS[tiles]), moments(landing):
        check(mlp, problem, index, [Runs.of_all(index)])


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_ragged_steps_with_small_tiles(activation: str) -> None:
    mlp = backend_or_skip("gluon", activation)
    problem = make_problem("many_tiles", activation).to(torch.float16)
    index = index_of(problem, CASES["many_tiles"][0], tail=21)
    with tiling(TILINGS["two chunks"]):
        check(mlp, problem, index, steps_of(index, 16))


def test_no_moment_changes_a_bit() -> None:
    mlp = backend_or_skip("gluon")
    problem = make_problem("many_tiles").to(torch.bfloat16)
    index = index_of(problem, CASES["many_tiles"][0])
    results = []
    for landing in ("late", "at once", "random"):
        with tiling(TILINGS["two groups"]), moments(landing):
            results.append(through_pieces(mlp, problem, index, [Runs.of_all(index)]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_configurations() -> None:
    for kernel, candidates in CANDIDATES.items():
        for config in candidates:
            registers = 8 * config.consumer_registers + 4 * config.producer_registers
            assert 32 * registers <= 65536
            # A warpgroup multiplies 64 rows at a time.
            assert config.m % (16 * config.num_warps) == 0
        assert config_for(kernel, columns=1).n == 16
        with override(kernel, TILINGS["one group"]):
            assert config_for(kernel, columns=4096) == TILINGS["one group"]
        assert config_for(kernel, columns=4096) == candidates[0]
    assert str(TILINGS["one group"]) == "128x32x16 g1 s2 c2"
    with (
        pytest.raises(ValueError, match="unknown kernel 'x'; known: up, up_ungated, down"),
        override("x", TILINGS["one group"]),
    ):
        pass


def test_other_devices_are_refused() -> None:
    words = r"the moe_mlp backend 'gluon' needs a GPU of compute capability 9\.0 .*, not cpu"
    with pytest.raises(ValueError, match=words):
        multiprocessors(torch.device("cpu"))
