"""How a run ends: all ranks in the same way."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from distmoe.config import Config, RankInfo, RunConfig, TrainConfig
from distmoe.data.sampler import DataPosition
from distmoe.metrics.throughput import Clock
from distmoe.runtime import Runtime, StopSignal
from distmoe.train.profiling import Profiling
from distmoe.train.progress import Progress
from distmoe.train.trainer import Trainer, train


def finished(*, step: int, stopped: str, checkpoint_seconds: float, **facts: object) -> str:
    """What the summary is told."""
    assert checkpoint_seconds == 0.25
    return f"finished at {step}" + (f" by {stopped}" if stopped else "")


class FakeRun:
    """The parts of a run of three steps beside its trainer. ``signal_at``: the step in which a
    signal reaches the last rank only; ``late``: the other ranks have it when they save. ``done``:
    what this rank did."""

    def __init__(self, *, is_last_rank: bool, signal_at: int, late: bool) -> None:
        self.done: list[str | bool] = []
        self.signal, self.clock, self.saved_step = StopSignal(), Clock(), -1
        self.is_last_rank, self.signal_at, self.late = is_last_rank, signal_at, late

    def step(self, trainer: Trainer) -> None:
        trainer.done += 1
        if self.is_last_rank and trainer.done == self.signal_at:
            self.signal.received = 15

    def save(self, progress: Progress, *, expire: bool) -> None:
        assert expire
        self.saved_step = progress.done
        self.done.append("saved")
        if self.late:
            self.signal.received = 15

    def validate(self) -> None:
        dist.barrier()
        self.done.append("validated")

    def parts(self, *, traced: bool) -> dict[str, Any]:
        return {
            "engine": None,
            "recorder": None,
            "checkpoints": SimpleNamespace(
                store=self,
                save=self.save,
                finish=self.save,
                news=lambda: [],
                summary=lambda: "",
                lost_seconds=lambda: 0.25,
                check_last=lambda step: None,
            ),
            "data": SimpleNamespace(
                reached=lambda steps: DataPosition(steps, 16 * steps), unigram_entropy=6.0
            ),
            "reporter": SimpleNamespace(
                clock=self.clock,
                console=SimpleNamespace(line=self.done.append),
                finish=lambda **facts: self.done.append(finished(**facts)),
            ),
            "communication": SimpleNamespace(
                end_trace=lambda step: Path(f"steps-1-{step}.json") if traced else None
            ),
        }


def run_of(
    rank: int,
    world: int,
    *,
    signal_at: int,
    late: bool,
    minutes: float,
    traced: bool = False,
    folder: Path = Path("nowhere"),
) -> list[str | bool]:
    """What one rank of a `FakeRun` does."""
    fake = FakeRun(is_last_rank=rank == world - 1, signal_at=signal_at, late=late)
    train = TrainConfig(
        steps=3, max_minutes=minutes, validate_every=0, profile="1-3" if traced else ""
    )
    config = Config(run=RunConfig(dir=str(folder)), train=train)
    runtime = Runtime(RankInfo(rank=rank, world=world), torch.device("cpu"), dist.group.WORLD)
    profiling = Profiling(config, runtime)
    trainer = Trainer(config, runtime, profiling=profiling, **fake.parts(traced=traced))
    trainer._step = lambda: fake.step(trainer)  # type: ignore[method-assign]
    trainer._validate = fake.validate  # type: ignore[method-assign]
    if minutes and rank == 0:
        # This clock is the first that shows the limit.
        fake.clock.elapsed = lambda: 1e9 * (trainer.done >= 2)  # type: ignore[method-assign]
    fake.done.append(trainer.run(fake.signal))
    return fake.done


@pytest.mark.parametrize("late", [False, True])
def test_a_signal_to_one_rank_stops_all_alike(late: bool, tmp_path: Path) -> None:
    results = run_ranks(
        lambda rank: run_of(rank, 2, signal_at=1, late=late, minutes=0, folder=tmp_path), 2
    )
    line = "stopped by a signal at step 1 of 3; the same command goes on from here"
    assert results == [["saved", line, "finished at 1 by a signal", False]] * 2
    assert (tmp_path / "STOPPED").read_text() == "step 1 of 3\n"


def test_a_signal_in_the_last_step_leaves_nothing_to_do() -> None:
    results = run_ranks(lambda rank: run_of(rank, 2, signal_at=3, late=False, minutes=0), 2)
    assert results == [["saved", "finished at 3", True]] * 2


def test_a_signal_after_the_last_step_changes_nothing() -> None:
    results = run_ranks(lambda rank: run_of(rank, 2, signal_at=0, late=rank == 1, minutes=0), 2)
    assert results == [["saved", "validated", "finished at 3", True]] * 2


def test_the_time_limit_of_one_rank_stops_all_alike() -> None:
    results = run_ranks(lambda rank: run_of(rank, 2, signal_at=0, late=False, minutes=9), 2)
    line = "stopped by train.max_minutes at step 2 of 3; the same command goes on from here"
    assert results == [["saved", "validated", line, "finished at 2 by train.max_minutes", True]] * 2


def test_a_run_that_ends_inside_the_traced_steps_writes_them(tmp_path: Path) -> None:
    results = run_ranks(
        lambda rank: run_of(
            rank, 2, signal_at=2, late=False, minutes=0, traced=True, folder=tmp_path
        ),
        2,
    )
    for lines in results:
        assert lines[0] == "trace: steps-1-2.json, and beside it those of the other ranks"
        assert lines[1] == f"profiles up to step 2: {tmp_path}/profile, of ranks 0"
    assert (tmp_path / "profile" / "steps-1-2-rank-0.pt.trace.json.gz").exists()


def test_the_collector_does_not_look_at_what_is_there_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[int] = []

    class Recording(Trainer):
        def __init__(self) -> None:
            """Nothing is trained."""

        @classmethod
        def open(cls, *_: object) -> Recording:  # type: ignore[override]
            return cls()

        def tell(self, lines: list[str]) -> None:
            """Nobody listens."""

        def run(self, stop_signal: StopSignal) -> bool:
            kept.append(gc.get_freeze_count())
            return True

    runtime = Runtime(RankInfo(), torch.device("cpu"), None)
    monkeypatch.setattr("distmoe.train.trainer.runtime_room.start", lambda *_, **__: runtime)
    monkeypatch.setattr("distmoe.train.trainer._lock", lambda *_: (None, ""))
    monkeypatch.setattr("distmoe.train.trainer.Trainer", Recording)
    gc.unfreeze()
    try:
        train(Config(), RankInfo())
    finally:
        gc.freeze()
    assert kept[0] > 10_000
