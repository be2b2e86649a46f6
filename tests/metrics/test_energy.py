"""Joules, from the driver's counter to the figures of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_nvml import FakeNvml, install
from load_counts import FREQ_LE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distmoe.config import Config
from distmoe.metrics.device_energy import meter_of
from distmoe.metrics.record import StepRecord
from distmoe.metrics.report.cli import main as report
from distmoe.metrics.reporter import Reporter
from distmoe.metrics.tally import Tally
from distmoe.metrics.throughput import Clock, RunPart, no_meter

Make = Callable[..., StepRecord]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def second_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's device, whose number is not that of the driver."""
    device = SimpleNamespace(uuid="2b")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)


def test_the_counter_is_that_of_the_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [{"UUID": f"GPU-{n}", "TotalEnergyConsumption": j} for n, j in (("1a", 7), ("2b", 4500))]
    install(monkeypatch, FakeNvml(*gpus))
    read = meter_of(CUDA)
    assert read() == 4.5
    gpus[1]["TotalEnergyConsumption"] = 6000
    assert read() == 6.0
    del gpus[1]["TotalEnergyConsumption"]
    assert math.isnan(read())


@pytest.mark.parametrize(
    ("nvml", "device"),
    [
        (None, CUDA),
        (FakeNvml({"UUID": "GPU-2b"}, starts=False), CUDA),
        (FakeNvml({"UUID": "GPU-other"}), CUDA),
        (FakeNvml({"UUID": "GPU-2b", "TotalEnergyConsumption": 1}), torch.device("cpu")),
    ],
    ids=["no pynvml", "no driver", "unknown GPU", "CPU"],
)
def test_without_a_counter(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None, device: torch.device
) -> None:
    install(monkeypatch, nvml)
    assert meter_of(device) is no_meter


def test_a_lap_has_the_joules_of_its_step_alone() -> None:
    # Begin; lap 1; validation from 130 to 190; lap 2.
    joules = iter([100.0, 120.0, 130.0, 190.0, 205.0])
    clock = Clock(lambda: next(joules))
    clock.begin()
    with clock.part(RunPart.TRAINING):
        pass
    assert clock.lap().joules == 20.0
    with clock.part(RunPart.VALIDATION):
        pass
    assert clock.lap().joules == 25.0


def test_a_counter_that_fails_once_costs_two_steps() -> None:
    joules = iter([1.0, math.nan, 3.0, 7.0])
    clock = Clock(lambda: next(joules))
    clock.begin()
    assert math.isnan(clock.lap().joules)
    assert math.isnan(clock.lap().joules)
    assert clock.lap().joules == 4.0
    clock = Clock()
    clock.begin()
    assert math.isnan(clock.lap().joules)


def test_figures_of_a_run_are_sums_over_sums(record: Make) -> None:
    # 14 tokens in 0.1 s of 2 ranks each; the counter moves in every second step only.
    joules = [90.0, math.nan, math.nan, 0.0, 20.0, math.nan, 50.0]
    tally = Tally()
    for step, used in enumerate(joules, 1):
        tally.add(record(step, energy_joules=used).flat())
    figures = tally.figures()
    assert figures.joules == 160.0
    # Steps 4, 5 and 7, after the warm-up.
    assert figures.energy.energy_joules == 70.0
    assert figures.energy.tokens_per_joule == 3 * 14 / 70
    assert figures.energy.watts_per_rank == pytest.approx(70 / (3 * 0.2))
    tally = Tally()
    tally.add({**record(1).flat(), "energy_joules": None})
    assert math.isnan(tally.figures().joules)
    assert math.isnan(tally.figures().energy.tokens_per_joule)


def test_energy_in_the_files_and_on_the_screen(
    config: Config, record: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {}
    for name, fields in (
        ("known", {"energy_joules": 7.2e4, "watts_per_rank": 3.6e5, "tokens_per_joule": 2e-4}),
        ("unknown", {}),
    ):
        folder = tmp_path / name
        own = replace(config, run=replace(config.run, dir=str(folder)))
        reporter = Reporter.open(own, rank=0, world=2, resumed_step=0)
        for step in range(1, 6):
            reporter.step(record(step, **fields), FREQ_LE)
        reporter.finish(step=5, unigram_entropy=6.0)
        reporter.close()
        (folder / "config.toml").write_text("")
        line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        assert line["energy_joules"] == fields.get("energy_joules")
        tags = EventAccumulator(str(folder / "tensorboard")).Reload().Tags()["scalars"]
        assert ("energy/watts_per_rank" in tags) is bool(fields)
        assert report([str(folder), "--json", str(tmp_path / "report.json")]) == 0
        figures[name] = json.loads((tmp_path / "report.json").read_text())["runs"][0]["figures"]
    assert figures["known"]["energy_kwh"] == 0.1
    assert figures["known"]["watts_per_rank"] == pytest.approx(3.6e5)
    assert figures["known"]["tokens_per_joule"] == pytest.approx(14 / 7.2e4)
    for name in ("energy_kwh", "watts_per_rank", "tokens_per_joule"):
        assert figures["unknown"][name] is None
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert (
        lines.count("energy 360,000 W/rank, 0.000194 tokens/J, 0.1 kWh in the steps".split()) == 1
    )
