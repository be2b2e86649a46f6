"""A run of a few steps, on the screen and in the files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from load_counts import FREQ_LE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distmoe.config import Config, MetricsConfig, RoundingConfig
from distmoe.metrics.record import StepRecord
from distmoe.metrics.reporter import Reporter
from distmoe.metrics.summary import model_rows

Make = Callable[..., StepRecord]
Captured = pytest.CaptureFixture[str]


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def run(config: Config, record: Make, *, rank: int = 0, steps: range, resumed_step: int) -> None:
    reporter = Reporter.open(config, rank=rank, world=2, resumed_step=resumed_step)
    reporter.header([("mesh", "2 ranks")])
    for step in steps:
        reporter.step(record(step, loss=8.0 - step), FREQ_LE)
    reporter.validation(steps[-1], 3.5, 6.0, seconds=0.25)
    reporter.finish(step=steps[-1], unigram_entropy=6.0)
    reporter.close()
    reporter.close()


def test_a_run_on_the_screen(config: Config, record: Make, capsys: Captured) -> None:
    run(config, record, steps=range(1, 6), resumed_step=0)
    output = capsys.readouterr().out
    assert "\x1b" not in output
    lines = [line.split() for line in output.splitlines()]
    assert "model 0.0 M parameters, 0.0 M active".split() in lines
    assert "training loss 7.0000 (step 1) -> 3.0000 (step 5)".split() in lines
    below = "validation loss 3.5000, 2.5000 nats below the unigram entropy 6.0000"
    assert below.split() in lines
    speed = "median speed 70 tokens/s/rank on 2 ranks, 2 of 5 steps measured"
    assert speed.split() in lines
    assert "in all 12 M tokens a day".split() in lines
    assert "TFLOP/s/rank 1.5 (2 by the PaLM convention)".split() in lines
    slowest = "slowest rank 1.10x the mean's own time; most often rank 1"
    assert slowest.split() in lines
    # Of a tenth of a second: 10, 70 with 20 of exposed communication, and 15 ms.
    split = "step time data 10.0%, compute 50.0%, exposed 20.0%, optimizer 15.0%, rest 5.0%"
    assert split.split() in lines
    assert f"pictures tensorboard --logdir {config.run.dir}/tensorboard".split() in lines
    assert "MFU" not in output
    assert output.count("below 2 rounding costs quality") == 1
    assert "mean tokens per expert / tile is 0.88 in layer 1, the worst" in output
    assert output.count("experts of each layer at step 5") == 1
    assert output.count("experts of each layer") == 1


def test_layer_tables_now_and_then_and_once_at_the_end(
    config: Config, record: Make, capsys: Captured
) -> None:
    config = replace(config, metrics=MetricsConfig(tensorboard=False, layer_table_every=2))
    run(config, record, steps=range(1, 6), resumed_step=0)
    output = capsys.readouterr().out
    shown = [line.split()[-1] for line in output.splitlines() if "experts of each" in line]
    assert shown == ["2", "4", "5"]
    run(config, record, steps=range(6, 9), resumed_step=5)
    output = capsys.readouterr().out
    shown = [line.split()[-1] for line in output.splitlines() if "experts of each" in line]
    assert shown == ["6", "8"]


def test_no_layer_table_without_experts(config: Config, record: Make, capsys: Captured) -> None:
    config = replace(config, metrics=MetricsConfig(tensorboard=False, layer_table_every=2))
    load = replace(record(1).load, tokens_per_expert_over_tile=math.inf)
    run(config, partial(record, load=load, layers={}), steps=range(1, 6), resumed_step=0)
    assert "experts of each layer" not in capsys.readouterr().out


@pytest.mark.parametrize(("layers", "shown"), [(12, 12), (13, 8)])
def test_many_layers_are_cut_at_the_end_only(
    config: Config, record: Make, capsys: Captured, layers: int, shown: int
) -> None:
    config = replace(config, metrics=MetricsConfig(tensorboard=False, layer_table_every=2))

    def many(step: int, **fields: object) -> StepRecord:
        return record(step, layers=dict.fromkeys(range(layers), record(step).load), **fields)

    run(config, many, steps=range(1, 4), resumed_step=0)
    between, at_end = capsys.readouterr().out.split("experts of each layer at step ")[1:]
    assert (
        sum(line.split()[0].isdecimal() for line in between.splitlines()[2 : 2 + layers]) == layers
    )
    assert at_end.partition("done at step")[0].count("\n") == 2 + shown
    assert (f"the 8 worst of {layers} by tiles" in at_end) is (shown == 8)


def test_a_run_in_the_files(config: Config, record: Make) -> None:
    run(config, record, steps=range(1, 6), resumed_step=0)
    run(config, record, steps=range(4, 7), resumed_step=3)
    folder = Path(config.run.dir)
    assert steps_of(folder / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    assert steps_of(folder / "validation.jsonl") == [6]
    loads = [json.loads(line) for line in (folder / "expert_load.jsonl").read_text().splitlines()]
    assert [load["step"] for load in loads] == [2, 4, 6]
    assert loads[-1]["pairs"] == {"1": [3, 8, 1, 2], "2": [0, 10, 2, 2]}
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [s.step for s in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [i.step for i in events.Images("experts/load_layer_01_to_02_by_expert")] == [2, 4, 6]
    tag = "layers_tiles_max_over_mean/layer_01"
    assert [s.step for s in events.Scalars(tag)] == [2, 4, 6]
    assert [layer["layer"] for layer in loads[-1]["layers"]] == [1, 2]
    assert loads[-1]["layers"][1]["tokens_per_expert_over_tile"] is not None
    # With many layers their figures are most of a line, and every start reads some.
    assert '"layer' not in (folder / "metrics.jsonl").read_text()


def test_a_finished_run_that_is_called_again_adds_nothing(config: Config, record: Make) -> None:
    run(config, record, steps=range(1, 4), resumed_step=0)
    again = Reporter.open(config, rank=0, world=2, resumed_step=3)
    again.validation(3, 3.5, 6.0, seconds=0.25)
    again.finish(step=3, unigram_entropy=6.0)
    again.close()
    folder = Path(config.run.dir)
    assert steps_of(folder / "metrics.jsonl") == [1, 2, 3]
    assert steps_of(folder / "validation.jsonl") == [3]


def test_other_ranks_leave_no_trace(config: Config, record: Make, capsys: Captured) -> None:
    run(config, record, rank=1, steps=range(1, 4), resumed_step=0)
    assert capsys.readouterr().out == ""
    assert not Path(config.run.dir).exists()


def test_without_tensorboard(config: Config, record: Make, capsys: Captured) -> None:
    config = replace(config, metrics=MetricsConfig(tensorboard=False))
    run(config, record, steps=range(1, 4), resumed_step=0)
    assert not (Path(config.run.dir) / "tensorboard").exists()
    assert "tensorboard --logdir" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scope", "advice"),
    [
        ("ep", "larger micro-batches or ep, or a smaller"),
        ("rank", "moe.rounding.scope 'ep', larger micro-batches, or a smaller"),
    ],
)
def test_the_advice_fits_what_is_rounded_together(
    config: Config, record: Make, capsys: Captured, scope: str, advice: str
) -> None:
    rounding = replace(config.moe.rounding, scope=scope)  # type: ignore[arg-type]
    config = replace(config, moe=replace(config.moe, rounding=rounding))
    run(config, record, steps=range(1, 4), resumed_step=0)
    assert f"rounding costs quality: {advice} moe.rounding.tile" in capsys.readouterr().out


def test_no_warning_without_rounding(config: Config, record: Make, capsys: Captured) -> None:
    config = replace(config, moe=replace(config.moe, rounding=RoundingConfig(rule="none")))
    run(config, record, steps=range(1, 4), resumed_step=0)
    assert "warning:" not in capsys.readouterr().out


@pytest.mark.parametrize("router", ["balanced", "hash"])
def test_forced_routing_is_stamped_on_header_and_summary(
    config: Config, record: Make, capsys: Captured, router: str
) -> None:
    run(config, record, steps=range(1, 6), resumed_step=0)
    assert "FORCED" not in capsys.readouterr().out
    forced = replace(config, moe=replace(config.moe, router=router))
    run(forced, record, steps=range(6, 9), resumed_step=5)
    stamp = f"FORCED by router {router}: no real routing"
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines.count(f"routing {stamp}".split()) == 2
    events = EventAccumulator(f"{config.run.dir}/tensorboard").Reload()
    texts = events.Tensors("routing/text_summary")
    assert [(t.step, t.tensor_proto.string_val[0].decode()) for t in texts] == [(5, stamp)]


def test_the_header_names_a_capacity(config: Config) -> None:
    rounding = replace(config.moe.rounding, capacity_factor=1.25, capacity_of="rank")
    capped = replace(config, moe=replace(config.moe, rounding=rounding))
    experts = [dict(model_rows(one, peak=None))["experts"] for one in (config, capped)]
    assert experts[1] == experts[0] + ", no rank above 1.25 times the mean"


def test_skipped_steps_say_what_was_not_finite(
    config: Config, record: Make, capsys: Captured
) -> None:
    reporter = Reporter.open(config, rank=0, world=1, resumed_step=0)
    for step, what in ((1, "loss of rank 3, micro-batch 0"), (2, "")):
        reporter.step(record(step, skipped=bool(what), not_finite=what), FREQ_LE)
    reporter.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "SKIPPED, " in line] == [
        "step 1 is SKIPPED, without an update; not finite, first of all: "
        "loss of rank 3, micro-batch 0"
    ]


def test_validation_above_the_entropy_says_so(config: Config, capsys: Captured) -> None:
    reporter = Reporter.open(config, rank=0, world=1, resumed_step=0)
    reporter.validation(1, 8.0, 6.0, seconds=0.25)
    reporter.finish(step=1, unigram_entropy=6.0)
    reporter.close()
    assert "8.0000, 2.0000 nats ABOVE the unigram entropy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("Unknown GPU", "bf16", None),
    ],
)
def test_the_peak_is_known_or_none(
    config: Config, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    config = replace(
        config,
        run=replace(config.run, device="cuda"),
        train=replace(config.train, dtype=dtype),  # type: ignore[arg-type]
    )
    reporter = Reporter.open(config, rank=0, world=1, resumed_step=0)
    reporter.close()
    assert reporter.peak == peak
    (start, _) = (Path(config.run.dir) / "starts.jsonl").read_text().splitlines()
    assert (json.loads(start)["device"], json.loads(start)["peak_flops"]) == (name, peak)


def test_utilization_is_in_the_summary_and_the_curves(
    config: Config, record: Make, capsys: Captured
) -> None:
    known = partial(record, mfu=0.5, palm_mfu=0.625)
    run(config, known, steps=range(1, 6), resumed_step=0)
    assert "MFU 50.0% (62.5% by the PaLM convention)".split() in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]
    events = EventAccumulator(f"{config.run.dir}/tensorboard").Reload()
    assert [s.value for s in events.Scalars("throughput/mfu")] == [0.5] * 5


def test_an_end_that_cannot_be_written_is_told(
    config: Config, record: Make, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter = Reporter.open(config, rank=0, world=2, resumed_step=0)
    reporter.step(record(1), FREQ_LE)
    starts = Path(config.run.dir) / "starts.jsonl"
    starts.unlink()
    starts.mkdir()
    reporter.finish(step=1, unigram_entropy=6.0)
    reporter.close()
    words = f"starts.jsonl in {config.run.dir} is NOT written: [Errno 21] Is a directory"
    assert "".join(words.split()) in "".join(capsys.readouterr().out.split())


def test_starts_say_how_they_ended(config: Config, record: Make) -> None:
    run(config, record, steps=range(1, 4), resumed_step=0)
    failed = Reporter.open(config, rank=0, world=2, resumed_step=3)
    failed.step(record(4), FREQ_LE)
    failed.close()
    path = Path(config.run.dir) / "starts.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events] == [
        ("start", 0),
        ("end", 3),
        ("start", 3),
        ("end", 4),
    ]
    assert [e["stopped"] for e in events if e["event"] == "end"] == ["", "an error"]
    # Resumed from before the failed step, which is taken back; then begun anew.
    Reporter.open(config, rank=0, world=2, resumed_step=3)
    assert len(path.read_text().splitlines()) == 4
    Reporter.open(config, rank=0, world=2, resumed_step=0)
    assert len(path.read_text().splitlines()) == 1


def test_a_full_disk_is_told_once_and_loses_no_line(
    config: Config, record: Make, capsys: Captured
) -> None:
    path = Path(config.run.dir) / "metrics.jsonl"
    reporter = Reporter.open(config, rank=0, world=2, resumed_step=0)
    assert reporter._writers is not None
    writer = reporter._writers.steps
    reporter.step(record(1), FREQ_LE)
    descriptor = writer._file.fileno()
    spare = os.dup(descriptor)
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), descriptor)
    reporter.step(record(2), FREQ_LE)
    reporter.step(record(3), FREQ_LE)
    os.dup2(spare, descriptor)
    os.close(spare)
    reporter.step(record(4), FREQ_LE)
    reporter.close()
    words = f"metrics.jsonl in {config.run.dir} is NOT written: [Errno 28] No space left on device"
    assert "".join(capsys.readouterr().out.split()).count("".join(words.split())) == 1
    assert steps_of(path) == [1, 2, 3, 4]
