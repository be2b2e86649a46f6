import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from distmoe import __version__
from distmoe.config import Config, ConfigError, RankInfo, load_config
from distmoe.kernels.moe_mlp.tile_file import TileFileError
from distmoe.launch import cli
from distmoe.launch.env import ALLOCATOR

WITHOUT_TORCH = """
import sys
from distmoe.launch.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""
WRONG = {
    "choice": (["--run.device=tpu"], "invalid choice 'tpu' for argument '--run.device'"),
    "ranks": (
        ["--launch.nproc=4", "--parallel.dp_shard=3"],
        "parallel.dp_shard is 3; it must be 0 or 4",
    ),
    "data": (["--data.path=no/data"], "data.path is 'no/data'; no manifest.json there"),
    "file": (None, "there is no config file 'nothing.toml'"),
}


@pytest.mark.processes
@pytest.mark.parametrize(("options", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_run_is_refused_quickly_in_one_line_without_torch(
    config_file: Path, options: list[str] | None, expected: str
) -> None:
    arguments = ["nothing.toml"] if options is None else [str(config_file), *options]
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "train", *arguments],
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - began < 3
    assert (run.returncode, run.stdout) == (2, "")
    (line,) = run.stderr.splitlines()
    assert line.startswith("distmoe train: error: ")
    assert expected in line


@pytest.mark.processes
def test_help_and_config_need_no_torch(config_file: Path) -> None:
    for arguments in (["--help"], ["train", "--help"], ["config", str(config_file)]):
        run = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True
        )
        assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.processes
def test_module_is_the_command() -> None:
    for module in ("distmoe", "distmoe.launch.cli"):
        run = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True)
        assert (run.returncode, run.stderr) == (0, b"")
        assert run.stdout.decode() == f"distmoe {__version__}\n"


Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_main(capsys: pytest.CaptureFixture[str]) -> Main:
    """Runs the command in this process: exit code, output, errors."""

    def run(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return run


def test_config_prints_a_run_that_reads_back(
    run_main: Main, config_file: Path, tmp_path: Path
) -> None:
    code, text, _ = run_main("config", config_file, "--world", "4", "--parallel.ep", "2")
    assert code == 0
    (tmp_path / "printed.toml").write_text(text)
    config = load_config(tmp_path / "printed.toml")
    assert (config.parallel.dp_shard, config.parallel.ep, config.model.vocab_size) == (4, 2, 512)


def test_settings_without_effect_are_told(run_main: Main, config_file: Path) -> None:
    options = ["--deepspeed.zero_stage", "3", "--optim.decay_steps", "5"]
    options += ["--model.yarn.mscale", "2", "--moe.dispatch.sum_dtype", "bf16"]
    code, printed, said = run_main("config", config_file, *options, "--train.dtype", "bf16")
    assert (code, said.splitlines()) == (
        0,
        [
            "distmoe config: warning: deepspeed.zero_stage is 3; it has no effect with "
            "parallel.engine 'single'",
            "distmoe config: warning: optim.decay_steps is 5; it has no effect with "
            "optim.schedule 'cosine'",
            "distmoe config: warning: model.yarn.mscale is 2.0; it has no effect with "
            "model.yarn.factor 1.0",
            "distmoe config: warning: moe.dispatch.sum_dtype is bf16; it has no effect with "
            "train.dtype 'bf16'",
        ],
    )
    assert "zero_stage = 3" in printed
    options += ["--optim.schedule", "wsd", "--parallel.engine", "deepspeed"]
    options += ["--model.yarn.factor", "8"]
    assert run_main("config", config_file, *options)[2] == ""


def test_config_prints_one_setting(run_main: Main, config_file: Path) -> None:
    """Derived ones, too."""
    options = ("--world", "4", "--get", "train.micro_batch_size")
    assert run_main("config", config_file, *options) == (0, "4\n", "")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["trian"], "distmoe: error: unknown command 'trian'; did you mean 'train'?\n"),
        (
            ["--fast"],
            "distmoe: error: unknown command '--fast'; known: "
            "train, config, launch, data, checkpoint, plan, report, convert, generate, doctor\n",
        ),
        (["train"], "distmoe train: error: the first argument must be a FILE such as"),
        (["config", "FILE", "--world"], "distmoe config: error: --world needs a value\n"),
        (["config", "FILE", "--world=0"], "distmoe config: error: --world is '0'; it must be"),
        (
            ["config", "FILE", "--get=run.folder"],
            "distmoe config: error: --get is 'run.folder'; did you mean '",
        ),
        (["config", "FILE", "--debug"], "distmoe config: error: unknown option '--debug'"),
        (["train", "nothing.toml", "--help"], "distmoe train: error: there is no config file"),
    ],
)
def test_wrong_arguments(run_main: Main, config_file: Path, argv: list[str], expected: str) -> None:
    code, out, errors = run_main(*(config_file if word == "FILE" else word for word in argv))
    assert (code, out) == (2, "")
    assert errors.startswith(expected)
    assert errors.count("\n") == 1


def test_several_problems_are_a_line_each(run_main: Main, config_file: Path) -> None:
    code, _, errors = run_main("config", config_file, "--moe.top_k=99", "--train.steps=-1")
    assert code == 2
    assert all(line.startswith("distmoe config: error: ") for line in errors.splitlines())
    assert errors.count("\n") == 2


def test_help_shows_the_meaning_and_the_value_of_the_file(
    run_main: Main, config_file: Path
) -> None:
    with config_file.open("a") as file:
        file.write("[optim]\nlr = 0.125\n")
    code, text, _ = run_main("train", config_file, "--help")
    assert code == 0
    assert "--optim.lr" in text
    assert "Peak learning rate. (default: 0.125)" in text
    assert "distmoe train configs/quickstart.toml" in run_main("--help")[1]


def test_data_is_passed_on(run_main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = types.ModuleType("distmoe.data.cli")
    stub.main = lambda argv: {"prepare --out x": 7}[" ".join(argv)]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "distmoe.data.cli", stub)
    assert run_main("data", "prepare", "--out", "x")[0] == 7


TRAINER = """
import os, sys, types
trainer = types.ModuleType("distmoe.train.trainer")
def train(config, ranks):
    {body}
    return True
trainer.train = train
sys.modules["distmoe.train.trainer"] = trainer
from distmoe.config import ConfigError
from distmoe.launch.cli import main
sys.exit(main(sys.argv[1:]))
"""
SECOND_OF_TWO = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def run_rank(body: str, *argv: object, **environ: str) -> "subprocess.CompletedProcess[str]":
    """A rank of its own process whose trainer is ``body``."""
    return subprocess.run(
        [sys.executable, "-c", TRAINER.format(body=body), "train", *map(str, argv)],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )


@pytest.mark.processes
@pytest.mark.parametrize(
    ("body", "code", "expected"),
    [
        ("print(config.parallel.dp_shard, ranks.rank, ranks.source)", 0, ""),
        ("raise ValueError('message\\nmore')", 1, "rank 1: ValueError: message\n"),
        ("raise KeyError", 1, "rank 1: KeyError\n"),
        (
            "raise RuntimeError('[x.cc:1] Connection closed by peer [127.0.0.1]:9')",
            1,
            "rank 1: lost a peer: RuntimeError: [x.cc:1] Connection closed by peer [127.0.0.1]:9\n",
        ),
        ("raise ConfigError('wrong')", 2, ""),
        ("return False", 75, ""),
    ],
)
def test_end_of_a_rank(config_file: Path, body: str, code: int, expected: str) -> None:
    run = run_rank(body, config_file, **SECOND_OF_TWO)
    assert (run.returncode, run.stderr) == (code, expected)
    assert run.stdout == ("2 1 torchrun\n" if code == 0 else "")


@pytest.mark.processes
def test_failing_rank_does_not_wait_for_its_threads(config_file: Path) -> None:
    body = "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); 1 / 0"
    began = time.monotonic()
    assert run_rank(body, config_file, **SECOND_OF_TWO).returncode == 1
    assert time.monotonic() - began < 20


@pytest.mark.processes
def test_debug_shows_the_traceback(config_file: Path) -> None:
    run = run_rank("1 / 0", config_file, "--debug", **SECOND_OF_TWO)
    assert "Traceback" in run.stderr
    assert run.stderr.endswith("rank 1: ZeroDivisionError: division by zero\n")


@pytest.mark.processes
@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_only_rank_0_explains_a_wrong_config(config_file: Path, rank: str, lines: int) -> None:
    environ = {**SECOND_OF_TWO, "RANK": rank, "LOCAL_RANK": rank}
    run = run_rank("pass", config_file, "--moe.top_k=99", **environ)
    assert (run.returncode, run.stderr.count("\n")) == (2, lines)


def test_the_launcher_says_how_many_ranks_share_a_node(
    run_main: Main, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 of four on two machines, before anything starts."""
    places = {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    for name, value in (places | {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500}).items():
        monkeypatch.setenv(name, str(value))
    seen = []
    monkeypatch.setattr(cli, "run_worker", lambda config, *a, **k: (seen.append(config), 0)[1])
    options = ["--parallel.ep=4", "--moe.nodes_per_token=1", "--moe.rounding.tile=8"]
    assert run_main("train", config_file, *options)[0] == 0
    assert seen[0].parallel.ranks_per_node == 2
    code, _, errors = run_main("train", config_file, *options, "--moe.top_k=9")
    assert code == 2
    assert "moe.top_k is 9; it must be at most 8, moe.nodes_per_token (1)" in errors


def test_the_json_of_deepspeed_is_printed(run_main: Main, config_file: Path) -> None:
    options = ["--parallel.engine=deepspeed", "--train.dtype=bf16", "--deepspeed.zero_stage=3"]
    options += ["--world", "2", "--train.micro_batch_size=4", "--deepspeed.offload_optimizer=cpu"]
    code, out, _ = run_main("config", config_file, "--deepspeed", *options)
    found = json.loads(out)
    assert code == 0
    assert found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == 1.0
    assert found["bf16"] == {"enabled": True}
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in found["zero_optimization"]


def test_another_engine_has_no_json(run_main: Main, config_file: Path) -> None:
    code, out, errors = run_main("config", config_file, "--deepspeed")
    assert (code, out) == (2, "")
    assert "parallel.engine is single; --deepspeed needs it to be deepspeed" in errors


def test_the_option_of_the_deepspeed_launcher_is_no_command(
    run_main: Main, config_file: Path
) -> None:
    plain = run_main("config", config_file)
    assert run_main("--local_rank=1", "config", config_file) == plain
    assert plain[0] == 0


def test_single_rank_trains_here(
    run_main: Main, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Config, RankInfo]] = []
    stub = types.ModuleType("distmoe.train.trainer")
    stub.train = lambda *run: (seen.append(run), True)[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "distmoe.train.trainer", stub)
    assert run_main("train", config_file, "--resume=never", "--train.steps", "50")[0] == 0
    ((config, ranks),) = seen
    assert (config.checkpoint.resume, config.train.steps) == ("never", 50)
    assert (config.parallel.engine, ranks) == ("single", RankInfo())


def test_config_error_of_the_trainer_is_a_wrong_config(
    run_main: Main, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Config, ranks: RankInfo) -> None:
        raise ConfigError("run.device is cuda; there is no GPU")

    stub = types.ModuleType("distmoe.train.trainer")
    stub.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "distmoe.train.trainer", stub)
    code, _, errors = run_main("train", config_file)
    assert (code, errors) == (2, "distmoe train: error: run.device is cuda; there is no GPU\n")


def test_several_ranks_are_started_with_the_same_arguments(
    run_main: Main, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[str], int, dict[str, object]]] = []

    def run_local(command: list[str], nproc: int, **options: object) -> int:
        calls.append((command, nproc, options))
        return 1

    monkeypatch.setattr("distmoe.launch.local.run_local", run_local)
    arguments = [str(config_file), "--launch.nproc=2", "--debug", "--launch.threads", "3"]
    assert run_main("train", *arguments)[0] == 1
    ((command, nproc, options),) = calls
    assert command == [sys.executable, "-m", "distmoe.launch.cli", "train", *arguments]
    assert (nproc, options["threads"]) == (2, 3)
    assert options["advice"] == "the same command resumes from the last checkpoint"


def test_a_profile_that_cannot_be_read_starts_nothing(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "machine.toml"
    wrong.write_text("gemm_flops = 3\n")
    assert cli.main(["train", str(config_file), "--parallel.profile", str(wrong)]) == 2
    assert "parallel.profile: links is 'missing'" in capsys.readouterr().err


def test_a_table_of_tiles_that_cannot_be_used_starts_nothing(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "tiles.toml"
    wrong.write_text('device = "NVIDIA H200"\n[[layer]]\nbackend = "cutlass"\n')
    assert cli.main(["train", str(config_file), "--moe.kernel_tiles", str(wrong)]) == 2
    said = f"moe.kernel_tiles: layer 1 in '{wrong}': backend is 'cutlass'; it must be one of triton"
    assert said in capsys.readouterr().err


def test_torch_is_told_before_a_table_of_tiles_imports_it(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "TORCH_CPP_LOG_LEVEL")
    for name in (*ALLOCATOR, *names):
        # What the command sets is gone after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    told: list[str | None] = []

    def read_tiles(path: object) -> None:
        told.extend(os.environ.get(name) for name in names)
        raise TileFileError("read")

    monkeypatch.setattr("distmoe.kernels.moe_mlp.tile_file.read_tiles", read_tiles)
    (tmp_path / "tiles.toml").touch()
    tiles = ("--moe.kernel_tiles", str(tmp_path / "tiles.toml"))
    assert cli.main(["train", str(config_file), *tiles]) == 2
    assert told == ["expandable_segments:True", "ERROR"]
