"""A process of its own for what may hang or crash: libraries of devices and messages.

`python -m distmoe.launch.doctor.probe_process [FILE settings]` prints an answer a line, as JSON.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from distmoe.config import ConfigError, load_config, resolve
from distmoe.config.dtype import with_dtype
from distmoe.launch.env import rank_info
from distmoe.launch.worker import in_one_line

TIMEOUT_S = 8.0
"""For ranks that other ranks wait for."""


def torch_facts(arguments: Sequence[str]) -> dict[str, Any]:
    """What torch was built for, and the devices that it sees."""
    import torch
    import torch.distributed as dist

    found = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    devices = [
        {"name": d.name, "capability": [d.major, d.minor], "bytes": d.total_memory} for d in found
    ]
    return {
        "cuda": torch.version.cuda,
        "devices": devices,
        "gloo": dist.is_gloo_available(),
        "nccl": _nccl_version() if dist.is_nccl_available() else None,
    }


def _nccl_version() -> str:
    from torch.cuda import nccl

    numbers: tuple[int, ...] = nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, numbers))


def gloo_group(arguments: Sequence[str]) -> dict[str, Any]:
    """A group of all ranks that were started, a sum, and everybody's wall clock after a barrier."""
    import torch
    import torch.distributed as dist

    from distmoe.runtime import start, stop

    ranks, began = rank_info(), time.perf_counter()
    runtime = start(ranks, device="cpu", timeout_s=TIMEOUT_S, threads=1, engine="fsdp2")
    ones = torch.ones(1)
    dist.all_reduce(ones)
    if int(ones) != ranks.world:
        raise RuntimeError(f"the sum of {ranks.world} ones is {float(ones):g}")
    seconds = time.perf_counter() - began
    dist.barrier()
    clocks: list[Any] = [None] * ranks.world
    dist.all_gather_object(clocks, (socket.gethostname(), time.time()))
    stop(runtime)
    return {"ranks": ranks.world, "seconds": seconds, "clocks": clocks}


def nccl_group(arguments: Sequence[str]) -> dict[str, Any]:
    """A group of this process alone, and a sum on its device."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    device = torch.device("cuda", rank_info().local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    began = time.perf_counter()
    dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1, device_id=device)
    ones = torch.ones(1, device=device)
    dist.all_reduce(ones)
    torch.cuda.synchronize(device)
    dist.destroy_process_group()
    return {"seconds": time.perf_counter() - began}


def parameters(arguments: Sequence[str]) -> dict[str, Any]:
    """Parameters of the run's model."""
    from distmoe.metrics.flops import parameter_counts

    file, *settings = arguments
    config = resolve(load_config(file, settings))
    return {"count": parameter_counts(config.model, config.moe).total}


def tiles(arguments: Sequence[str]) -> dict[str, Any]:
    """The tile configurations of the run's expert kernels on the first device."""
    from distmoe.kernels.moe_mlp import backend_for
    from distmoe.kernels.moe_mlp.find_tiles import triton_version
    from distmoe.runtime import pick_device
    from distmoe.train.start import expert_shape, run_tiles

    file, *settings = arguments
    config = resolve(load_config(file, settings))
    device = pick_device(config.run.device, 0)
    kernel = backend_for(config.moe.kernel, device)
    try:
        table = run_tiles(config.moe, device)
    except ConfigError as error:
        return {"kernel": kernel, "wrong": str(error)}
    version, shape = triton_version(), expert_shape(with_dtype(config, device.type))
    old = bool(table.triton_versions - {version})
    return {"kernel": kernel, "wrong": "", "old": old, "seen": table.describe(version, shape)}


def mpi_facts(arguments: Sequence[str]) -> dict[str, Any]:
    """The library that mpi4py loads, started with this process alone."""
    from mpi4py import MPI

    # The name of the library is the first line; the rest is how it was built.
    words = MPI.Get_library_version().splitlines()[0].split()
    return {"library": " ".join(words), "ranks": MPI.COMM_WORLD.Get_size()}


PROBES: dict[str, Callable[[Sequence[str]], dict[str, Any]]] = {
    "torch": torch_facts,
    "gloo": gloo_group,
    "parameters": parameters,
    "tiles": tiles,
    # Last, as it is the one that hangs where drivers do.
    "nccl": nccl_group,
}
MPI_PROBES = {"mpi": mpi_facts}


def main(argv: Sequence[str]) -> None:
    """Answer all probes, or those of MPI."""
    probes = MPI_PROBES if list(argv) == ["--mpi"] else PROBES
    for name, probe in probes.items():
        try:
            answer = probe(argv)
        # Whatever it is, the next probe may have an answer.
        except Exception as error:
            answer = {"error": in_one_line(error)}
        print(json.dumps({"probe": name, "answer": answer}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
