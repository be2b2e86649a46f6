"""What a rank needs before training: device, process group, threads, stop signals."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from distmoe import __version__
from distmoe.comm.rendezvous import meet
from distmoe.config import ConfigError, RankInfo

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Runtime:
    """``group`` is None for one rank alone."""

    ranks: RankInfo
    device: torch.device
    group: dist.ProcessGroup | None


def pick_device(name: str, local_rank: int, *, local_world: int = 0) -> torch.device:
    """``auto`` is cuda if a GPU is present. ConfigError if cuda was asked for and is missing, or if
    a machine has fewer GPUs than its ``local_world`` ranks."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is 'cuda'; no CUDA device is here; allowed: auto, cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_world > gpus:
        raise ConfigError(
            f"run.device is '{name}'; {local_world} ranks of a machine need a GPU each, and "
            f"{gpus} can be seen; start fewer, or let every rank see all GPUs of its machine "
            "(srun: --gpus-per-node, not --gpus-per-task)"
        )
    return torch.device("cuda", local_rank)


def start(
    ranks: RankInfo,
    *,
    device: str,
    timeout_s: float,
    threads: int,
    engine: str,
    facts: Callable[[torch.device], Mapping[str, str]] | None = None,
    problem: str = "",
) -> Runtime:
    """Set the device, the threads, and, for several ranks or a sharding engine, the group.

    ``facts``: of this rank with its device; ConfigError if it cannot take part, as for a
    ``problem`` that it has already. ConfigError, too, if a rank has no device, or if the ranks
    differ in their facts, the kind of their device or a version.
    """
    picked, own = torch.device("cpu"), dict[str, str]()
    try:
        if problem:
            raise ConfigError(problem)
        picked = pick_device(device, ranks.local_rank, local_world=ranks.local_world)
        _use(picked)
        own = {"the device": picked.type, **_versions(), **(facts(picked) if facts else {})}
    except ConfigError as error:
        if ranks.world == 1:
            raise
        # Told to all ranks, of which one has to tell the user.
        problem = str(error)
    if threads:
        torch.set_num_threads(threads)
    if ranks.world == 1 and engine == "single":
        return Runtime(ranks, picked, None)
    store: Store = HashStore()
    if ranks.world > 1:
        store = meet(ranks, own, timeout_s=timeout_s, problem=problem)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=timedelta(seconds=timeout_s),
        device_id=picked if picked.type == "cuda" else None,
    )
    return Runtime(ranks, picked, dist.group.WORLD)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Inside, if ``wanted``, torch takes operators that give the same bits in every run, and raises
    a RuntimeError at one that cannot. Around `start`: a process group of NCCL that is made inside
    leaves out reductions in the switch, whose order is not fixed. cuBLAS and the compiler need
    `launch.env.export_determinism` before."""
    cudnn, before = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    flags = cudnn.deterministic, cudnn.benchmark
    if wanted:
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        cudnn.deterministic, cudnn.benchmark = flags


def _use(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _versions() -> dict[str, str]:
    return {"the version of distmoe": __version__, "the version of torch": str(torch.__version__)}


def keep_all_objects() -> None:
    """From here on Python's collector looks at new objects only. Over all that torch and its
    compilers have made it takes some hundred milliseconds, in another step on every rank, and all
    ranks wait for the one that collects."""
    gc.collect()
    gc.freeze()


def default_store() -> Store:
    """The store through which the ranks of the process group have met."""
    store: Store = _get_default_store()
    return store


def stop(runtime: Runtime) -> None:
    """Leave together. A gloo thread that frees its last tensor while the interpreter shuts down
    aborts the process, so garbage goes first, then everybody meets, then the groups."""
    if runtime.group is None:
        return
    gc.unfreeze()
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@dataclass
class StopSignal:
    """Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP, of a terminal that is gone, ask for an orderly end; a
    second Ctrl-C ends at once."""

    received: int = 0
    # Not shown: `signal.signal` makes the repr of a handler, and these may be notes of an earlier
    # one, which has them, too.
    _previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = field(
        default_factory=dict, repr=False
    )

    def install(self) -> None:
        """Take over the signals; only in the main thread."""
        for number in STOP_SIGNALS:
            # Under nohup it stays ignored.
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
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
