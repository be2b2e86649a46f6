"""Which configuration is chosen, and that the file holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tile_tables import ORIGIN, SHAPE, SMALL, layer_of

from distmoe.config import Config, MoEConfig, ParallelConfig, RunConfig, TrainConfig
from distmoe.kernels.moe_mlp import tiles as moe_tiles
from distmoe.kernels.moe_mlp import triton_backend
from distmoe.kernels.moe_mlp.tile_file import read_tiles
from distmoe.kernels.moe_mlp.tile_table import TunedTile
from distmoe.kernels.moe_mlp.tiles import TileConfig, TileSpace, override
from distmoe.planner.kernel_bench import measure, session
from distmoe.planner.kernel_bench.clock import Samples
from distmoe.planner.kernel_bench.config_shapes import shapes_of_run
from distmoe.planner.kernel_bench.pieces import Trial
from distmoe.planner.kernel_bench.record import record_of
from distmoe.planner.kernel_bench.session import Request, run
from distmoe.planner.kernel_bench.shapes import Shape
from distmoe.planner.kernel_bench.tuning import choose, tuned_layers, why_untunable, write_tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILES = [replace(SMALL, m=m) for m in (16, 32, 64)]


def trial(place: int, *ms: float, why_not: str | None = None) -> Trial:
    """Of kernel up: its ``place`` among the candidates, and what it took."""
    return Trial("triton", "up", TILES[place], Samples(list(ms)) if ms else None, why_not=why_not)


@pytest.mark.parametrize(
    ("trials", "place"),
    [
        # Faster by more than the spread: the fastest.
        ([trial(0, 10, 10, 10.4), trial(1, 9, 9, 9), trial(2, 8, 8, 8)], 2),
        # Faster, but by no more than the default itself varies, or than the other does.
        ([trial(0, 9, 10, 11), trial(1, 9, 9, 9)], 0),
        ([trial(0, 10, 10, 10), trial(1, 8, 9.2, 10)], 0),
        # The fastest varies too much, the second does not.
        ([trial(0, 10, 10, 10), trial(1, 9, 9, 9), trial(2, 7, 8.5, 11)], 1),
        ([trial(0, 10, 10, 10), trial(1, 11, 11, 11)], 0),
        # Wrong results have no time.
        ([trial(0, 10, 10, 10), trial(1, why_not="wrong: y"), trial(2, 9, 9, 9)], 2),
    ],
)
def test_noise_does_not_choose(trials: list[Trial], place: int) -> None:
    chosen = choose(trials)["up"]
    assert chosen.config == TILES[place]
    assert chosen.default_ms == 10
    assert chosen.ms == trials[place].ms


def test_a_kernel_whose_default_is_wrong_is_left_out() -> None:
    assert choose([trial(0, why_not="wrong: y"), trial(1, 9, 9)]) == {}


def test_spread_is_the_larger_interquartile_range() -> None:
    chosen = choose([trial(0, 10, 11, 12), trial(1, 5, 5, 5)])["up"]
    assert (chosen.ms, chosen.default_ms, chosen.spread_ms) == (5, 11, 1)


def test_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "tiles.toml"
    pointers = TileConfig(32, 64, 32, num_warps=8, num_stages=5, chunks=2, tma=False)
    small = layer_of({"up": SMALL, "dgrad": pointers}, pairs=64)
    plain = layer_of({"up": SMALL}, pairs=64, shape=SHAPE._replace(gated=False))
    assert write_tiles(path, "cpu", [small, plain]) == read_tiles(path)
    assert read_tiles(path).layers == (plain, small)
    # The same bucket again, and another one: the order of the file is not that of the runs.
    again = layer_of({"up": pointers}, pairs=65)
    large = layer_of({"up": SMALL}, pairs=4096)
    write_tiles(path, "cpu", [large])
    found = write_tiles(path, "cpu", [again]).layers
    assert found == read_tiles(path).layers == (plain, again, large)
    with pytest.raises(ValueError, match="is of 'cpu'; it must be of this device, 'NVIDIA H200'"):
        write_tiles(path, "NVIDIA H200", [small])


class Heights:
    """A clock for which kernels with tiles of 16 rows take longer, whatever they do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[int] = []
        monkeypatch.setattr(triton_backend, "config_for", self.config_for)

    def config_for(self, *args: Any, **options: Any) -> TileConfig:
        config = moe_tiles.config_for(*args, **options)
        self.seen.append(config.m)
        return config

    def __call__(self, work: Callable[[], object]) -> float:
        self.seen.clear()
        work()
        return 1.0 + self.seen.count(16)


def test_a_run_of_the_bench_fills_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in moe_tiles.CANDIDATES:
        monkeypatch.setitem(moe_tiles.CANDIDATES, kernel, [SMALL])
    space = TileSpace({"up": TILES[:2]}, moe_tiles.shared_bytes)
    monkeypatch.setattr(moe_tiles, "SPACE", space)
    monkeypatch.setattr(measure, "WARM_UPS", 1)
    clock = Heights(monkeypatch)
    monkeypatch.setattr(session, "make_clock", lambda device: clock)
    shape = Shape("small", T=4, H=16, I=16, E=2, K=1, tile=4)
    request = Request(
        [shape], ["none"], ["triton"], ["forward"], 1, DEVICE, torch.float16, tune=True
    )
    (result,) = run(request, lambda line: None)
    path = tmp_path / "tiles.toml"
    write_tiles(path, "cpu", tuned_layers(result, torch.float16, ORIGIN))
    (layer,) = read_tiles(path).layers
    assert (layer.shape, layer.pairs, layer.origin) == (SHAPE._replace(H=16), 4, ORIGIN)
    assert layer.tiles == {"up": TunedTile(TILES[1], ms=1, default_ms=2, spread_ms=0)}
    assert "triton" in record_of(result, "cpu")["tiles"]


def test_overrides_are_of_one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second backend with tiles, whose kernels are called alike."""
    other = TileSpace({"up": TILES}, moe_tiles.shared_bytes)
    monkeypatch.setattr(moe_tiles, "OTHER", other, raising=False)
    table = moe_tiles.MOE_MLP_TILES._table
    monkeypatch.setitem(table, "other", "distmoe.kernels.moe_mlp.tiles:OTHER")
    with override("up", SMALL, backend="other"):
        assert moe_tiles.overridden("other", "up") == SMALL
        assert moe_tiles.overridden("triton", "up") is None


def config(ep: int, activation: str = "swiglu") -> Config:
    """A rank's 2 sequences of 256 tokens, each with 4 of 16 experts."""
    return Config(
        run=RunConfig(name="it"),
        moe=MoEConfig(hidden_size=64, intermediate_size=32, activation=activation),  # type: ignore[arg-type]
        parallel=ParallelConfig(ep=ep),
        train=TrainConfig(micro_batch_size=2),
    )


def test_shapes_of_a_run_are_those_of_a_rank() -> None:
    assert shapes_of_run(config(1)) == [Shape("it", T=512, H=64, I=32, E=16, K=4)]
    # A row that comes to one of 4 ranks has 4 / (4 (1 - C(12,4) / C(16,4))) = 1.37 pairs.
    assert shapes_of_run(config(4)) == [
        Shape("it", T=2048, H=64, I=32, E=4, K=1),
        Shape("it-step", T=512, H=64, I=32, E=4, K=1),
    ]
    # 4 / (2 (1 - C(8,4) / C(16,4))) = 2.08.
    assert shapes_of_run(config(2))[0] == Shape("it", T=1024, H=64, I=32, E=8, K=2)
    with pytest.raises(ValueError, match=r"moe.activation is gelu; the bench has experts with"):
        shapes_of_run(config(1, "gelu"))


def test_what_has_no_candidates_is_not_tuned() -> None:
    shape = Shape("it", T=16, H=32, I=12, E=2, K=1)
    assert "12 E=2" in str(why_untunable([shape], torch.float16, DEVICE))
    assert why_untunable([replace(shape, I=16)], torch.float16, DEVICE) is None
    assert "has one configuration" in str(why_untunable([], torch.float32, DEVICE))
