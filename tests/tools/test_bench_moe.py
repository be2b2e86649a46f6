"""The kernel bench as its users run it: a process, its JSON, its exit code."""

import json
import subprocess
from pathlib import Path
from typing import Any

import bench_moe
import pytest
import torch
import triton
from tile_tables import table_file
from warm_python import run_python
from wrong_arguments import refusal

from distmoe.kernels.moe_mlp.torch_backend import TorchMoeMlp

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools/bench_moe.py")
TUNE = ["--tune", "--backends", "triton", "--write-tiles", "x.toml"]
WRONG = {
    "shape": (["--shapes", "9B"], "unknown shape '9B'; known: 1.4B, 7B"),
    "backend": (["--backends", "torch,x"], "--backends: unknown 'x'; known: bound, grouped_mm"),
    "mode": (["--mode", "sideways"], "--mode: unknown 'sideways'; known: forward, backward, both"),
    "rule": (["--rounding", "x"], "--rounding: unknown 'x'; known: none, nearest, balance"),
    "rounds": (["--rounds", "0"], "--rounds: '0' must be an integer, at least 1"),
    "dtype": (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    "folder": (["--json", "no/such/folder/file"], "there is no folder"),
    "tune": (["--tune", "--backends", "torch"], "--tune needs triton or gluon among --backends"),
    "tiles": (
        ["--tiles", "no.toml", "--backends", "triton"],
        "'no.toml' cannot be read: [Errno 2]",
    ),
    "tiles without tuning": (["--write-tiles", "x.toml"], "--write-tiles needs --tune"),
    "tiles of fp32": (
        [*TUNE, "--dtype", "float32"],
        "--write-tiles: torch.float32 has one configuration; tuned are bfloat16, float16",
    ),
    "tiles of two rules": (
        [*TUNE, "--rounding", "none,balance"],
        "--write-tiles takes one rule of --rounding",
    ),
    "config": (["--config", "no.toml"], "there is no config file 'no.toml'"),
    "config of other ranks": (
        ["--config", str(ROOT / "configs/eight_gpu.toml"), "--world", "4"],
        "parallel.ep is 8; it must divide parallel.dp_shard (4; the number of ranks is 4)",
    ),
    "world of nothing": (["--world", "4"], "--world is of --config, which is missing"),
    "no world": (
        ["--config", str(ROOT / "configs/tiny.toml"), "--world", "0"],
        "--world: '0' must be an integer, at least 1",
    ),
    "option": (["--speed"], "unrecognized arguments: --speed"),
}


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    return run_python(TOOL, "--device", "cpu", *options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("bench")
    done = bench(
        *("--shapes", "tiny", "--rounds", "3", "--rounding", "none,balance", "--profile"),
        *("--backends", "bound,torch,reference,grouped_mm,scattermoe,sonicmoe-layer"),
        *("--json", str(folder / "bench.json"), "--picture", str(folder / "bench.png")),
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    return done.stdout, content, folder


@pytest.mark.processes
def test_figures_are_there(run: tuple[str, dict[str, Any], Path]) -> None:
    _, content, folder = run
    assert content["versions"]["torch"]
    assert "tools/bench_moe.py" in content["command"]
    assert [result["rounding"] for result in content["results"]] == ["none", "balance"]
    for result in content["results"]:
        assert result["checked_tokens"] == 64
        for name in ("bound", "torch", "reference", "grouped_mm"):
            backend = result["backends"][name]
            assert backend["why_not"] is None
            assert list(backend["modes"]) == ["forward", "backward", "both"]
            for figures in backend["modes"].values():
                check_figures(figures, is_bound=name == "bound")
    assert (folder / "bench.png").stat().st_size > 10_000


def check_figures(figures: dict[str, Any], *, is_bound: bool) -> None:
    assert len(figures["samples_ms"]) == 3
    assert figures["min_ms"] <= figures["q1_ms"] <= figures["median_ms"] <= figures["q3_ms"]
    assert figures["tflops"] > 0
    assert (figures["of_bound"] == 1) == is_bound
    # The speed of this CPU is not in the table.
    assert figures["of_floor"] is None


@pytest.mark.processes
def test_rates_count_model_flops(run: tuple[str, dict[str, Any], Path]) -> None:
    result = run[1]["results"][0]
    figures = result["backends"]["torch"]["modes"]["both"]
    flops = 18 * result["pairs"] * result["shape"]["H"] * result["shape"]["I"]
    assert figures["tflops"] == pytest.approx(flops / figures["median_ms"] / 1e9)


@pytest.mark.processes
def test_rounding_fills_the_tiles(run: tuple[str, dict[str, Any], Path]) -> None:
    top_k, balance = run[1]["results"]
    assert top_k["pairs"] == 128 < top_k["padded_pairs"]
    assert balance["pairs"] == balance["padded_pairs"]
    for result in (top_k, balance):
        router = result["router"]
        parts = [router[name]["median_ms"] for name in ("top_k", "rounding", "index", "backward")]
        assert router["total_ms"] == pytest.approx(sum(parts))


@pytest.mark.processes
def test_missing_peers_are_one_line_with_the_reason(
    run: tuple[str, dict[str, Any], Path],
) -> None:
    stdout, content, _ = run
    for name in ("scattermoe", "sonicmoe-layer"):
        assert content["results"][0]["backends"][name]["why_not"] == "runs on a GPU only"
        assert f"{name}: no time. runs on a GPU only\n" in stdout


@pytest.mark.processes
def test_pieces_and_profile_are_there(run: tuple[str, dict[str, Any], Path]) -> None:
    stdout, content, _ = run
    result = content["results"][0]
    pieces = result["pieces"]["torch"]
    assert list(pieces) == ["forward", "sum_y", "dgrad", "sum_dx", "wgrad"]
    assert all(figures["ms"] > 0 and figures["gb_per_s"] > 0 for figures in pieces.values())
    assert "aten::mm" in {kernel["name"] for kernel in result["profiles"]["torch"]}
    assert "pairs/s against top-k" in stdout


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_exit_with_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(bench_moe.main, ["--device", "cpu", *options], capsys)
    assert message in said.splitlines()[-1]


def test_cuda_is_refused_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no CUDA device" in refusal(bench_moe.main, ["--device", "cuda"], capsys)


def test_a_table_of_another_device_is_not_updated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = table_file(tmp_path / "tiles.toml", device="NVIDIA H100")
    said = refusal(bench_moe.main, ["--device", "cpu", *TUNE[:-1], str(table)], capsys)
    assert "is of 'NVIDIA H100'; it must be of this device, 'cpu'" in said


def test_layers_of_a_run_are_benched_and_nothing_tuned_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks, and a rank's share of a step; without the interpreter triton is missing."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    tuning = ["--tune", "--backends", "triton", "--write-tiles", str(tmp_path / "tiles.toml")]
    sizes = "[model]\nhidden_size = 32\n[data]\nseq_len = 16\n[launch]\nnproc = 2\n"
    experts = "[moe]\nintermediate_size = 16\nnum_experts = 4\ntop_k = 2\n"
    rounding = "[moe.rounding]\nrule = 'none'\n[parallel]\nep = 2\n"
    config = tmp_path / "run.toml"
    config.write_text(f"{sizes}{experts}{rounding}[train]\nglobal_batch_size = 4\n")
    options = ["--device", "cpu", "--config", str(config), "--rounds", "1", "--mode", "forward"]
    assert bench_moe.main([*options, *tuning]) == 1
    stdout = capsys.readouterr().out
    assert "distmoe  T=64 H=32 I=16 E=2 K=1, top-k: 64 pairs" in stdout
    assert "distmoe-step  T=32 H=32 I=16 E=2 K=1, top-k: 32 pairs" in stdout
    assert "tiles of triton: defaults" in stdout
    assert "distmoe-step (T=32 H=32 I=16 E=2 K=1): no tiles were measured" in stdout
    assert not (tmp_path / "tiles.toml").exists()


@pytest.mark.processes
def test_exit_code_of_the_process_is_that_of_main() -> None:
    assert bench("--rounds", "none").returncode == 2


def test_wrong_results_exit_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TorchMoeMlp, "row_sum", lambda *_, out_RH, **__: out_RH.zero_())
    options = ["--device", "cpu", "--backends", "torch", "--rounds", "1"]
    assert bench_moe.main(options) == 1
    stdout = capsys.readouterr().out
    assert "torch: no time. wrong: y: relative error" in stdout
    assert "forward" not in stdout
