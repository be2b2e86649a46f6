"""From a run to Hugging Face's format, back, and on: a run that begins with given weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_runs import config_file, records

from distmoe.checkpoint.tensors import read_tensors, saved_tensors
from distmoe.config import RankInfo, check, load_config, resolve
from distmoe.convert.cli import main as convert
from distmoe.launch.generate import main as generate
from distmoe.train.trainer import train

Captured = pytest.CaptureFixture[str]
OPTIONS = (
    "--launch.nproc 1 --parallel.ep 1 --optim.warmup_steps 1 --metrics.tensorboard false".split()
)
OPTIONS += "--train.validation_batches 1 --moe.bias_update_rate 0 --moe.router softmax_topk".split()
# A rate that moves no weight.
STILL = ["--optim.lr", "1e-30"]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains in the new folder NAME, or goes on there; the run's folder."""
    root = tmp_path_factory.mktemp("runs")

    def train_here(name: str, steps: int, *options: str) -> Path:
        path = config_file(root / name, data)
        config = load_config(path, [*OPTIONS, "--train.steps", str(steps), *options])
        check(config, 1)
        train(resolve(config, 1), RankInfo())
        return root / name / "run"

    return train_here


@pytest.fixture(scope="module")
def trained(run: Callable[..., Path]) -> Path:
    return run("trained", 2)


@pytest.fixture(scope="module")
def imported(trained: Path) -> Path:
    """Its checkpoint, exported and imported again."""
    exported, out = trained.parent / "exported", trained.parent / "imported"
    assert convert(["to-hf", str(trained), str(exported)]) == 0
    assert convert(["from-hf", str(exported), str(out)]) == 0
    return out / "checkpoints/step-00000000"


def model(checkpoint: Path) -> dict[str, Tensor]:
    return read_tensors(checkpoint, saved_tensors(checkpoint, "model"))


def test_run_begins_with_imported_weights_and_then_goes_on(
    run: Callable[..., Path], trained: Path, imported: Path, capsys: Captured
) -> None:
    options = [*STILL, "--checkpoint.init_from", str(imported)]
    folder = run("on", 1, *options)
    assert f"new run with the weights of {imported}" in capsys.readouterr().out
    before, after = (
        model(trained / "checkpoints/step-00000002"),
        model(folder / "checkpoints/step-00000001"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Its own checkpoint counts for more than the weights that it began with.
    run("on", 2, *options)
    assert "resumed from" in capsys.readouterr().out
    assert [record["step"] for record in records(folder.parent / "config.toml")] == [1, 2]


def test_written_config_is_that_of_the_model(data: Path, imported: Path) -> None:
    config = load_config(imported.parents[1] / "config.toml", ["--data.path", str(data)])
    check(config, 1)
    assert config.checkpoint.init_from == str(imported)
    assert (config.model.n_layers, config.moe.num_experts, config.model.n_dense_layers) == (2, 4, 1)


def test_weights_alone_are_not_resumed(run: Callable[..., Path], imported: Path) -> None:
    with pytest.raises(ValueError, match=r"has weights only; .*--checkpoint.init_from"):
        run("refused", 1, "--checkpoint.resume", str(imported))


def test_init_from_must_exist(data: Path, tmp_path: Path) -> None:
    options = [*OPTIONS, "--checkpoint.init_from", str(tmp_path / "none")]
    with pytest.raises(ValueError, match="checkpoint.init_from is .*none; it must be empty or"):
        check(load_config(config_file(tmp_path, data), options), 1)


def test_generate(trained: Path, imported: Path, data: Path, capsys: Captured) -> None:
    def text(where: Path, *options: str) -> str:
        prompt = ["--prompt", "First Citizen:", "--tokens", "6", "--device", "cpu"]
        assert generate([str(where), *prompt, *options]) == 0
        return capsys.readouterr().out

    likeliest = text(trained)
    assert likeliest.startswith("First Citizen:")
    assert len(likeliest) > len("First Citizen:\n")
    assert text(imported, "--tokenizer", str(data / "tokenizer.json")) == likeliest
    drawn = [text(trained, "--temperature", "2", "--seed", seed) for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]
    assert generate([str(imported), "--prompt", "a", "--tokenizer", "none"]) == 1
    assert "there is no tokenizer 'none'; name one with --tokenizer" in capsys.readouterr().err
    assert generate([str(trained.parent / "none"), "--prompt", "a"]) == 2
