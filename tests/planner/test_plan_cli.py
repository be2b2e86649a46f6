"""`distmoe plan` as a user calls it, in this process."""

import io
import json
import re
import shlex
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from manifests import write_manifest

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


def test_what_does_not_fit_is_marked_and_its_change_has_a_price(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figures = tmp_path / "plan.json"
    job = [*JOB, "--parallel.engine", "fsdp2", "--parallel.ep=8", "--json", str(figures)]
    capacity = ["--moe.rounding.capacity_factor=4", "--moe.rounding.capacity_of=rank"]
    assert plan(*job, *capacity, "--memory-gib", "30") == 0
    output = capsys.readouterr().out
    assert "times the mean, no rank above 4 times, in whole tiles" in output.splitlines()[0]
    assert re.search(r"^file\* ", output, re.MULTILINE)
    assert "   * does not fit: it needs more than the 30.0 GiB of a GPU" in output
    misfits = json.loads(figures.read_text())["misfits"]
    assert misfits
    for letter, misfit in zip("abc", misfits, strict=False):
        (line,) = re.findall(rf"^   {letter} fits with .*$", output, re.MULTILINE)
        rate = misfit["changed"]["tokens_per_second_per_rank"]
        assert line.endswith(f": then {rate:,.0f} tokens/s/GPU")
        assert rate < misfit["tokens_per_second_per_rank"]
        assert misfit["changed"]["memory_bytes"]["total"] < 30 * 2**30


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
    command, other = (line for line in printed.splitlines() if "distmoe train " in line)
    typed = load_config(FILE, shlex.split(command)[3:])
    assert shlex.split(other) == ["distmoe", "train", str(files / "best.toml")]
    for config in (written, typed):
        assert config.launch.nproc == 8
        check(config, 8, local_world=8, with_data=False)
        assert {key: value_of(config, key) for key in best} == best
        assert config.optim.lr == 1e-4
    others = {"optim.lr": 1e-4, "launch.nproc": 8}
    assert written == typed == with_values(load_config(FILE), best | others)


@pytest.mark.parametrize(
    ("file", "gpus", "words", "settings"),
    [
        ("eight_gpu.toml", 8, ["distmoe", "train"], ["--parallel.ep", "4", "--launch.nproc=2"]),
        (
            "models/sonicmoe_7b.toml",
            16,
            ["distmoe", "launch", "slurm"],
            ["--parallel.ep", "8", "--parallel.cp", "4"],
        ),
    ],
)
def test_what_is_printed_starts_all_ranks(
    file: str,
    gpus: int,
    words: list[str],
    settings: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Its own checks say so, with data there."""
    data = write_manifest(tmp_path, vocab_size=50304, train=10**9, validation=10**9)
    fixed = ["--parallel.engine=fsdp2", "--train.micro_batch_size=2", "--data.path", data]
    job = ["--gpus", str(gpus), "--hardware", "h200", "--write", str(tmp_path / "best.toml")]
    assert plan(str(CONFIGS / file), *job, *fixed, *settings) == 0
    lines = capsys.readouterr().out.splitlines()
    shared = "--parallel.cp" in settings
    assert ("Sequences are shared by 4 ranks (parallel.cp)" in lines) == shared
    commands = [shlex.split(line) for line in lines if line.startswith("  distmoe ")]
    assert len(commands) == 2
    for command in commands:
        assert command[: len(words)] == words
        rest = command[len(words) :]
        if words[1] == "launch":
            assert cli.main(["launch", "slurm", *rest, "--dry-run"]) == 0
            script = capsys.readouterr().out
            assert "#SBATCH --nodes=2" in script
            assert "RANKS_PER_NODE=8" in script
        else:
            assert load_config(rest[0], rest[1:]).launch.nproc == gpus
            assert cli.main(["config", *rest]) == 0
            assert "nproc = 8" in capsys.readouterr().out


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
        "run.device is cpu, and --hardware is a GPU, NVIDIA H100 80GB HBM3; give --run.device": [
            *JOB,
            "--run.device=cpu",
        ],
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


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        # The file's ep, which is free, has no part in it.
        ([], "train.global_batch_size is 512; it must be a multiple of 48, the ranks (48) * "),
        (
            ["--train.micro_batch_size=2"],
            "train.global_batch_size is 512; it must be a multiple of 96, the ranks (48) * ",
        ),
        (["--train.global_batch_size=480", "--parallel.dp_shard=5"], "parallel.dp_shard is 5; "),
        (
            ["--train.global_batch_size=480", "--parallel.dp_replicate=5"],
            "parallel.dp_replicate is 5; it must divide the number of ranks (48)",
        ),
        (
            [
                "--train.global_batch_size=480",
                "--parallel.engine=deepspeed",
                "--parallel.dp_replicate=2",
            ],
            "parallel.dp_replicate is 2; it must be 1 with parallel.engine 'deepspeed'",
        ),
    ],
)
def test_only_what_cannot_be_mended_is_named(
    capsys: pytest.CaptureFixture[str], settings: list[str], problem: str
) -> None:
    file = str(CONFIGS / "models/sonicmoe_7b.toml")
    assert plan(file, "--gpus", "48", "--hardware", "h100", *settings) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"distmoe plan: error: {problem}")


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
    # One GPU sends nothing; what more of them would need is not known.
    assert plan(FILE, "--gpus", "1", "--hardware", file, "--memory-gib", "1") == 1
    remedies = capsys.readouterr().out.split("No layout fits")[1]
    assert set(re.findall(r": (\d+) GPUs", remedies)) == {"1"}


def test_the_front_page_plans_without_data(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    readme = (CONFIGS.parent / "README.md").read_text()
    (command,) = re.findall(r"^distmoe plan .*$", readme, re.MULTILINE)
    assert plan(*shlex.split(command)[2:], "--parallel.engine", "fsdp2", "--parallel.ep=8") == 0
    assert "eight_gpu.toml on 8 x NVIDIA H100" in capsys.readouterr().out


def test_compilation_is_not_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    small = [*JOB, "--parallel.ep=8", "--train.micro_batch_size=4", "--parallel.engine=fsdp2"]
    said = []
    for mode in ("none", "dense"):
        assert plan(*small, "--train.compile", mode) == 0
        said.append(capsys.readouterr().out.split("Train with it")[0].splitlines())
    plain, compiled = said
    assert [line for line in compiled if line not in plain] == [
        "train.compile is predicted as none"
    ]


def test_what_offload_costs_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--parallel.ep=8", "--train.micro_batch_size=4", "--deepspeed.offload_optimizer=cpu"]
    left_out = "time without offload: transfers and the CPU's optimizer are not predicted"
    for engine, told in (("deepspeed", True), ("fsdp2", False)):
        assert plan(*JOB, *small, "--parallel.engine", engine) == 0
        assert (left_out in capsys.readouterr().out) == told
    assert plan(*JOB, "--parallel.ep=8", "--memory-gib", "4") == 1
    remedies = re.findall(r"^.* GPUs, .*$", capsys.readouterr().out, re.MULTILINE)
    (host,) = re.findall(r"and about ([\d,]+) GiB of host memory a node", "\n".join(remedies))
    # 22 bytes of each of its 6.9 billion parameters are on the node.
    assert 22 * 6.9e9 / 2**30 == pytest.approx(float(host.replace(",", "")), rel=0.02)


def test_thousands_of_ranks_take_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(CONFIGS / "models/sonicmoe_7b.toml")
    begun = time.process_time()
    options = ["--hardware", "h100", "--top", "1", "--train.global_batch_size", "4096"]
    assert plan(file, "--gpus", "4096", *options) == 0
    assert time.process_time() - begun < 10
    assert "4096 x NVIDIA H100" in capsys.readouterr().out
