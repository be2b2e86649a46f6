"""A run with run.deterministic, and whether its operators would be refused on a GPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import train_here
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distmoe.config import Config, RankInfo, RunConfig
from distmoe.launch import worker
from distmoe.train import trainer

# Of those that torch.use_deterministic_algorithms refuses on CUDA, without those of images, and
# with those, last, that it refuses for some arguments only.
REFUSED = (
    "aten.put_",
    "aten.histc",
    "aten.kthvalue",
    "aten.median.dim",
    "aten.nll_loss2d",
    "aten._embedding_bag",
    "aten.index_reduce",
    "aten.scatter_reduce",
    "aten._ctc_loss",
)
SHORT = "--train.steps 2 --data.document_mask true --moe.rounding.capacity_factor 1.5".split()


def is_refused(func: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func.startswith("aten.cumsum"):
        return isinstance(args[0], Tensor) and args[0].is_floating_point()
    if func.startswith("aten.bincount"):
        return len(args) > 1 or kwargs.get("weights") is not None
    return func.startswith(REFUSED)


class Operators(TorchDispatchMode):
    """What is called inside, and what of it would be refused."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()
        self.refused: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.add(str(func))
        if is_refused(str(func), args, kwargs or {}):
            self.refused.add(str(func))
        return func(*args, **(kwargs or {}))


def test_a_run_under_the_flag(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, flags, operators = trainer.train_step, [], Operators()

    def watched(*args: Any, **kwargs: Any) -> Any:
        flags.append(torch.are_deterministic_algorithms_enabled())
        flags.append(torch.backends.cudnn.deterministic)
        with operators:
            return step(*args, **kwargs)

    def losses(name: str, *options: str) -> list[tuple[float, float]]:
        (tmp_path / name).mkdir()
        train_here(tmp_path / name, data, *SHORT, *options)
        lines = map(json.loads, (tmp_path / name / "run/metrics.jsonl").open())
        return [(line["loss"], line["grad_norm"]) for line in lines]

    plain = losses("plain")
    monkeypatch.setattr(trainer, "train_step", watched)
    # What is not written holds NaN under the flag: nothing reads it.
    assert losses("deterministic", "--run.deterministic", "true") == plain
    assert flags == [True] * 4
    assert not torch.are_deterministic_algorithms_enabled()
    assert "aten.mm.default" in operators.called
    assert operators.refused == set()


def test_cublas_and_the_compiler_are_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC")
    seen: list[list[str | None]] = []

    def train(config: Config, ranks: RankInfo) -> bool:
        seen.append([os.environ.get(name) for name in names])
        return True

    def run_rank(command: str, ranks: RankInfo, work: Callable[[], int], *, debug: bool) -> int:
        return work()

    monkeypatch.setattr(trainer, "train", train)
    # Without what it does to the process.
    monkeypatch.setattr(worker, "run_rank", run_rank)
    monkeypatch.setenv(names[0], ":16:8")
    monkeypatch.setenv(names[1], "0")
    for name in names:
        monkeypatch.delenv(name)
    for deterministic in (False, True):
        worker.run_worker(Config(run=RunConfig(deterministic=deterministic)), RankInfo())
    monkeypatch.setenv(names[0], ":16:8")
    worker.run_worker(Config(run=RunConfig(deterministic=True)), RankInfo())
    assert seen == [[None, None], [":4096:8", "1"], [":16:8", "1"]]
