"""Which measured tile configuration a launch gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_moe_mlp
import torch
from tile_tables import SHAPE, SMALL, layer_of

from distmoe.kernels.moe_mlp import Runs, load_backend, triton_backend
from distmoe.kernels.moe_mlp.tile_table import DEFAULTS, TileTable, bucket_of
from distmoe.kernels.moe_mlp.tiles import ExpertShape, TileConfig, config_for, override


def tile(m: int) -> TileConfig:
    return replace(SMALL, m=m)


@pytest.mark.parametrize(
    ("pairs", "bucket"),
    [(0, 1), (1, 1), (2, 2), (3, 4), (5, 4), (6, 8), (95, 64), (96, 128), (196_608, 262_144)],
)
def test_bucket_is_the_nearest_power_of_two(pairs: int, bucket: int) -> None:
    assert bucket_of(pairs) == bucket


def test_the_nearest_bucket_of_the_same_shape_is_taken() -> None:
    other = SHAPE._replace(dtype=torch.bfloat16)
    layers = [
        layer_of({"up": tile(16)}, pairs=64),
        layer_of({"up": tile(32)}, pairs=1100),
        layer_of({"up": tile(64)}, pairs=256, shape=other),
    ]
    table = TileTable("cpu", layers)
    # 256 is as far from 64 as from 1024.
    picked = {pairs: table.pick("up", SHAPE, pairs) for pairs in (1, 90, 256, 500, 10**6)}
    assert picked == {1: tile(16), 90: tile(16), 256: tile(16), 500: tile(32), 10**6: tile(32)}
    assert table.pick("up", other, 1) == tile(64)
    assert table.pick("down", SHAPE, 64) is None
    for size in ({"H": 48}, {"I": 32}, {"e": 4}, {"gated": False}):
        assert table.pick("up", SHAPE._replace(**size), 64) is None


def test_empty_table_is_the_defaults() -> None:
    assert DEFAULTS.pick("up", SHAPE, 64) is None
    assert DEFAULTS.describe("3.6.0") == "defaults"


def test_table_says_what_it_is_and_that_it_is_old() -> None:
    table = TileTable("NVIDIA H200", [layer_of({"up": SMALL, "down": SMALL}, pairs=64)])
    for shape in (None, SHAPE):
        assert table.describe("3.6.0", shape) == "tuned for NVIDIA H200 (2 entries)"
    assert table.describe("3.6.0", SHAPE._replace(e=4)) == (
        "defaults: tuned for NVIDIA H200 (2 entries), but not for H32 I16 e4 gated float16"
    )
    assert table.describe("3.9.0") == (
        "tuned for NVIDIA H200 (2 entries); measured with triton 3.6.0, and this is 3.9.0"
    )


def test_digest_is_of_what_launches_take() -> None:
    def digest(m: int, pairs: int) -> str:
        return TileTable("cpu", [layer_of({"up": tile(m)}, pairs=pairs)]).digest()

    assert digest(16, 64) == digest(16, 65)
    assert len({digest(16, 64), digest(32, 64), digest(16, 128)}) == 3


@pytest.mark.parametrize("has_tma", [True, False])
def test_tuned_comes_before_the_default_and_after_an_override(has_tma: bool) -> None:
    tuned = TileConfig(32, 64, 32, num_warps=4, num_stages=2)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "columns": 40, "has_tma": has_tma}
    # Fitted to the columns, as every configuration.
    assert config_for("up", **options, tuned=tuned) == replace(tuned, tma=has_tma)
    assert config_for("up", **options | {"columns": 20}, tuned=tuned).n == 32
    with test_moe_mlp.tiling(SMALL):
        assert config_for("up", **options, tuned=tuned) == replace(SMALL, tma=has_tma)


class Recorded:
    """A kernel that notes the tiles with which it is launched, by its place in the grid."""

    def __init__(self, kernel: Any, notes: list[tuple[str, ...]]) -> None:
        self.kernel, self.notes = kernel, notes

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            names = ("BM", "BN", "BH", "BW", "BK", "num_warps")
            self.notes.append(tuple(f"{n}{options[n]}" for n in names if n in options))
            self.kernel[grid](*args, **options)

        return launch


def test_kernels_are_launched_with_what_the_table_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A different configuration for each kernel, and results as right as ever."""
    tiles = {
        "up": TileConfig(32, 16, 16, 4, 2),
        "down": TileConfig(16, 32, 16, 4, 2),
        "dgrad": TileConfig(32, 16, 32, 4, 2),
        "dx": TileConfig(64, 16, 16, 4, 2),
        "wgrad_out": TileConfig(32, 16, 16, 4, 3),
        "wgrad_in": TileConfig(16, 32, 32, 4, 3),
    }
    problem = test_moe_mlp.make_problem("ragged").to(torch.float16)
    index = test_moe_mlp.index_of(problem, [5, 0, 17, 3])
    shape = ExpertShape(H=24, I=16, e=4, gated=True, dtype=torch.float16)
    mlp = load_backend("triton", tiles=TileTable("cpu", [layer_of(tiles, pairs=25, shape=shape)]))
    notes: list[tuple[str, ...]] = []
    for name in ("up_kernel", "rows_kernel", "dgrad_kernel", "wgrad_kernel"):
        monkeypatch.setattr(triton_backend, name, Recorded(getattr(triton_backend, name), notes))
    test_moe_mlp.check(mlp, problem, index, [Runs.of_all(index)])
    assert [" ".join(note) for note in notes] == [
        "BM32 BN16 BK16 num_warps4",
        "BM16 BN32 BK16 num_warps4",
        "BM32 BN16 BK32 num_warps4",
        "BM64 BN16 BK16 num_warps4",
        "BH32 BW16 BK16 num_warps4",
        "BH32 BW16 BK32 num_warps4",
    ]


def test_an_override_counts_though_the_table_was_asked_before() -> None:
    mlp = load_backend("triton", tiles=TileTable("cpu", [layer_of({"up": tile(32)}, pairs=64)]))
    assert isinstance(mlp, triton_backend.TritonMoeMlp)
    asked = ("up", SHAPE, 64, torch.device("cpu"))
    for _ in range(2):
        assert mlp._config(*asked) == tile(32)
        with override("up", tile(64)):
            assert mlp._config(*asked) == tile(64)
