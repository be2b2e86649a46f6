"""Which configuration is chosen, and that the file holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tile_tables import ORIGIN, SHAPE, SMALL, layer_of, table_file
from torch import Tensor

from distmoe import registry
from distmoe.bench.kernels import session
from distmoe.bench.kernels.clock import Samples
from distmoe.bench.kernels.config_shapes import shapes_of_run
from distmoe.bench.kernels.pieces import Trial
from distmoe.bench.kernels.problem import make_problem
from distmoe.bench.kernels.record import record_of
from distmoe.bench.kernels.report import print_record
from distmoe.bench.kernels.session import Request, Session
from distmoe.bench.kernels.shapes import Shape
from distmoe.bench.kernels.subjects import ContractSubject, Workspace
from distmoe.bench.kernels.tuning import choose, tuned_layers, why_untunable, write_tiles
from distmoe.config import Config, MoEConfig, ParallelConfig, RunConfig, TrainConfig
from distmoe.kernels.moe_mlp import PairIndex, load_backend
from distmoe.kernels.moe_mlp.find_tiles import find_tiles
from distmoe.kernels.moe_mlp.tile_file import TileFileError, read_tiles
from distmoe.kernels.moe_mlp.tile_table import TileTable, TunedTile
from distmoe.kernels.moe_mlp.tiles import TileConfig, TileSpace, shared_bytes
from distmoe.kernels.moe_mlp.torch_backend import TorchMoeMlp
from distmoe.kernels.moe_mlp.triton_backend import TritonMoeMlp
from distmoe.planner.measure_device import measure_launch

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


LAUNCHED: list[int] = []
OVERRIDE: list[TileConfig] = []


@contextmanager
def override(kernel: str, config: TileConfig) -> Iterator[None]:
    """That of `Tiled`."""
    assert kernel == "wgrad_in"
    OVERRIDE.append(config)
    yield
    OVERRIDE.pop()


class Tiled(TorchMoeMlp):
    """Matrix products as a backend that has tiles, for one of its kernels."""

    def __init__(self, activation: str, tiles: TileTable) -> None:
        super().__init__(activation)
        self.tiles = tiles

    def wgrad(self, *tensors: Tensor, index: PairIndex) -> tuple[Tensor, Tensor]:
        config = [SMALL, *OVERRIDE][-1]
        LAUNCHED.append(config.m)
        dw_in_eGH, dw_out_eHI = super().wgrad(*tensors, index=index)
        return dw_in_eGH * (config.m != 64), dw_out_eHI


SPACE = TileSpace({"wgrad_in": TILES}, shared_bytes, override)


def slow_for_16_rows(work: Callable[[], object]) -> float:
    """A clock for which these take longer, whatever they do."""
    LAUNCHED.clear()
    work()
    return 1.0 + LAUNCHED.count(16)


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second backend with tiles: a line in each of two tables."""
    for name, kind in (("Tiled", "MOE_MLP_BACKENDS"), ("SPACE", "MOE_MLP_TILES")):
        monkeypatch.setitem(getattr(registry, kind)._table, "tiled", f"{__name__}:{name}")


@pytest.mark.usefixtures("tiled")
def test_a_run_of_the_bench_fills_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second candidate is faster than the default, the third is wrong."""
    monkeypatch.setattr(session, "make_clock", lambda device: slow_for_16_rows)
    shape = Shape("small", T=16, H=32, I=16, E=2, K=1, tile=8)
    request = Request(
        [shape], ["none"], ["tiled"], ["forward"], 2, DEVICE, torch.float16, tune=True
    )
    (result,) = Session(request, lambda line: None).results()
    assert "dw_in: relative error" in str(result.trials["tiled"][2].why_not)
    path = tmp_path / "tiles.toml"
    write_tiles(path, "cpu", tuned_layers(result, torch.float16, ORIGIN))
    (layer,) = read_tiles(path).layers
    assert (layer.backend, layer.shape, layer.pairs, layer.origin) == ("tiled", SHAPE, 16, ORIGIN)
    assert layer.tiles == {"wgrad_in": TunedTile(TILES[1], ms=1, default_ms=2, spread_ms=0)}
    print_record(record_of(result, "cpu"), Console(file=(said := StringIO()), width=200))
    assert "best wgrad_in: 32x16x16 w4 s2, 1.000 ms; the default 2.000" in said.getvalue()


@pytest.mark.usefixtures("tiled")
def test_a_backend_gets_the_entries_that_are_its_own(tmp_path: Path) -> None:
    layers = [layer_of({"up": SMALL}, pairs=64)]
    layers.append(replace(layer_of({"wgrad_in": TILES[1]}, pairs=64), backend="tiled"))
    path = tmp_path / "tiles.toml"
    write_tiles(path, "cpu", layers)
    table = find_tiles(str(path), "tiled", torch.device("cpu"))
    assert len(table) == 1
    assert table.pick("wgrad_in", SHAPE, 64) == TILES[1]
    backend = load_backend("tiled", tiles=table)
    assert isinstance(backend, Tiled)
    assert backend.tiles is table


def test_a_run_of_the_bench_takes_the_table_that_it_is_given(tmp_path: Path) -> None:
    table = str(table_file(tmp_path / "tiles.toml"))
    request = Request([], [], ["triton"], [], 1, torch.device("cpu"), torch.float16, tiles=table)
    (candidate,) = Session(request, lambda line: None).candidates
    problem = make_problem(Shape("it", 4, 8, 8, 2, 1), "none", request.device, request.dtype)
    subject = candidate.build(problem, Workspace.of(problem))
    assert isinstance(subject, ContractSubject)
    assert isinstance(subject.backend, TritonMoeMlp)
    assert len(subject.backend.tiles) == 1


def test_speeds_of_a_machine_are_of_the_run_s_tiles(tmp_path: Path) -> None:
    """Found by what is wrong with them."""
    moe = MoEConfig(kernel="triton", kernel_tiles=str(tmp_path / "nothing.toml"))
    with pytest.raises(TileFileError, match=r"nothing\.toml"):
        measure_launch(moe, device=torch.device("cpu"), dtype=torch.float32)


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
