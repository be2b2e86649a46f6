"""GPUs and their driver: what torch sees, and what the driver says of their state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from distmoe.launch.doctor.finding import Finding, failed, passed, skipped, warned
from distmoe.launch.doctor.probes import ProbeError
from distmoe.launch.doctor.situation import Check, Situation
from distmoe.metrics.nvml import Gpu, NvmlError

Value = TypeVar("Value")

GIB = 1 << 30
# bf16 products, and what the Triton kernels are compiled for ahead of time.
OLDEST = (8, 0)
# Of a GPU that nobody else uses: a display, and the context of the probe.
IDLE_BYTES = 2 * GIB
# Above it boards lower their clocks.
HOT_CELSIUS = 85


def gpus(situation: Situation) -> Finding:
    """How many, of which kind; all alike."""
    try:
        facts = situation.probes.answer("torch")
    except ProbeError as error:
        return failed(f"torch cannot tell: {error}", "python -c 'import torch; torch.cuda.init()'")
    devices = facts["devices"]
    if not devices:
        return _no_gpu(situation, facts["cuda"])
    kinds = Counter(
        f"{d['name']} (sm_{d['capability'][0]}{d['capability'][1]}, {d['bytes'] / GIB:.0f} GiB)"
        for d in devices
    )
    seen = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
    if min(tuple(d["capability"]) for d in devices) < OLDEST:
        return warned(f"{seen}; older than sm_80", "moe.kernel = 'torch', train.dtype = 'fp32'")
    if len(kinds) > 1:
        return warned(f"{seen}; the slowest sets the pace", "CUDA_VISIBLE_DEVICES with one kind")
    return passed(seen)


def _no_gpu(situation: Situation, built_for: str | None) -> Finding:
    try:
        present = len(situation.gpus())
    except NvmlError:
        present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if present and built_for is None:
        return failed(f"{present} GPUs here, and a torch without CUDA", "a torch with CUDA")
    if present:
        return failed(
            f"{present} GPUs here, and torch (CUDA {built_for}) sees none",
            "a newer driver for this CUDA, or no empty CUDA_VISIBLE_DEVICES",
        )
    if situation.wants_gpu:
        return failed("none, and run.device is 'cuda'", "run on a machine with GPUs")
    return skipped("no NVIDIA GPU here: a run takes the CPU")


def driver(situation: Situation) -> Finding:
    """Its version, and the CUDA that torch brings."""
    found = situation.gpus()
    if not found:
        return skipped("the driver has no GPU")
    built_for = situation.probes.answer("torch")["cuda"]
    return passed(f"{found[0].driver() or 'of unknown version'}; torch has CUDA {built_for}")


def memory_in_use(situation: Situation) -> Finding:
    used = [gpu.used_bytes() for gpu in situation.gpus()]
    busy = {n: size for n, size in enumerate(used) if size is not None and size > IDLE_BYTES}
    if busy:
        sizes = ", ".join(f"GPU {n}: {size / GIB:.1f} GiB" for n, size in busy.items())
        return warned(f"in use before the run: {sizes}", "nvidia-smi names the processes")
    return _known(used, "nobody else uses them")


def errors(situation: Situation) -> Finding:
    """Of the memory: uncorrected ones, and rows that wait for a reset or are beyond repair."""
    counts = _by_gpu(situation.gpus(), Gpu.uncorrected_errors)
    rows = _by_gpu(situation.gpus(), Gpu.broken_rows)
    bad = [f"GPU {n}: {count} uncorrected errors" for n, count in counts.items() if count]
    bad += [f"GPU {n}: a row cannot be replaced" for n, row in rows.items() if row and row[1]]
    if bad:
        return failed("; ".join(bad), "drain the node and have the board looked at")
    pending = [str(n) for n, row in rows.items() if row and row[0]]
    if pending:
        return warned(f"rows to be replaced on GPU {', '.join(pending)}", "reset these GPUs")
    return _known(counts.values(), "no uncorrected error")


def slowdowns(situation: Situation) -> Finding:
    """Clocks that are lowered now, by heat or power."""
    found = situation.gpus()
    reasons = _by_gpu(found, Gpu.slowdowns)
    slow = [f"GPU {n}: {', '.join(why)}" for n, why in reasons.items() if why]
    hot = [
        f"GPU {n}: {heat} C"
        for n, heat in _by_gpu(found, Gpu.celsius).items()
        if heat is not None and heat >= HOT_CELSIUS
    ]
    if slow or hot:
        return warned("; ".join(slow + hot), "look at cooling and power limits: nvidia-smi -q")
    return _known(reasons.values(), "none")


def clocks(situation: Situation) -> Finding:
    """Of the multiprocessors; all GPUs have the same highest one."""
    known = [clock for clock in _by_gpu(situation.gpus(), Gpu.clock_mhz).values() if clock]
    if not known:
        return skipped("NVML does not tell")
    seen = ", ".join(f"{now}/{most}" for now, most in known) + " MHz now/highest"
    if len({most for _, most in known}) > 1:
        return warned(f"{seen}: they differ", "nvidia-smi --reset-gpu-clocks on all")
    return passed(seen)


def power_limits(situation: Situation) -> Finding:
    watts = {n: both for n, both in _by_gpu(situation.gpus(), Gpu.watts).items() if both}
    low = [f"GPU {n}: {now:.0f} of {full:.0f} W" for n, (now, full) in watts.items() if now < full]
    if low:
        return warned("; ".join(low), "nvidia-smi --power-limit=WATTS, if cooling allows")
    if not watts:
        return skipped("NVML does not tell")
    return passed(f"{', '.join(f'{now:.0f}' for now, _ in watts.values())} W, as the boards come")


def energy(situation: Situation) -> Finding:
    """Whether the run will have joules."""
    joules = list(_by_gpu(situation.gpus(), Gpu.joules).values())
    if joules and None not in joules:
        return passed("counted by every GPU: energy_joules in metrics.jsonl")
    return skipped("not every GPU counts joules; metrics.jsonl has null")


def _by_gpu(found: Iterable[Gpu], ask: Callable[[Gpu], Value]) -> dict[int, Value]:
    return {n: ask(gpu) for n, gpu in enumerate(found)}


def _known(values: Iterable[object], seen: str) -> Finding:
    """Passed, if any of ``values`` is known."""
    known = any(value is not None for value in values)
    return passed(seen) if known else skipped("NVML does not tell")


CHECKS: dict[str, Check] = {
    "gpus": gpus,
    "driver": driver,
    "memory in use": memory_in_use,
    "memory errors": errors,
    "slowdowns": slowdowns,
    "clocks": clocks,
    "power limits": power_limits,
    "energy": energy,
}
