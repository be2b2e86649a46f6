"""Environment variables that change how torch, CUDA and NCCL work."""

from __future__ import annotations

from functools import partial

from distmoe.launch.doctor.finding import Finding, failed, passed, skipped, warned
from distmoe.launch.doctor.network import interfaces
from distmoe.launch.doctor.situation import Check, Situation

# Variable -> the value that hurts a run, and how.
HURTFUL = {
    "NCCL_P2P_DISABLE": ("1", "GPUs of a node exchange through the host"),
    "NCCL_SHM_DISABLE": ("1", "ranks of a node exchange through the network"),
    "NCCL_IB_DISABLE": ("1", "nodes exchange over TCP"),
    "NCCL_DEBUG": ("TRACE", "NCCL writes a line for every call"),
    "TORCH_NCCL_BLOCKING_WAIT": ("1", "the host waits in every collective, nothing overlaps"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("0", "ranks hang when a peer is lost"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "every collective is checked by another one"),
    "CUDA_LAUNCH_BLOCKING": ("1", "the host waits for every kernel, nothing overlaps"),
    "CUDA_DEVICE_MAX_CONNECTIONS": ("1", "all streams of a GPU share a queue, little overlaps"),
    "TRITON_INTERPRET": ("1", "Triton kernels run in Python"),
    "TORCHDYNAMO_DISABLE": ("1", "torch.compile does nothing"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1", "every tensor is allocated by the driver"),
}
PREFIXES = ("NCCL_", "TORCH_", "CUDA_", "GLOO_", "OMP_", "PYTORCH_", "TRITON_")
"""What is told, of all variables."""
CHOSEN = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def hurtful(situation: Situation) -> Finding:
    found = {
        name: why
        for name, (value, why) in HURTFUL.items()
        if situation.variables.get(name, "").upper() == value
    }
    if found:
        seen = "; ".join(f"{name}={situation.variables[name]}: {w}" for name, w in found.items())
        return warned(seen, f"unset {' '.join(found)}")
    return passed("none of those that slow a run down or make it hang")


def are_set(situation: Situation) -> Finding:
    """All that a run of these libraries reads, for whoever reads this report."""
    names = sorted(name for name in situation.variables if name.startswith(PREFIXES))
    if not names:
        return passed(f"none of {', '.join(f'{prefix}*' for prefix in PREFIXES)}")
    return passed(", ".join(f"{name}={situation.variables[name]}" for name in names))


def visible_devices(situation: Situation) -> Finding:
    name = "CUDA_VISIBLE_DEVICES"
    value = situation.variables.get(name)
    if value is None:
        return passed("not set: every GPU of the machine")
    shown = [device for device in value.split(",") if device.strip() not in ("", "-1")]
    if not shown and situation.wants_gpu:
        return failed(f"'{value}' hides all GPUs, and run.device is 'cuda'", f"unset {name}")
    if not shown:
        return warned(f"'{value}' hides all GPUs", f"unset {name}")
    if len(shown) < situation.local_world:
        return warned(
            f"{len(shown)} GPUs for {situation.local_world} ranks of this machine",
            f"let every rank see all GPUs: unset {name}",
        )
    return passed(value)


def interface(situation: Situation, *, name: str) -> Finding:
    """That a chosen network interface is here; `^` and `=` are NCCL's own."""
    value = situation.variables.get(name)
    if not value:
        return skipped("not set: see `network`")
    here = [found.name for found in interfaces()]
    if value.startswith("^"):
        return passed(f"all but {value[1:]}, of {', '.join(here)}")
    for wanted in value.lstrip("=").split(","):
        # NCCL takes the start of a name, gloo the whole.
        exact = value.startswith("=") or name.startswith("GLOO")
        if not any(one == wanted if exact else one.startswith(wanted) for one in here):
            return failed(f"'{wanted}' is not here: {', '.join(here)}", f"export {name}={here[-1]}")
    return passed(value)


CHECKS: dict[str, Check] = {
    "set": are_set,
    "hurtful": hurtful,
    "CUDA_VISIBLE_DEVICES": visible_devices,
    **{name: partial(interface, name=name) for name in CHOSEN},
}
