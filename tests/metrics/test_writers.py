"""Files that are read back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distmoe.metrics.record import (
    GROUPS,
    OF_SOME_STEPS,
    CorpusProgress,
    StepRecord,
    ValidationRecord,
)
from distmoe.metrics.writers import LAYOUT, JsonlWriter, TensorBoardWriter

Make = Callable[..., StepRecord]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, records: list[StepRecord], *, resumed_step: int = 0) -> None:
    writer = JsonlWriter.open(path, resumed_step=resumed_step)
    for record in records:
        writer.write(record.line())
    writer.close()


def test_jsonl_has_each_step_once_after_a_resume(tmp_path: Path, record: Make) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [record(step) for step in (1, 2, 3)])
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    write(path, [record(3, loss=math.nan)], resumed_step=2)
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    assert [line["loss"] for line in lines(path)] == [2.0, 2.0, None]


def test_numbers_that_json_lacks_are_null_in_layers_too(tmp_path: Path, record: Make) -> None:
    load = replace(record(1).load, tokens_per_expert_over_tile=math.inf, pairs_added=5)
    writer = JsonlWriter.open(tmp_path / "expert_load.jsonl", resumed_step=0)
    writer.write(record(1, layers={3: load}).load_line(np.array([[1, 2]])))
    writer.close()
    (line,) = lines(tmp_path / "expert_load.jsonl")
    (layer,) = line["layers"]
    assert (layer["layer"], layer["tokens_per_expert_over_tile"]) == (3, None)
    assert layer["pairs_added"] == 5


def test_a_step_that_the_file_has_is_not_written_again(tmp_path: Path, record: Make) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [record(1), record(2)])
    write(path, [record(2, loss=9.0), record(3)], resumed_step=2)
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(1, 2), (2, 2), (3, 2)]


def test_a_new_run_starts_an_empty_file(tmp_path: Path, record: Make) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [record(1), record(2)])
    write(path, [], resumed_step=0)
    assert path.read_text() == ""
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("rubbish", ["", "{", "3", "[1]", "null", '{"step": "x"}', '{"loss": 1}'])
def test_a_line_that_is_no_step_is_cut(tmp_path: Path, record: Make, rubbish: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [record(1)])
    with path.open("a") as file:
        file.write(rubbish + "\n")
    write(path, [record(2)], resumed_step=1)
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_every_line_is_on_disk_at_once(tmp_path: Path, record: Make) -> None:
    writer = JsonlWriter.open(tmp_path / "metrics.jsonl", resumed_step=0)
    writer.write(record(1).flat())
    assert len(lines(tmp_path / "metrics.jsonl")) == 1
    writer.close()


def events(path: Path) -> EventAccumulator:
    return EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()


def test_tensorboard_reads_back(tmp_path: Path, record: Make) -> None:
    writer = TensorBoardWriter.open(tmp_path, resumed_step=0)
    writer.write(record(1, corpora=(CorpusProgress("data/a", 7, 0.25),)))
    writer.experts(record(1), np.array([[3, 8, 1, 2], [0, 10, 2, 2]]))
    writer.write(ValidationRecord(1, 1.5, 6.0, 0.25, {"data/a": 1.25}))
    writer.close()
    read = events(tmp_path)
    tags = read.Tags()
    names = {f"{group}/{name}" for group, fields in GROUPS.items() for name in fields}
    # Of a device without a known peak, which counts no joules.
    missing = set(OF_SOME_STEPS) - {"slowest_over_mean", "slowest_rank"}
    names = {name for name in names if name.partition("/")[2] not in missing}
    layers = {f"layers_{name}/layer_{n:02d}" for name in GROUPS["experts"] for n in (1, 2)}
    assert set(tags["scalars"]) == names | layers | {
        "validation/loss",
        "validation_loss/data/a",
        "corpora_samples/data/a",
        "corpora_epochs/data/a",
    }
    assert read.Scalars("corpora_epochs/data/a")[0].value == 0.25
    assert read.Scalars("validation_loss/data/a")[0].value == 1.25
    assert read.Scalars("layers_pairs_added/layer_02")[0].value == 4
    assert tags["images"] == ["experts/load_layer_01_to_02_by_expert"]
    assert tags["histograms"] == ["experts/load_layer_01", "experts/load_layer_02"]
    assert read.Scalars("train/loss")[0].value == 2.0
    image = read.Images("experts/load_layer_01_to_02_by_expert")[0]
    assert (image.width, image.height) == (4 * 32, 2 * 32)


def test_tensorboard_forgets_the_steps_that_a_resume_repeats(tmp_path: Path, record: Make) -> None:
    first = TensorBoardWriter.open(tmp_path, resumed_step=0)
    for step in (1, 2, 3):
        first.write(record(step))
    first.close()
    second = TensorBoardWriter.open(tmp_path, resumed_step=2)
    second.write(record(3, loss=5.0))
    second.close()
    scalars = events(tmp_path).Scalars("train/loss")
    assert [(s.step, s.value) for s in scalars] == [(1, 2.0), (2, 2.0), (3, 5.0)]


def test_layout_names_what_is_written(tmp_path: Path) -> None:
    TensorBoardWriter.open(tmp_path, resumed_step=0).close()
    assert "custom_scalars__config__" in events(tmp_path).Tags()["tensors"]
    written = {f"{group}/{name}" for group, fields in GROUPS.items() for name in fields}
    written.add("validation/loss")
    written |= {f"layers_{name}/layer_01" for name in GROUPS["experts"]}
    for _, tags in LAYOUT["distmoe"].values():
        for tag in tags:
            assert any(re.fullmatch(tag, name) for name in written), tag


def test_a_model_without_experts_has_no_pictures(tmp_path: Path, record: Make) -> None:
    writer = TensorBoardWriter.open(tmp_path, resumed_step=0)
    writer.experts(record(1, layers={}), np.zeros((0, 4), dtype=np.int64))
    writer.close()
    assert events(tmp_path).Tags()["images"] == []
