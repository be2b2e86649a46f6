"""A tiny run, and records of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from load_counts import FREQ_LE, load_counts
from tensorboard.summary.writer import event_file_writer

from distmoe.config import (
    Config,
    DataConfig,
    MetricsConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)
from distmoe.metrics.expert_load import IntArray, load_of_all, load_of_layer
from distmoe.metrics.record import (
    Energy,
    Learned,
    Slowest,
    Speed,
    StepRecord,
    StepTimes,
    Traffic,
)

TARGET_LE: IntArray = np.array([[4, 8, 0, 4], [0, 12, 4, 0]])


@pytest.fixture(autouse=True)
def _event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one process and second are read by their numbers as text, 10 before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """H 8, two heads of 4 and one of keys, one dense block and two with 4 experts, resolved."""
    return Config(
        run=RunConfig(name="tiny", dir=str(tmp_path / "run"), device="cpu"),
        model=ModelConfig(
            vocab_size=50,
            hidden_size=8,
            n_layers=3,
            n_dense_layers=1,
            n_heads=2,
            n_kv_heads=1,
            head_dim=4,
            intermediate_size=20,
        ),
        moe=MoEConfig(
            hidden_size=8, intermediate_size=6, num_experts=4, top_k=2, shared_intermediate_size=10
        ),
        data=DataConfig(seq_len=16),
        train=TrainConfig(steps=100, dtype="fp32"),
        metrics=MetricsConfig(log_every=1, expert_load_every=2),
    )


@pytest.fixture
def record() -> Callable[..., StepRecord]:
    """Makes the record of a step; every field can be given, by its name in the flat record."""
    counts = load_counts(FREQ_LE, TARGET_LE, tile=4, ranks=2)

    def make(step: int, **figures: object) -> StepRecord:
        base = StepRecord(
            step=step,
            ranks=2,
            warm_up=step <= 3,
            learned=Learned(2.0, 1.0, 2.0, lr=1e-3, grad_norm=0.5, skipped=False, tokens=14),
            times=StepTimes(0.1, 0.01, 0.07, 0.015, 0.02, 0.03),
            speed=Speed(70.0, 1.5, 2.0, math.nan, math.nan),
            energy=Energy(math.nan, math.nan, math.nan),
            slowest=Slowest(1.1, 1),
            memory_gib=0.5,
            traffic=Traffic(1.0, 2.0, 0.02, 0.2, 1.5, 0.5),
            load=load_of_all(counts),
            # After a dense block.
            layers={1 + row: load_of_layer(counts, row) for row in range(2)},
        )
        return with_figures(base, **figures)

    return make


def with_figures(record: StepRecord, **figures: object) -> StepRecord:
    """``record`` with other ``figures``, wherever in it they are."""
    own = {field.name for field in fields(record)}
    changed = {name: value for name, value in figures.items() if name in own}
    for part in ("learned", "times", "speed", "energy", "slowest", "traffic"):
        inner = getattr(record, part)
        names = {field.name for field in fields(inner)} & figures.keys()
        changed[part] = replace(inner, **{name: figures[name] for name in names})
    assert figures.keys() <= {*own, *record.flat()}
    return replace(record, **changed)  # type: ignore[arg-type]
