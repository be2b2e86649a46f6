"""What the driver of NVIDIA GPUs knows of them (NVML): the one file that imports pynvml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Bits of what lowers the clocks now, by nvml.h. Idling and clocks that an administrator has set are
# no trouble.
SLOWDOWNS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "too hot, by software",
    0x40: "too hot, by hardware",
    0x80: "power brake",
}


class NvmlError(RuntimeError):
    """NVML cannot be asked."""


@dataclass(frozen=True)
class Gpu:
    """A GPU. What the driver does not tell of it is None."""

    nvml: Any
    handle: Any

    def joules(self) -> float | None:
        """Used since the driver was loaded; the counter goes on every 20 to 100 ms."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def uuid(self) -> str | None:
        """That of CUDA, behind "GPU-"."""
        uuid: str | None = self._ask("nvmlDeviceGetUUID")
        return uuid

    def driver(self) -> str | None:
        version: str | None = _asked(self.nvml, "nvmlSystemGetDriverVersion")
        return version

    def used_bytes(self) -> int | None:
        """Of its memory, by all processes."""
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else memory.used

    def clock_mhz(self) -> tuple[int, int] | None:
        """Of its multiprocessors: now, and the highest."""
        now = self._ask("nvmlDeviceGetClockInfo", self.nvml.NVML_CLOCK_SM)
        most = self._ask("nvmlDeviceGetMaxClockInfo", self.nvml.NVML_CLOCK_SM)
        return None if now is None or most is None else (now, most)

    def slowdowns(self) -> list[str] | None:
        """What lowers its clocks now."""
        bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        return None if bits is None else [why for bit, why in SLOWDOWNS.items() if bits & bit]

    def watts(self) -> tuple[float, float] | None:
        """Limit in force, and the limit that the board comes with."""
        limit = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        default = self._ask("nvmlDeviceGetPowerManagementDefaultLimit")
        return None if limit is None or default is None else (limit / 1e3, default / 1e3)

    def celsius(self) -> int | None:
        heat: int | None = self._ask("nvmlDeviceGetTemperature", self.nvml.NVML_TEMPERATURE_GPU)
        return heat

    def uncorrected_errors(self) -> int | None:
        """Of memory (ECC), since the driver was loaded; None without ECC."""
        kinds = (self.nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, self.nvml.NVML_VOLATILE_ECC)
        errors: int | None = self._ask("nvmlDeviceGetTotalEccErrors", *kinds)
        return errors

    def broken_rows(self) -> tuple[bool, bool] | None:
        """Rows of memory that wait for a reset to be replaced; that could not be replaced."""
        rows = self._ask("nvmlDeviceGetRemappedRows")
        return None if rows is None else (bool(rows[2]), bool(rows[3]))

    def _ask(self, function: str, *arguments: Any) -> Any:
        return _asked(self.nvml, function, self.handle, *arguments)


def _asked(nvml: Any, function: str, *arguments: Any) -> Any:
    """None where the device does not support it, or the bindings are too old to have it."""
    try:
        return getattr(nvml, function)(*arguments)
    except (AttributeError, nvml.NVMLError):
        return None


def all_gpus() -> list[Gpu]:
    """Of this machine, in the driver's order. NvmlError if NVML cannot be asked."""
    nvml = _started()
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex
        return [Gpu(nvml, handle(index)) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        raise NvmlError(f"NVML lists no GPUs: {error}") from error


def _started() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise NvmlError("pynvml is missing: pip install 'distmoe[nvml]'") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlError(f"NVML does not start: {error}") from error
    return pynvml
