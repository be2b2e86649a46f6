"""A run of one rank in this process, whose disk fills up or whose checkpoints get damaged."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from short_runs import STEPS, train_here
from training_runs import learning, records

from distmoe.checkpoint.disk import Disk
from distmoe.config import ConfigError
from distmoe.train import trainer
from distmoe.train.step import StepOutcome, train_step

Captured = pytest.CaptureFixture[str]
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains to the end in a new or a given folder; the config's path."""

    def train_in(folder: Path | None = None, *options: str) -> Path:
        return train_here(folder or tmp_path_factory.mktemp("run"), data, *options)

    return train_in


@pytest.fixture(scope="module")
def unbroken(run: Run) -> Path:
    return run()


def checkpoints(config: Path) -> list[str]:
    # A run that was ended by an error may leave one that is still written.
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    return sorted(path.name for path in (config.parent / "run" / "checkpoints").iterdir())


@pytest.fixture
def fill_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """No space for the tensors of the checkpoints that are named."""

    def fill(*names: str) -> None:
        write = Disk.write

        def full(disk: Disk, file: BinaryIO, data: Any) -> None:
            if Path(file.name).parent.name.removeprefix(".tmp-") in names:
                raise OSError(errno.ENOSPC, "No space left on device", file.name)
            write(disk, file, data)

        monkeypatch.setattr(Disk, "write", full)

    return fill


def test_saves_are_told_and_counted(run: Run, unbroken: Path, capsys: Captured) -> None:
    config = run(None, "--checkpoint.asynchronous", "false")
    output = capsys.readouterr().out
    for step in (2, 4, 6):
        assert f"checkpoint of step {step}: " in output
    lost = [record["checkpoint_seconds"] > 0 for record in records(config)]
    # A save comes after its step's line.
    assert lost == [False, False, True, False, True, False]
    (line,) = (line for line in output.splitlines() if line.startswith("  saving "))
    assert "3 checkpoints written in" in line
    assert "FAILED" not in line
    assert checkpoints(config) == ["step-00000004", "step-00000006"]
    assert learning(config) == learning(unbroken)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_does_not_stop_the_run(
    run: Run,
    unbroken: Path,
    fill_disk: Callable[[str], None],
    capsys: Captured,
    asynchronous: str,
) -> None:
    fill_disk("step-00000004")
    config = run(None, "--checkpoint.asynchronous", asynchronous)
    output = capsys.readouterr().out
    (line,) = (line for line in output.splitlines() if line.startswith("error:"))
    words = "error: the checkpoint of step 4 was NOT written: rank 0: [Errno 28] No space left on"
    assert line.startswith(words)
    assert line.endswith(f"the newest is {config.parent}/run/checkpoints/step-00000002")
    assert "2 checkpoints written in" in output
    assert "1 FAILED" in output
    assert checkpoints(config) == ["step-00000002", "step-00000006"]
    assert learning(config) == learning(unbroken)


def test_a_run_that_cannot_save_its_end_fails(
    run: Run, fill_disk: Callable[[str], None], capsys: Captured, tmp_path: Path
) -> None:
    fill_disk("step-00000006")
    with pytest.raises(RuntimeError, match="after 6 steps could not be saved; .*step-00000004"):
        run(tmp_path)
    assert f"done at step {STEPS}" in capsys.readouterr().out
    assert checkpoints(tmp_path / "config.toml") == ["step-00000002", "step-00000004"]


def test_damage_is_told_and_costs_an_interval(
    run: Run, unbroken: Path, capsys: Captured, tmp_path: Path
) -> None:
    config = run(tmp_path, "--checkpoint.keep_every", "2", "--train.steps", "4")
    damaged = tmp_path / "run" / "checkpoints" / "step-00000004"
    with (damaged / "__0_0.distcp").open("r+b") as file:
        file.truncate(1000)
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"step-00000004 is damaged: __0_0.distcp has 1,000 bytes"):
        run(tmp_path, "--checkpoint.resume", str(damaged))
    run(tmp_path)
    output = capsys.readouterr().out
    assert f"warning: checkpoint {damaged} is damaged: __0_0.distcp has 1,000 bytes" in output
    assert f"resumed from {damaged.with_name('step-00000002')}" in output
    assert [record["step"] for record in records(config)] == list(range(1, STEPS + 1))
    assert checkpoints(config) == ["step-00000004", "step-00000006"]


def test_another_model_is_refused_with_what_has_changed(
    run: Run, unbroken: Path, tmp_path: Path
) -> None:
    """At the folder of a run whose config was edited."""
    path = unbroken.parent / "run" / "checkpoints" / f"step-{STEPS:08d}"
    options = ("--checkpoint.resume", str(path), "--model.n_layers", "3", "--optim.lr", "0.25")
    words = "does not fit this model: .*; changed since it was saved: model.n_layers 3, was 2, .*lr"
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, *options)


def test_what_changes_the_learning_is_told(
    run: Run, unbroken: Path, capsys: Captured, tmp_path: Path
) -> None:
    path = unbroken.parent / "run" / "checkpoints" / "step-00000004"
    own = ["--checkpoint.resume", str(path)]
    capsys.readouterr()
    computing = ["--checkpoint.every", "5", "--moe.dispatch.overlap", "false"]
    run(tmp_path, *own, "--run.seed", "7", "--moe.dispatch.row_dtype", "fp8", *computing)
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("changed since"))
    rows = "moe.dispatch.row_dtype 'fp8', was 'computed'"
    assert line == f"changed since the checkpoint: run.seed 7, was 1, {rows}"
    run(tmp_path / "again", *own)
    assert "changed since" not in capsys.readouterr().out


def test_skipped_steps_push_out_no_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def spoiled(*arguments: Any, **options: Any) -> StepOutcome:
        outcome = train_step(*arguments, **options)
        steps.append(outcome)
        return replace(outcome, skipped=len(steps) > 2, not_finite="loss of rank 0")

    steps: list[StepOutcome] = []
    monkeypatch.setattr(trainer, "train_step", spoiled)
    with pytest.raises(RuntimeError, match="3 steps in a row had .* loss of rank 0"):
        run(tmp_path, "--train.max_skipped_steps", "2")
    assert len(steps) == 5
    assert checkpoints(tmp_path / "config.toml") == ["step-00000002"]


def test_a_run_that_is_stopped_while_it_skips_keeps_what_is_sound(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path
) -> None:
    def spoiled(*arguments: Any, **options: Any) -> StepOutcome:
        outcome = train_step(*arguments, **options)
        steps.append(outcome)
        return replace(outcome, skipped=len(steps) > 4, not_finite="loss of rank 0")

    steps: list[StepOutcome] = []
    monkeypatch.setattr(trainer, "train_step", spoiled)
    monkeypatch.setattr(trainer, "any_rank", lambda wish, runtime: wish or len(steps) > 5)
    for _ in range(3):
        run(tmp_path, "--train.steps", "9")
        # The next life is resumed from step 4.
        del steps[4:]
        assert checkpoints(tmp_path / "config.toml") == ["step-00000002", "step-00000004"]
        words = "at step 6 of 9, and not saved: the last 2 steps had a loss or gradient that is not"
        assert words in capsys.readouterr().out
    # With all its steps done, what may be damaged is saved beside what is not.
    monkeypatch.setattr(trainer, "any_rank", lambda wish, runtime: wish)
    run(tmp_path, "--train.steps", "5")
    assert checkpoints(tmp_path / "config.toml")[:2] == ["step-00000002", "step-00000004"]
    assert checkpoints(tmp_path / "config.toml")[2:] == ["step-00000005"]
