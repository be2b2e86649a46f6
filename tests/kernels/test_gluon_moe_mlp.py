"""The warp-specialised kernels with small tiles, and with other moments of loads and partitions.

Tiles so small that a program walks many of them through a ring of few stages. Without a GPU the
Gluon interpreter runs them, which looks for races, wrong phases and deadlocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
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
from torch import Tensor

from distmoe.kernels.aot import TARGETS
from distmoe.kernels.moe_mlp import Runs, gluon_backend
from distmoe.kernels.moe_mlp.gluon_backend import multiprocessors
from distmoe.kernels.moe_mlp.gluon_tiles import (
    CANDIDATES,
    CONSUMER_REGISTERS,
    CONSUMER_WARPS,
    FIRST_REGISTERS,
    PRODUCER_REGISTERS,
    PRODUCER_WARPS,
    UNGATED_CONFIGS,
    config_for,
    override,
    shared_bytes,
)
from distmoe.kernels.moe_mlp.gluon_tiles import check as check_tile
from distmoe.kernels.moe_mlp.tiles import ExpertShape, TileConfig

WIDE = ExpertShape(H=4096, I=1024, e=8, gated=True, dtype=torch.bfloat16)
TILINGS = {
    "two groups": TileConfig(64, 16, 32, num_warps=4, num_stages=3),
    "one group": TileConfig(128, 32, 16, num_warps=8, num_stages=2, chunks=2),
    "two chunks": TileConfig(64, 64, 32, num_warps=4, num_stages=2, chunks=2),
}


@contextmanager
def tiling(config: TileConfig) -> Iterator[None]:
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


@pytest.mark.parametrize("landing", ["late", "random"])
@pytest.mark.parametrize("tiles", TILINGS)
def test_many_tiles_through_few_stages(tiles: str, landing: str) -> None:
    mlp = backend_or_skip("gluon")
    problem = make_problem("many_tiles").to(torch.bfloat16)
    index = index_of(problem, CASES["many_tiles"][0])
    with tiling(TILINGS[tiles]), moments(landing):
        check(mlp, problem, index, [Runs.of_all(index)])


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
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
    for landing in ("at once", "random"):
        with tiling(TILINGS["two groups"]), moments(landing):
            results.append(through_pieces(mlp, problem, index, [Runs.of_all(index)]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_registers_change_hands_without_loss() -> None:
    warps = CONSUMER_WARPS + PRODUCER_WARPS
    shared = CONSUMER_WARPS * CONSUMER_REGISTERS + PRODUCER_WARPS * PRODUCER_REGISTERS
    assert shared == warps * FIRST_REGISTERS
    # Given out by eights, of 64 Ki for 32 threads a warp.
    assert FIRST_REGISTERS == 65536 // 32 // warps // 8 * 8


def test_configurations() -> None:
    for kernel, candidates in CANDIDATES.items():
        for config in (*candidates, *TILINGS.values(), UNGATED_CONFIGS.get(kernel, candidates[0])):
            assert not check_tile(kernel, config)
        assert config_for(kernel, WIDE) == candidates[0]
        assert config_for(kernel, WIDE._replace(H=8, I=8)).n == 16
        assert config_for(kernel, WIDE, TILINGS["two groups"]) == TILINGS["two groups"]
        with override(kernel, TILINGS["one group"]):
            assert config_for(kernel, WIDE, TILINGS["two groups"]) == TILINGS["one group"]
        for config in candidates:
            assert shared_bytes(kernel, config, WIDE) <= TARGETS["sm_90"].shared_limit
    for kernel, config in UNGATED_CONFIGS.items():
        assert config_for(kernel, WIDE._replace(gated=False)) == config
    # (128 rows of x, 256 of gate and up) x 64, 2 bytes, 4 stages; 128 rows of half of 128 columns.
    assert shared_bytes("up", CANDIDATES["up"][0], WIDE) == 384 * 64 * 2 * 4 + 128 * 64 * 2
    # Chunks wider than any candidate's, as triton 3.6 and 3.9 compiled them, but for the barriers.
    assert shared_bytes("down", TileConfig(128, 256, 64, 8, 2), WIDE) == 131_124 - 52
    assert shared_bytes("dx", TileConfig(64, 256, 64, 4, 2, chunks=2), WIDE) == 98_360 - 56
    assert shared_bytes("down", TileConfig(128, 128, 32, 8, 2), WIDE) == 65_588 - 52
    with (
        pytest.raises(ValueError, match="unknown kernel 'x'; known: up, down"),
        override("x", TILINGS["one group"]),
    ):
        pass


REFUSAL = r"the moe_mlp backend 'gluon' needs a GPU of compute capability 9\.0 .*, not "


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=REFUSAL + "cpu"):
        multiprocessors(torch.device("cpu"))


@pytest.mark.parametrize(("major", "minor"), [(9, 0), (8, 9), (10, 0)])
def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this GPU")
    multiprocessors.cache_clear()
    device = torch.device("cuda", 0)
    if major == 9:
        assert multiprocessors(device) == 132
    else:
        with pytest.raises(ValueError, match=REFUSAL + "this GPU"):
            multiprocessors(device)
    multiprocessors.cache_clear()


def test_some_multiprocessors_are_left_to_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_backend, "multiprocessors", lambda device: 132)

    def grids(rank: int = 0) -> list[tuple[int]]:
        return [gluon_backend._grid(torch.empty(0), items) for items in (5, 10**6)]

    assert run_ranks(grids, 2) == [[(5,), (116,)]] * 2
    assert grids() == run_ranks(grids, 1)[0] == [(5,), (132,)]


def shifted_by_one(v: Tensor) -> Tensor:
    """``v`` as a view that begins 2 bytes behind a multiple of 16."""
    flat = torch.zeros(1 + v.numel(), dtype=v.dtype, device=v.device)
    flat[1:] = v.flatten()
    return flat[1:].view_as(v)


@pytest.mark.parametrize("moved", ["x_RH", "dy_RH"])
def test_rows_that_begin_anywhere_are_gathered_by_pointers(
    moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = backend_or_skip("gluon")
    assert isinstance(mlp, gluon_backend.GluonMoeMlp)
    problem = make_problem("ragged").to(torch.bfloat16)
    index = index_of(problem, CASES["ragged"][0])
    rows = {"x_RH": problem.x_RH, "dy_RH": problem.dy_RH}
    rows[moved] = shifted_by_one(rows[moved])
    (e, H, I), L = problem.w_out_eHI.shape, len(index.row_L)
    by_triton = problem.x_RH.new_empty(e, 2 * I, H), problem.x_RH.new_empty(e, H, I)
    monkeypatch.setattr(mlp.triton, "wgrad", lambda *operands, index: by_triton)
    dz_LG, a_LI = problem.x_RH.new_zeros(L, 2 * I), problem.x_RH.new_zeros(L, I)
    assert mlp.wgrad(**rows, dz_LG=dz_LG, a_LI=a_LI, index=index) is by_triton


def test_weights_may_begin_anywhere() -> None:
    mlp = backend_or_skip("gluon")
    problem = make_problem("ragged").to(torch.bfloat16)
    shifted = replace(problem, w_in_eGH=shifted_by_one(problem.w_in_eGH))
    index = index_of(shifted, CASES["ragged"][0])
    check(mlp, shifted, index, [Runs.of_all(index)])
