"""pynvml of a machine with GPUs that a test describes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest


class NVMLError(Exception):
    """Of the fake."""


class FakeNvml:
    """``gpus``: the answers of each by name of the function, without `nvmlDeviceGet`; what is not
    there is not supported."""

    NVMLError = NVMLError
    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0

    def __init__(self, *gpus: dict[str, Any], starts: bool = True) -> None:
        self.gpus, self.starts = gpus, starts

    def nvmlInit(self) -> None:
        if not self.starts:
            raise NVMLError("Driver Not Loaded")

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def __getattr__(self, function: str) -> Any:
        name = function.removeprefix("nvmlDeviceGet")
        if name == function:
            raise AttributeError(function)

        def ask(handle: int, *arguments: int) -> Any:
            if name not in self.gpus[handle]:
                raise NVMLError("Not Supported")
            return self.gpus[handle][name]

        return ask


def healthy(**answers: Any) -> dict[str, Any]:
    """A GPU in good order, but for ``answers``."""
    return {
        "Name": "NVIDIA H200",
        "TotalEnergyConsumption": 5_000,
        "MemoryInfo": SimpleNamespace(used=1 << 20),
        "ClockInfo": 345,
        "MaxClockInfo": 1980,
        "CurrentClocksThrottleReasons": 0x1,
        "EnforcedPowerLimit": 700_000,
        "PowerManagementDefaultLimit": 700_000,
        "Temperature": 40,
        "TotalEccErrors": 0,
        "RemappedRows": [0, 0, 0, 0],
        **answers,
    }


def install(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None) -> None:
    """As the package pynvml; None: there is none."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
