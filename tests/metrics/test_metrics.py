"""Figures by hand-made numbers; files read back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distmoe.config import Config, DataConfig, ModelConfig, MoEConfig
from distmoe.metrics.console import RunConsole
from distmoe.metrics.expert_load import expert_load, heat_map
from distmoe.metrics.flops import flops_per_token, parameter_counts
from distmoe.metrics.record import GROUPS, StepRecord
from distmoe.metrics.throughput import (
    median_step_seconds,
    slowest_over_mean,
    tokens_per_second_per_rank,
)
from distmoe.metrics.writers import JsonlWriter, TensorBoardWriter
from distmoe.model.transformer import Transformer

CONFIG = Config(
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
)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(tied: bool) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, tie_embeddings=tied))
    counts = parameter_counts(config)
    with torch.device("meta"):
        model = Transformer(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    # Two MoE layers leave two of four experts of 3 H I each aside.
    assert counts.total - counts.active == 2 * 2 * 3 * 8 * 6


def test_flops() -> None:
    counts, flops = parameter_counts(CONFIG), flops_per_token(CONFIG)
    attention = 12 * 3 * 2 * 4 * 16
    assert flops.palm == 6 * (counts.active - 50 * 8) + attention
    assert flops.causal == flops.palm - attention // 2


def test_expert_load_by_hand() -> None:
    """Tile 4, two ranks with two experts each: top-k pads 1 + 0 + 3 + 2 of 20 rows."""
    freq, target = np.array([[3, 8, 1, 2]]), np.array([[4, 8, 0, 4]])
    load = expert_load(freq, target, tile=4, num_ranks=2)
    assert load.load_max_over_mean == pytest.approx(8 / 3.5)
    assert load.tiles_max_over_mean == pytest.approx(3 / 2)
    assert load.tile_waste == 0
    assert load.tile_waste_unrounded == pytest.approx(6 / 20)
    assert load.tokens_per_expert_over_tile == pytest.approx(3.5 / 4)
    assert load.dead_experts == 0


def test_heat_map_shows_load() -> None:
    image = heat_map(np.array([[0, 10], [5, 5]]), cell=2)
    assert image.shape == (4, 4, 3)
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[0, 3].tolist() == [8, 48, 107]
    assert (image[3, 0] == image[3, 3]).all()


def test_throughput_by_hand() -> None:
    assert tokens_per_second_per_rank(4096, 2.0, 4) == 512
    assert median_step_seconds([9.0, 9.0, 9.0, 1.0, 3.0, 2.0]) == 2.0
    assert median_step_seconds([4.0]) == 4.0
    assert slowest_over_mean([1.0, 1.0, 4.0]) == 2.0


def record(step: int, loss: float = 2.0) -> StepRecord:
    freq = np.array([[3, 8, 1, 2]])
    return StepRecord(
        step=step,
        loss=loss,
        load_balance_loss=1.0,
        z_loss=2.0,
        lr=1e-3,
        grad_norm=0.5,
        skipped=False,
        tokens=14,
        step_seconds=0.1,
        data_seconds=0.01,
        tokens_per_second_per_rank=70.0,
        slowest_over_mean=1.1,
        memory_gib=0.5,
        pairs=14,
        pairs_dropped=1,
        pairs_added=3,
        tokens_without_expert=0,
        rows_mib=1.0,
        rows_mib_with_copies=2.0,
        load=expert_load(freq, freq, tile=4, num_ranks=1),
    )


def test_jsonl_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlWriter(path, resumed_step=0)
    for step in (1, 2, 3):
        first.write(record(step).flat())
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    second = JsonlWriter(path, resumed_step=2)
    second.write(record(3, loss=math.nan).flat())
    second.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == [2.0, 2.0, None]


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, resumed_step=0)
    writer.write(record(1))
    writer.expert_load(1, np.array([[3, 8, 1, 2]]))
    writer.validation(1, 1.5)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    names = {f"{group}/{name}" for group, fields in GROUPS.items() for name in fields}
    assert set(tags["scalars"]) == names | {"validation/loss"}
    assert tags["images"] == ["experts/load_layer_by_expert"]
    assert tags["histograms"] == ["experts/load_layer_0"]
    assert events.Scalars("train/loss")[0].value == 2.0


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole(enabled=True, steps=100, first_step=0)
    console.table("title", [("a", "x" * 200), ("longer", "y")])
    console.step(record(7))
    console.warn_once("careful")
    console.warn_once("careful")
    console.close()
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "\r" not in output
    assert "  a       " + "x" * 200 in output.splitlines()
    assert output.count("careful") == 1
    assert "step   7/100  loss 2.0000" in output
    assert "moved 28.6%" in output


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole(enabled=False, steps=100, first_step=0)
    console.step(record(7))
    console.table("title", [("a", "b")])
    assert capsys.readouterr().out == ""
