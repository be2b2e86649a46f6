"""A run that is resumed with other settings or other data than it was saved with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from short_runs import train_here

from distmoe.checkpoint.manifest import Manifest, read_manifest
from distmoe.config import ConfigError, load_config
from distmoe.config.keys import with_values
from distmoe.data.sampler import DataPosition
from distmoe.train.changed_data import skipped_too_late
from distmoe.train.progress import Progress, saved_progress

Captured = pytest.CaptureFixture[str]
CHECKPOINT = "run/checkpoints/step-0000000{}"


@pytest.fixture(scope="module")
def four_steps(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps of eight sequences."""
    folder = tmp_path_factory.mktemp("run")
    train_here(folder, data, "--train.steps", "4", "--train.global_batch_size", "8")
    return folder


@pytest.fixture
def resumable(four_steps: Path, tmp_path: Path) -> Path:
    shutil.copytree(four_steps, tmp_path, dirs_exist_ok=True)
    return tmp_path


def with_manifest(data: Path, folder: Path, **changed: object) -> Path:
    """``data`` again, whose manifest says something else."""
    folder.mkdir()
    for file in data.iterdir():
        (folder / file.name).symlink_to(file)
    manifest = json.loads((data / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest | changed))
    return folder


def test_another_batch_size_goes_on_where_the_data_were_left(
    resumable: Path, data: Path, capsys: Captured
) -> None:
    train_here(resumable, data, "--train.global_batch_size", "16")
    assert read_manifest(resumable / CHECKPOINT.format(4)).about["samples"] == 32
    assert read_manifest(resumable / CHECKPOINT.format(6)).about["samples"] == 32 + 2 * 16
    assert "shakespeare 64 sequences" in capsys.readouterr().out


def test_a_stretch_of_samples_is_left_out(resumable: Path, data: Path, capsys: Captured) -> None:
    """The run goes on at sample 32: what lies before it has been trained on."""
    skip = ["--data.skip", "20:24", "36:44"]
    train_here(resumable, data, "--train.global_batch_size", "8", *skip)
    path = resumable / CHECKPOINT.format(6)
    assert read_manifest(path).about["samples"] == 32 + 2 * 8 + 8
    lines = [json.loads(line) for line in (resumable / "run/metrics.jsonl").open()]
    assert [line["samples_left_out"] for line in lines] == [0, 0, 0, 0, 8, 0]
    assert [line["next_sample"] for line in lines[3:]] == [32, 48, 56]
    assert [line["corpora"][0]["samples"] for line in lines[3:]] == [32, 40, 48]
    assert [line["tokens"] for line in lines] == [lines[0]["tokens"]] * 6
    output = capsys.readouterr().out
    assert "shakespeare, without samples 20:24, 36:44, " in output
    assert "warning: data.skip has samples 20:24, which were trained on before " in output
    assert "step 5 left out samples 36:44 (data.skip)" in output.splitlines()
    # Of this start, which had the same setting.
    config, reached = load_config(resumable / "run/config.toml"), saved_progress(path, 6).data
    assert skipped_too_late(path, config, reached) == []
    wider = with_values(config, {"data.skip": ("18:24", "36:44")})
    (warning,) = skipped_too_late(path, wider, reached)
    assert warning.startswith("warning: data.skip has samples 18:20, which were trained on before ")


def test_what_was_left_out_is_not_left_out_too_late(resumable: Path) -> None:
    """The setting was there, was taken away, and comes back."""
    config = with_values(load_config(resumable / "run/config.toml"), {"data.skip": ("8:16",)})
    path = resumable / CHECKPOINT.format(4)
    assert len(skipped_too_late(path, config, DataPosition(4, 40))) == 1
    saved = read_manifest(path)
    about = Progress(DataPosition(4, 40, (range(8, 16),))).about()
    manifest = Manifest(saved.step, saved.files, {**saved.about, **about})
    (path / "manifest.json").write_text(manifest.to_json())
    assert skipped_too_late(path, config, saved_progress(path, 4).data) == []


def test_a_checkpoint_of_an_older_version_knows_its_batch_size(
    resumable: Path, data: Path, capsys: Captured
) -> None:
    path = resumable / CHECKPOINT.format(4)
    saved = read_manifest(path)
    about = {key: saved.about[key] for key in ("config", "world", "engine", "ep", "distmoe")}
    # What auto was then, nobody knows.
    assert 'dtype = "fp32"' in about["config"]
    about["config"] = about["config"].replace('dtype = "fp32"', 'dtype = "auto"')
    (path / "manifest.json").write_text(Manifest(saved.step, saved.files, about).to_json())
    train_here(resumable, data, "--train.global_batch_size", "16")
    assert read_manifest(resumable / CHECKPOINT.format(6)).about["samples"] == 64
    assert "train.dtype" not in capsys.readouterr().out


def test_a_jump_of_the_learning_rate_is_told(resumable: Path, data: Path, capsys: Captured) -> None:
    size = ["--train.global_batch_size", "8"]
    train_here(resumable, data, *size, "--train.steps", "4")
    assert "lr jumps" not in capsys.readouterr().out
    train_here(resumable, data, *size, "--train.steps", "9")
    told = capsys.readouterr().out
    assert "changed since the checkpoint: train.steps 9, was 4" in told
    assert "warning: lr jumps: that of step 4 is " in told


def test_another_optimizer_goes_on_with_the_weights_alone(
    resumable: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    muon, path = ["--optim.name", "muon"], resumable / CHECKPOINT.format(4)
    with pytest.raises(ConfigError, match="optim.name is muon; it must be adamw to go on from"):
        train_here(resumable, data, *muon)
    train_here(tmp_path / "new", data, *muon, "--checkpoint.init_from", str(path))
    with pytest.raises(ConfigError, match="optim.name is adamw; it must be muon to go on from"):
        train_here(tmp_path / "new", data)


@pytest.mark.parametrize("option", ["--checkpoint.resume", "--checkpoint.init_from"])
def test_other_tokens_are_refused(resumable: Path, data: Path, tmp_path: Path, option: str) -> None:
    other = with_manifest(data, tmp_path / "other", tokenizer_sha256="5" * 64)
    options = [option, str(resumable / CHECKPOINT.format(4))]
    folder = tmp_path / "new"
    with pytest.raises(ConfigError, match="have tokenizer_sha256 5+; it must be [0-9a-f]{64}, wi"):
        train_here(folder, other, *options)
    train_here(folder, other, *options, "--checkpoint.any_tokenizer")


def test_other_data_are_told(resumable: Path, data: Path, tmp_path: Path, capsys: Captured) -> None:
    config = resumable / "config.toml"
    moved = tmp_path / "data"
    shutil.copytree(data, moved)
    config.write_text(config.read_text().replace(str(data), str(moved)))
    train_here(resumable, moved, "--train.steps", "5")
    assert "what is in" not in capsys.readouterr().out
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps(manifest, indent=7))
    train_here(resumable, moved)
    assert f"changed since the checkpoint: what is in {moved}" in capsys.readouterr().out
