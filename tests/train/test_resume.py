"""The user's own path in real processes: train, kill, resume, on other ranks, under torchrun."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distmoe.data.cli import main as data_main

pytestmark = pytest.mark.processes

CONFIG = """
[run]
dir = "{run}"
device = "cpu"
[launch]
nproc = 2
threads = 1
[model]
hidden_size = 32
n_layers = 2
n_heads = 2
n_kv_heads = 1
intermediate_size = 64
[moe]
num_experts = 4
top_k = 2
intermediate_size = 16
router = "sigmoid_topk"
bias_update_rate = 0.01
[moe.rounding]
tile = 8
[parallel]
ep = 2
[data]
path = "{data}"
seq_len = 32
[optim]
warmup_steps = 2
[train]
steps = 12
global_batch_size = 4
validate_every = 0
validation_batches = 2
[checkpoint]
every = 4
[metrics]
log_every = 1
"""

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shakespeare"
    assert data_main(["prepare", "--builtin", "shakespeare", "--out", str(folder)]) == 0
    return folder


def config_file(folder: Path, data: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.toml"
    path.write_text(CONFIG.format(run=folder / "run", data=data))
    return path


def start(config: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "distmoe", "train", str(config), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


def records(config: Path) -> list[dict[str, float]]:
    path = config.parent / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def learning(config: Path) -> list[tuple[float, ...]]:
    names = ("step", "loss", "load_balance_loss", "z_loss", "grad_norm", "lr", "pairs_added")
    return [tuple(record[name] for name in names) for record in records(config)]


def wait_for_step(process: subprocess.Popen[str], config: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while len(records(config)) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def worker(launcher: int, rank: int) -> int:
    """Process id of a rank that the launcher started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == launcher and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"no rank {rank} under {launcher}")


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_file(tmp_path_factory.mktemp("unbroken"), data)
    finish(start(config))
    return config


def test_kill_9_costs_nothing(unbroken: Path, data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "killed", data)
    process = start(config)
    wait_for_step(process, config, 6)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    output = finish(process, code=1)
    assert "rank 1 was killed by signal 9" in output
    assert len(records(config)) < STEPS
    assert "resumed from" in finish(start(config))
    assert [record["step"] for record in records(config)] == list(range(1, STEPS + 1))
    assert learning(config) == learning(unbroken)


def test_sigterm_saves_and_leaves(unbroken: Path, data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "stopped", data)
    process = start(config)
    wait_for_step(process, config, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "stopped by a signal at step" in output
    stopped_at = len(records(config))
    folder = config.parent / "run" / "checkpoints" / f"step-{stopped_at:08d}"
    assert folder.is_dir()
    assert f"resumed from {folder}" in finish(start(config))
    assert learning(config) == learning(unbroken)


def test_a_checkpoint_loads_on_other_ranks(unbroken: Path, data: Path, tmp_path: Path) -> None:
    """Two ranks with ep = 2 go on as one rank without FSDP, and as two ranks with ep = 1."""
    last = sorted((unbroken.parent / "run" / "checkpoints").iterdir())[-1]
    losses = []
    for name, options in (
        ("one", ["--launch.nproc", "1", "--parallel.ep", "1"]),
        ("flat", ["--parallel.ep", "1"]),
        ("same", []),
    ):
        config = config_file(tmp_path / name, data)
        options += ["--moe.rounding.rule", "none", "--train.steps", str(STEPS + 2)]
        output = finish(start(config, "--resume", str(last), *options))
        assert f"resumed from {last}" in output
        losses.append([record["loss"] for record in records(config)])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)


def test_torchrun_gives_the_same_run(unbroken: Path, data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "torchrun", data)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [sys.executable, *command, "-m", "distmoe", "train", str(config)],
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert learning(config) == learning(unbroken)


def test_a_run_folder_that_is_a_file_is_refused(data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "broken", data)
    (tmp_path / "broken" / "run").write_text("a file where a folder should be")
    output = finish(start(config, "--checkpoint.resume", "never"), code=2)
    assert "run.dir is" in output


def test_an_error_of_a_rank_is_one_line_and_stops_all(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    shard = tmp_path / "data" / "train-00000.bin"
    os.truncate(shard, shard.stat().st_size // 2)
    config = config_file(tmp_path / "short", tmp_path / "data")
    output = finish(start(config), code=1)
    assert "Traceback" not in output
    assert any(
        line.startswith("rank ") and "train-00000.bin" in line for line in output.splitlines()
    )
    assert len(output.splitlines()) <= 4
