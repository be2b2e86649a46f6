"""Folders as runs leave them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from load_counts import FREQ_LE

from distmoe.config import Config, MetricsConfig, RunConfig, to_toml
from distmoe.metrics.record import StepRecord
from distmoe.metrics.reporter import Reporter


@pytest.fixture
def make_run(
    config: Config, record: Callable[..., StepRecord], tmp_path: Path
) -> Callable[..., Path]:
    """Makes the folder of a run of 8 steps, resumed after the fourth, whose figures all differ;
    ``ended`` False: of one that is still in its last step."""

    def make(name: str, *, ended: bool = True, top_k: int = 2) -> Path:
        folder = tmp_path / name
        own = replace(
            config,
            run=RunConfig(name=name, dir=str(folder), device="cpu"),
            metrics=MetricsConfig(tensorboard=False, expert_load_every=2),
            moe=replace(config.moe, top_k=top_k),
        )
        for first, last in ((1, 4), (5, 8)):
            reporter = Reporter.open(own, rank=0, world=2, resumed_step=first - 1)
            for step in range(first, last + 1):
                fields = {n: v * (1 + 0.1 * step) for n, v in TIMES.items()}
                fields["warm_up"] = step < first + 3
                fields["loss"] = float("nan") if step == 4 else 8.0 - step
                reporter.step(record(step, skipped=step == 4, **fields), FREQ_LE * step)
            if not ended and last == 8:
                break
            reporter.validation(last, 4.0 - last / 10, 6.0, seconds=0.3 * last)
            reporter.finish(
                step=last,
                unigram_entropy=6.0,
                checkpoint_seconds=0.4,
                stopped="a signal" if last == 4 else "",
            )
            reporter.close()
        (folder / "config.toml").write_text(to_toml(own))
        return folder

    return make


TIMES = {
    "step_seconds": 1.0,
    "data_seconds": 0.1,
    "forward_backward_seconds": 0.6,
    "optimizer_seconds": 0.2,
    "exposed_seconds": 0.05,
    "checkpoint_seconds": 0.01,
    "tokens_per_second_per_rank": 70.0,
    "tflops_per_rank": 1.5,
    "slowest_over_mean": 1.1,
    "memory_gib": 0.5,
}
