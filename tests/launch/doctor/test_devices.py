"""GPUs as torch and the driver tell of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fake_nvml import FakeNvml, healthy, install
from launch_doctor import DEVICE, Answers, torch_with

from distmoe.config import Config, RunConfig
from distmoe.launch.doctor import devices
from distmoe.launch.doctor.examine import finding_of
from distmoe.launch.doctor.finding import Status
from distmoe.launch.doctor.situation import Situation

Make = Callable[..., Situation]
GPU_RUN = Config(run=RunConfig(device="cuda"))
HOT = {"CurrentClocksThrottleReasons": 0x41, "Temperature": 91}


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"probes": torch_with(DEVICE, DEVICE)}, "pass", "2 x NVIDIA H200 (sm_90, 140 GiB)"),
        ({"probes": torch_with({**DEVICE, "capability": [7, 0]})}, "warn", "older than sm_80"),
        (
            {"probes": torch_with(DEVICE, {**DEVICE, "name": "NVIDIA H100 NVL"})},
            "warn",
            "1 x NVIDIA H100 NVL (sm_90, 140 GiB); the slowest sets the pace",
        ),
        ({"probes": Answers(torch="no answer in 11 s")}, "fail", "no answer in 11 s"),
        ({}, "skip", "no NVIDIA GPU here"),
        ({"config": GPU_RUN}, "fail", "none, and run.device is 'cuda'"),
        ({"gpus": lambda: [1, 2]}, "fail", "2 GPUs here, and torch (CUDA 13.0) sees none"),
        (
            {"gpus": lambda: [1], "probes": torch_with(cuda=None)},
            "fail",
            "1 GPUs here, and a torch without CUDA",
        ),
    ],
)
def test_what_torch_sees(
    situation: Make,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    status: str,
    words: str,
) -> None:
    install(monkeypatch, FakeNvml())
    finding = devices.gpus(situation(**fields))
    assert finding.status == status
    assert words in finding.seen


@pytest.mark.parametrize(
    ("check", "second", "status", "words"),
    [
        ("driver", {}, "pass", "580.65.06; torch has CUDA 13.0"),
        ("memory in use", {}, "pass", "nobody else"),
        ("memory in use", {"MemoryInfo": SimpleNamespace(used=3 << 30)}, "warn", "GPU 1: 3.0 GiB"),
        ("memory errors", {}, "pass", "no uncorrected error"),
        ("memory errors", {"TotalEccErrors": 3}, "fail", "GPU 1: 3 uncorrected errors"),
        ("memory errors", {"RemappedRows": [0, 0, 1, 0]}, "warn", "to be replaced on GPU 1"),
        (
            "memory errors",
            {"RemappedRows": [0, 9, 0, 1]},
            "fail",
            "GPU 1: a row cannot be replaced",
        ),
        ("slowdowns", {}, "pass", "none"),
        ("slowdowns", HOT, "warn", "GPU 1: too hot, by hardware; GPU 1: 91 C"),
        ("clocks", {}, "pass", "345/1980, 345/1980 MHz now/highest"),
        ("clocks", {"MaxClockInfo": 1410}, "warn", "345/1410 MHz now/highest: they differ"),
        ("power limits", {}, "pass", "700, 700 W, as the boards come"),
        ("power limits", {"EnforcedPowerLimit": 500_000}, "warn", "GPU 1: 500 of 700 W"),
        ("energy", {}, "pass", "counted by every GPU"),
    ],
)
def test_what_the_driver_says(
    situation: Make,
    monkeypatch: pytest.MonkeyPatch,
    check: str,
    second: dict[str, Any],
    status: str,
    words: str,
) -> None:
    install(monkeypatch, FakeNvml(healthy(), healthy(**second)))
    finding = finding_of(devices.CHECKS[check], situation())
    assert finding.status == status
    assert words in finding.seen


@pytest.mark.parametrize("check", list(devices.CHECKS)[2:])
def test_what_the_driver_does_not_say_is_skipped(
    situation: Make, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    install(monkeypatch, FakeNvml({}))
    assert finding_of(devices.CHECKS[check], situation()).status == Status.SKIP
    install(monkeypatch, FakeNvml(starts=False))
    finding = finding_of(devices.CHECKS[check], situation())
    assert (finding.status, finding.seen) == ("skip", "NVML does not start: Driver Not Loaded")
    install(monkeypatch, None)
    assert "pip install 'distmoe[nvml]'" in finding_of(devices.CHECKS[check], situation()).seen
