"""`distmoe plan` as a user calls it, in this process."""

import io
import json
import shlex
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from distmoe.config import check, load_config
from distmoe.config.keys import value_of, with_values
from distmoe.launch import cli
from distmoe.planner.layouts import FREE
from distmoe.planner.machine_profile import PRESETS, save_profile

CONFIGS = Path(__file__).parents[2] / "configs"
FILE = str(CONFIGS / "models/olmoe_1b_7b.toml")
JOB = [FILE, "--gpus", "8", "--hardware", "h100", "--top", "3"]
SETTINGS = ["--optim.lr", "1e-4", "--parallel.ep", "4"]


def plan(*argv: str) -> int:
    return cli.main(["plan", *argv])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def printed(files: Path) -> str:
    """Of one job, with both files written."""
    written = ["--json", str(files / "plan.json"), "--write", str(files / "best.toml")]
    with redirect_stdout(io.StringIO()) as text:
        assert plan(*JOB, *SETTINGS, *written) == 0
    return text.getvalue()


def test_tables_are_narrow_and_ranked(printed: str, files: Path) -> None:
    lines = printed.splitlines()
    table = [line for line in lines if line.split()[:1] in (["1"], ["2"], ["3"], ["file"])]
    assert len(table) == 4
    assert all(len(line.rstrip()) <= 120 for line in table)
    rates = [float(line.split()[1].replace(",", "")) for line in table[:3]]
    assert rates == sorted(rates, reverse=True)
    best = json.loads((files / "plan.json").read_text())["best"][0]
    assert rates[0] == round(best["tokens_per_second_per_rank"])
    assert f"{best['mfu']:.1%}" in table[0]
    assert "Predictions, not measurements" in printed


def test_json_has_every_figure(printed: str, files: Path) -> None:
    figures = json.loads((files / "plan.json").read_text())
    assert figures["ranks"] == 8
    assert figures["hardware"] == "NVIDIA H100 80GB HBM3"
    best = figures["best"][0]
    assert sum(best["parts_seconds"].values()) == pytest.approx(best["step_seconds"])
    memory = best["memory_bytes"]
    parts = ("parameters", "gradients", "optimizer", "activations", "buffers", "margin")
    assert min(memory[name] for name in parts) >= 0
    assert sum(memory[name] for name in parts) == memory["total"] < figures["device_memory_bytes"]
    assert set(FREE) < set(best["settings"])


def test_both_ways_to_train_give_the_best_layout(printed: str, files: Path) -> None:
    best = json.loads((files / "plan.json").read_text())["best"][0]["settings"]
    written = load_config(files / "best.toml")
    command = next(line for line in printed.splitlines() if "distmoe train " in line)
    typed = load_config(FILE, shlex.split(command)[3:])
    for config in (written, typed):
        check(config, 8, local_world=8, with_data=False)
        assert {key: value_of(config, key) for key in best} == best
        assert config.optim.lr == 1e-4
    assert written == typed == with_values(load_config(FILE), best | {"optim.lr": 1e-4})


def test_exit_codes_and_messages(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = {
        "the first argument must be a FILE": [],
        "--gpus is missing": [FILE, "--hardware", "h100"],
        "--gpus is '0'; it must be an integer, at least 1": [FILE, "--gpus", "0"],
        "--hardware is missing; it must be one of h100, h200, b200 or a FILE": [FILE, "--gpus=8"],
        "--hardware is 'v100'": [FILE, "--gpus", "8", "--hardware", "v100"],
        "--gpus is 12; it must be a multiple of 8, the GPUs of a node": [*JOB, "--gpus", "12"],
        "--skew is '0.5'; it must be a number, at least 1": [*JOB, "--skew", "0.5"],
        "--top needs a value": [*JOB, "--top"],
        "--json is '/no/where'; it must be a file": [*JOB, "--json", "/no/where"],
        "unknown option '--parallel.epp'; did you mean": [*JOB, "--parallel.epp", "2"],
        "parallel.ep is 0; it must be at least 1": [*JOB, "--parallel.ep", "0"],
        "train.global_batch_size is 4; it must be a multiple": [
            *JOB,
            "--train.global_batch_size=4",
        ],
        "model.vocab_size is 0, and data.path is": [*JOB, "--model.vocab_size", "0"],
        "train.dtype is fp32": [*JOB, "--train.dtype", "fp32"],
        "moe.num_experts is 64; it must be a multiple of parallel.ep (3)": [
            *JOB,
            "--parallel.ep=3",
        ],
    }
    for words, argv in wrong.items():
        assert plan(*argv) == 2, words
        output = capsys.readouterr()
        assert words in output.err
        assert output.err.startswith("distmoe plan: error: ")
        assert not output.out
    assert plan(*JOB, "--memory-gib", "4") == 1
    assert "No layout fits" in capsys.readouterr().out
    assert plan("--help") == 0
    assert capsys.readouterr().out.startswith("usage: distmoe plan")


def test_a_measured_profile_takes_the_place_of_a_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "machine.toml"
    save_profile(PRESETS["NVIDIA H200"], file)
    options = ["--gpus", "8", "--top", "1", "--parallel.engine", "fsdp2"]
    assert plan(FILE, *options, "--parallel.profile", str(file)) == 0
    assert "8 x NVIDIA H200, 8 on a node" in capsys.readouterr().out


def test_links_that_a_profile_lacks_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    h200, file = PRESETS["NVIDIA H200"], str(tmp_path / "machine.toml")
    for lacking, gpus, missing in (
        (("remote",), "16", "no link 'remote', which 16 GPUs, 8 on a node, need"),
        (("node", "remote"), "8", "no link 'node', which 8 GPUs, 8 on a node, need"),
    ):
        links = {name: link for name, link in h200.links.items() if name not in lacking}
        save_profile(replace(h200, links=links), file)
        assert plan(FILE, "--gpus", gpus, "--hardware", file) == 2
        assert f"profile '{file}' has {missing}; run" in capsys.readouterr().err
    # One GPU sends nothing.
    assert plan(FILE, "--gpus", "1", "--hardware", file, "--memory-gib", "1") == 1


def test_thousands_of_ranks_take_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(CONFIGS / "models/sonicmoe_7b.toml")
    begun = time.process_time()
    options = ["--hardware", "h100", "--top", "1", "--train.global_batch_size", "4096"]
    assert plan(file, "--gpus", "4096", *options) == 0
    assert time.process_time() - begun < 10
    assert "4096 x NVIDIA H100" in capsys.readouterr().out
