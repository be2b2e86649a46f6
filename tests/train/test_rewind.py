"""Going back to an older checkpoint: once, and without losing what is left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from short_runs import SHORT, starts, train_here
from training_runs import learning, records

from distmoe.config import ConfigError, check, load_config

Captured = pytest.CaptureFixture[str]
# Losses of the first steps do not depend on how many follow.
ALL = ["--checkpoint.keep_every", "2", "--optim.schedule", "constant"]


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints of steps 2, 4 and 6."""
    return train_here(tmp_path_factory.mktemp("unbroken"), data, *ALL)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def test_a_run_goes_back_once_and_restarts_go_on(
    unbroken: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    train_here(tmp_path, data, *ALL)
    back = [*ALL, "--checkpoint.resume", str(run / "checkpoints/step-00000002")]
    capsys.readouterr()
    train_here(tmp_path, data, *back, "--train.steps", "4")
    told = capsys.readouterr().out
    aside = run / "abandoned-1"
    assert f"set aside in {aside}: checkpoints of steps 4, 6, and the metrics so far" in told
    assert (steps_in(aside), steps_in(run / "checkpoints")) == ([4, 6], [2, 4])
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == 6
    assert [record["step"] for record in records(tmp_path / "config.toml")] == [1, 2, 3, 4]
    # The same command, as a requeue or an agent starts it.
    train_here(tmp_path, data, *back)
    told = capsys.readouterr().out
    assert f"resumed from {run}/checkpoints/step-00000004" in told
    assert f"to do so again, delete {run}/rewound.json" in told
    assert learning(tmp_path / "config.toml") == learning(unbroken)
    train_here(tmp_path, data, *ALL)
    assert "nothing is left to do: train.steps is 6" in capsys.readouterr().out
    # After a start without it the option is a new wish.
    train_here(tmp_path, data, *back)
    assert steps_in(run / "abandoned-2") == [4, 6]


def test_a_run_begins_anew_once(unbroken: Path, data: Path, tmp_path: Path) -> None:
    """In a folder that has a run, and, for a job that is queued again, in one that has none."""
    run = tmp_path / "run"
    never = [*ALL, "--checkpoint.resume", "never"]
    train_here(tmp_path, data, *never, "--train.steps", "2")
    assert not list(run.glob("abandoned-*"))
    train_here(tmp_path, data, *never, "--train.steps", "4")
    assert [start["step"] for start in starts(run)] == [0, 2]
    train_here(tmp_path, data, *ALL)
    train_here(tmp_path, data, *never)
    assert steps_in(run / "abandoned-1") == [2, 4, 6]
    assert learning(tmp_path / "config.toml") == learning(unbroken)


def test_a_checkpoint_of_another_run_leaves_all_behind(
    unbroken: Path, data: Path, tmp_path: Path
) -> None:
    train_here(tmp_path, data, *ALL, "--train.steps", "4", "--run.seed", "5")
    other = unbroken.parent / "run/checkpoints/step-00000002"
    again = [*ALL, "--checkpoint.resume", str(other)]
    train_here(tmp_path, data, *again, "--train.steps", "4")
    assert steps_in(tmp_path / "run/abandoned-1") == [2, 4]
    assert steps_in(tmp_path / "run/checkpoints") == [4]
    # Its lines would be those of two runs.
    assert [record["step"] for record in records(tmp_path / "config.toml")] == [3, 4]
    train_here(tmp_path, data, *again)
    assert learning(tmp_path / "config.toml") == learning(unbroken)[2:]


def test_a_restart_needs_the_checkpoint_no_more(unbroken: Path, data: Path, tmp_path: Path) -> None:
    """It makes room for those that come after it."""
    run, last = tmp_path / "run", ["--checkpoint.keep_last", "1"]
    train_here(tmp_path, data, *ALL, "--train.steps", "2")
    origin = run / "checkpoints/step-00000002"
    back = ["--optim.schedule", "constant", *last, "--checkpoint.resume", str(origin)]
    path = train_here(tmp_path, data, *back, "--train.steps", "4")
    assert steps_in(run / "checkpoints") == [4]
    options = [*SHORT, *back, "--train.validation_batches", "1"]
    check(load_config(path, options), 1)
    train_here(tmp_path, data, *back)
    assert learning(path) == learning(unbroken)
    (run / "rewound.json").unlink()
    with pytest.raises(ConfigError, match="checkpoint.resume is .*step-00000002; it must be auto"):
        check(load_config(path, options), 1)


def test_damage_after_going_back_goes_back_again(
    unbroken: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = tmp_path / "run"
    train_here(tmp_path, data, *ALL, "--train.steps", "2")
    back = [*ALL, "--checkpoint.resume", str(run / "checkpoints/step-00000002")]
    train_here(tmp_path, data, *back, "--train.steps", "4")
    (run / "checkpoints/step-00000004/manifest.json").write_text("{}")
    train_here(tmp_path, data, *back)
    assert "step-00000004 is damaged" in capsys.readouterr().out
    assert learning(tmp_path / "config.toml") == learning(unbroken)


def test_what_was_set_aside_may_be_deleted(data: Path, tmp_path: Path) -> None:
    never = [*ALL, "--checkpoint.resume", "never", "--train.steps", "2"]
    for _ in range(2):
        train_here(tmp_path, data, *ALL, "--train.steps", "2")
        train_here(tmp_path, data, *never)
    shutil.rmtree(tmp_path / "run/abandoned-1")
    (tmp_path / "run/wandb_run").write_text("id")
    train_here(tmp_path, data, *ALL, "--train.steps", "2")
    train_here(tmp_path, data, *never)
    assert (tmp_path / "run/abandoned-3/wandb_run").read_text() == "id"


def test_a_refusal_touches_nothing(unbroken: Path, data: Path, tmp_path: Path) -> None:
    train_here(tmp_path, data, *ALL, "--train.steps", "2")
    other = unbroken.parent / "run/checkpoints/step-00000004"
    with pytest.raises(ConfigError, match="does not fit this model"):
        train_here(tmp_path, data, *ALL, "--checkpoint.resume", str(other), "--model.n_layers", "3")
    assert steps_in(tmp_path / "run/checkpoints") == [2]
    assert not [*(tmp_path / "run").glob("abandoned-*"), *(tmp_path / "run").glob("rewound*")]
