"""A real run records its routing, goes on recording when it is resumed, and is simulated."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from training_runs import config_file, finish, start

from distmoe.bench.routing_simulation import TOP_K, mean_outcomes, simulate, traced_scores
from distmoe.config import Config, ConfigError, apply_overrides, check
from distmoe.metrics.routing_trace import read_rank_trace, read_traces

# Two blocks with experts and two micro-batches, recomputed forwards and validations.
OPTIONS = ["--model.n_layers", "3", "--moe.num_experts", "8", "--moe.router", "softmax_topk"]
OPTIONS += ["--moe.bias_update_rate", "0", "--train.global_batch_size", "8"]
OPTIONS += ["--train.micro_batch_size", "2", "--train.activation_checkpoint", "full"]
OPTIONS += ["--train.validate_every", "2", "--train.validation_batches", "1"]


def train(config: Path, *options: str) -> str:
    return finish(start(config, *OPTIONS, *options))


@pytest.mark.processes
def test_the_next_steps_of_each_start_and_nothing_else(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "run" / "routing"
    config = config_file(tmp_path, data)
    output = train(config, "--train.steps", "4", "--train.record_routing", "3")
    assert f"{folder}, of the next 3 steps" in output
    assert "experts of each layer at step 4" in output
    steps = sorted({int(path.name[5:13]) for path in folder.iterdir()})
    assert steps == [1, 2, 3]
    # Two blocks with experts and two micro-batches: no validation and no recomputed forward.
    trace = read_rank_trace(folder, 2, 1)
    assert trace.facts.layers == (1, 2)
    assert trace.key_LMTE.shape == (2, 2, 64, 8)
    assert (
        len({np.bytes_(key_TE.tobytes()) for key_MTE in trace.key_LMTE for key_TE in key_MTE}) == 4
    )
    train(config, "--train.steps", "7", "--train.record_routing", "2")
    assert sorted({int(path.name[5:13]) for path in folder.iterdir()}) == [1, 2, 3, 5, 6]
    samples = [
        simulate(traced_scores(group), ["nearest", "balance"], ranks=group.ranks, tile=group.tile)
        for group in read_traces(folder)
    ]
    assert len(samples) == 5 * 2 * 2
    found = {outcome.name: outcome for outcome in mean_outcomes(samples)}
    assert found["balance"].busiest_tiles <= found["nearest"].busiest_tiles
    assert found["nearest"].busiest_tiles < found[TOP_K].busiest_tiles
    assert found["nearest"].waste == found["balance"].waste == 0 < found[TOP_K].waste


def complaints(folder: Path, steps: int) -> list[str]:
    overrides = [f"--run.dir={folder}", f"--train.record_routing={steps}"]
    try:
        check(apply_overrides(Config(), overrides), 1)
    except ConfigError as error:
        return [problem for problem in error.problems if "record_routing" in problem]
    return []


def test_a_folder_that_cannot_be_written_is_refused_before_the_start(tmp_path: Path) -> None:
    assert complaints(tmp_path / "new" / "run", 3) == []
    (tmp_path / "routing").write_text("a file where the folder should be")
    (problem,) = complaints(tmp_path, 3)
    assert problem == (
        f"train.record_routing is 3; it must be 0, or {tmp_path}/routing a folder that can be "
        f"written: {tmp_path}/routing cannot"
    )
    assert complaints(tmp_path, 0) == []


def test_a_closed_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is open to root, so the answer of the system is replaced."""
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "run")
    (problem,) = complaints(tmp_path / "run", 1)
    assert problem.endswith(f"a folder that can be written: {tmp_path}/run cannot")
