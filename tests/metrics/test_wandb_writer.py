"""What W&B is sent, by a stub in its place."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from load_counts import FREQ_LE

from distmoe.config import Config, MetricsConfig
from distmoe.config.file_rules import _wandb
from distmoe.metrics.record import StepRecord
from distmoe.metrics.reporter import Reporter

Make = Callable[..., StepRecord]


class Run:
    """A run of W&B: ``starting_step`` is the first that it does not have."""

    def __init__(self, asked: dict[str, Any], step: int) -> None:
        self.asked, self.starting_step, self.step = asked, step, step
        self.rows: dict[int, dict[str, float]] = {}
        self.exit_codes: list[int] = []

    def log(self, values: dict[str, float], step: int) -> None:
        assert step >= self.step, "W&B takes no row for a step before"
        self.step = step
        self.rows.setdefault(step, {}).update(values)

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


class Wandb(ModuleType):
    """The module, and its server, which goes on behind the last step of a run that it knows."""

    class Error(Exception):
        """Of the stub."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None, origin="stub")
        self.runs: list[Run] = []

    def init(self, **asked: Any) -> Run:
        if asked["project"] == "unreachable":
            raise self.Error("no network.")
        steps = [max(run.rows) + 1 for run in self.runs if run.asked["id"] == asked["id"]]
        self.runs.append(Run(asked, max(steps, default=0)))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    stub = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


@pytest.fixture
def with_wandb(config: Config) -> Config:
    return replace(config, metrics=MetricsConfig(tensorboard=False, wandb="moe"))


def train(config: Config, record: Make, steps: range, *, rank: int = 0, ends: bool = True) -> None:
    reporter = Reporter.open(config, rank=rank, world=2, resumed_step=steps[0] - 1)
    for step in steps:
        reporter.step(record(step, loss=8.0 - step), FREQ_LE)
    if ends:
        reporter.validation(steps[-1], 3.5, 6.0, seconds=0.25)
        reporter.finish(step=steps[-1], unigram_entropy=6.0)
    reporter.close()


def test_the_curves_of_tensorboard_are_sent(with_wandb: Config, record: Make, wandb: Wandb) -> None:
    train(with_wandb, record, range(1, 4))
    (run,) = wandb.runs
    assert (run.asked["project"], run.asked["name"]) == ("moe", "tiny")
    assert run.asked["dir"] == with_wandb.run.dir
    assert run.asked["config"]["moe"]["num_experts"] == 4
    assert list(run.rows) == [1, 2, 3]
    assert run.rows[2] == record(2, loss=6.0).scalars()
    assert run.rows[3]["validation/loss"] == 3.5
    assert "throughput/mfu" not in run.rows[1]
    assert run.exit_codes == [0]


def test_a_resumed_run_goes_on_and_repeats_nothing(
    with_wandb: Config, record: Make, wandb: Wandb
) -> None:
    train(with_wandb, record, range(1, 6), ends=False)
    train(with_wandb, record, range(4, 8))
    first, second = wandb.runs
    assert first.exit_codes == [1]
    assert first.asked["id"] == second.asked["id"]
    assert second.asked["resume"] == "allow"
    # The server has steps 4 and 5.
    assert list(second.rows) == [6, 7]
    assert (Path(with_wandb.run.dir) / "wandb_run").read_text().strip() == first.asked["id"]


def test_a_run_that_begins_anew_is_another_one(
    with_wandb: Config, record: Make, wandb: Wandb
) -> None:
    train(with_wandb, record, range(1, 3))
    train(with_wandb, record, range(1, 3))
    assert len({run.asked["id"] for run in wandb.runs}) == 2


def test_other_ranks_and_other_runs_send_nothing(
    config: Config, with_wandb: Config, record: Make, wandb: Wandb
) -> None:
    train(with_wandb, record, range(1, 3), rank=1)
    train(config, record, range(1, 3))
    assert wandb.runs == []
    assert not (Path(config.run.dir) / "wandb_run").exists()


@pytest.mark.usefixtures("wandb")
def test_a_start_that_fails_says_how_to_do_without(with_wandb: Config) -> None:
    config = replace(with_wandb, metrics=MetricsConfig(tensorboard=False, wandb="unreachable"))
    expected = "metrics.wandb is unreachable, and wandb does not start: no network. WANDB_MODE="
    with pytest.raises(RuntimeError, match=expected):
        Reporter.open(config, rank=0, world=2, resumed_step=0)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), "[Errno 104] Connection reset by"),
        (Wandb.Error("the mailbox is closed"), "Error: the mailbox is closed"),
    ],
    ids=["a connection", "its own error"],
)
def test_training_goes_on_without_the_process_of_wandb(
    with_wandb: Config,
    record: Make,
    wandb: Wandb,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    said: str,
) -> None:
    def lost(self: Run, *args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Run, "log", lost)
    monkeypatch.setattr(Run, "finish", lost)
    train(with_wandb, record, range(1, 4))
    words = f"wandb in {with_wandb.run.dir} is NOT written: {said}"
    assert "".join(capsys.readouterr().out.split()).count("".join(words.split())) == 1


def test_a_failed_run_does_not_wait_for_its_last_words(
    with_wandb: Config, record: Make, wandb: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distmoe.metrics.wandb_writer.LAST_WORDS_S", 0.1)
    network_is_back = threading.Event()
    monkeypatch.setattr(Run, "finish", lambda run, exit_code: network_is_back.wait(20))
    began = time.monotonic()
    train(with_wandb, record, range(1, 3), ends=False)
    assert time.monotonic() - began < 10
    network_is_back.set()


def test_forced_routing_is_a_tag(with_wandb: Config, record: Make, wandb: Wandb) -> None:
    train(with_wandb, record, range(1, 2))
    forced = replace(with_wandb, moe=replace(with_wandb.moe, router="balanced"))
    train(forced, record, range(1, 2))
    tags = [run.asked["tags"] for run in wandb.runs]
    assert tags == [[], ["FORCED by router balanced: no real routing"]]


def problems(project: str) -> list[str]:
    config = Config(metrics=MetricsConfig(wandb=project))
    return list(_wandb(config, 1))


@pytest.mark.usefixtures("wandb")
def test_a_name_that_wandb_refuses_is_refused_first() -> None:
    assert problems("moe 1") == problems("") == []
    expected = "metrics.wandb is a/b; it must be empty or a name without any of / \\ # ? % :"
    assert problems("a/b") == [expected]


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = ["metrics.wandb is moe; it must be empty where wandb is missing: pip install wandb"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert problems("moe") == expected
    assert problems("") == []
    # The folder that wandb leaves where it runs is no package.
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert problems("moe") == expected
