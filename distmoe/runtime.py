"""What a rank needs before training: device, process group, threads, stop signals."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from distmoe.config import RankInfo

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Runtime:
    """``group`` is None for one rank alone."""

    ranks: RankInfo
    device: torch.device
    group: dist.ProcessGroup | None


def pick_device(name: str, local_rank: int) -> torch.device:
    """``auto`` is cuda if a GPU is present. ValueError if cuda was asked for and is missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is 'cuda'; no CUDA device is here; allowed: auto, cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def start(ranks: RankInfo, *, device: str, timeout_s: float, threads: int, engine: str) -> Runtime:
    """Set the device, the threads, and, for several ranks or a sharding engine, the group."""
    picked = pick_device(device, ranks.local_rank)
    if threads:
        torch.set_num_threads(threads)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if ranks.world == 1 and engine == "single":
        return Runtime(ranks, picked, None)
    backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
    alone = ranks.world == 1
    # Under torchrun the agent serves the store, under a name of its own for every restart.
    from_environment = ranks.source == "torchrun"
    address = None if alone else f"tcp://{ranks.master_addr}:{ranks.master_port}"
    dist.init_process_group(
        backend,
        init_method="env://" if from_environment and not alone else address,
        store=HashStore() if alone else None,
        rank=-1 if from_environment and not alone else ranks.rank,
        world_size=-1 if from_environment and not alone else ranks.world,
        timeout=timedelta(seconds=timeout_s),
        device_id=picked if picked.type == "cuda" else None,
    )
    return Runtime(ranks, picked, dist.group.WORLD)


def default_store() -> Store:
    """The store through which the ranks of the process group have met."""
    store: Store = _get_default_store()
    return store


def stop(runtime: Runtime) -> None:
    """Leave together. A gloo thread that frees its last tensor while the interpreter shuts down
    aborts the process, so garbage goes first, then everybody meets, then the groups."""
    if runtime.group is None:
        return
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@dataclass
class StopSignal:
    """Ctrl-C, SIGTERM and SIGUSR1 ask for an orderly end; a second Ctrl-C ends at once."""

    received: int = 0
    _previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = field(
        default_factory=dict
    )

    def install(self) -> None:
        """Take over the signals; only in the main thread."""
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def any_rank(flag: bool, runtime: Runtime) -> bool:
    """Whether ``flag`` is set on any rank, so that all take the same turn; collective."""
    if runtime.group is None:
        return flag
    flags = torch.tensor(int(flag), device=runtime.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)
