"""A tiny run, and records of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from load_counts import load_counts

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
from distmoe.metrics.record import StepRecord

# Layer 1 has an expert without tokens.
FREQ_LE: IntArray = np.array([[3, 8, 1, 2], [0, 10, 2, 2]])
TARGET_LE: IntArray = np.array([[4, 8, 0, 4], [0, 12, 4, 0]])


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
        train=TrainConfig(steps=100),
        metrics=MetricsConfig(log_every=1, expert_load_every=2),
    )


@pytest.fixture
def record() -> Callable[..., StepRecord]:
    """Makes the record of a step; every field can be given."""
    counts = load_counts(FREQ_LE, TARGET_LE, tile=4, ranks=2)

    def make(step: int, **fields: object) -> StepRecord:
        base = StepRecord(
            step=step,
            loss=2.0,
            load_balance_loss=1.0,
            z_loss=2.0,
            lr=1e-3,
            grad_norm=0.5,
            skipped=False,
            tokens=14,
            ranks=2,
            warm_up=step <= 3,
            step_seconds=0.1,
            data_seconds=0.01,
            forward_backward_seconds=0.07,
            optimizer_seconds=0.015,
            checkpoint_seconds=0.02,
            validation_seconds=0.03,
            tokens_per_second_per_rank=70.0,
            tflops_per_rank=1.5,
            palm_tflops_per_rank=2.0,
            mfu=math.nan,
            palm_mfu=math.nan,
            energy_joules=math.nan,
            watts_per_rank=math.nan,
            tokens_per_joule=math.nan,
            slowest_over_mean=1.1,
            slowest_rank=1,
            memory_gib=0.5,
            rows_mib=1.0,
            rows_mib_with_copies=2.0,
            exposed_seconds=0.02,
            exposed_share=0.2,
            node_mib=1.5,
            remote_mib=0.5,
            load=load_of_all(counts),
            # After a dense block.
            layers={1 + row: load_of_layer(counts, row) for row in range(2)},
        )
        return replace(base, **fields)  # type: ignore[arg-type]

    return make
