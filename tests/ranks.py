"""Ranks as threads of this process, for distributed tests that take milliseconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

T = TypeVar("T")


def run_ranks(
    function: Callable[..., T], num_ranks: int, *args: Any, backend: str = "threaded"
) -> list[T]:
    """[function(rank, *args) for every rank], each in a thread with a process group of its own.
    ``backend``: `threaded` waits in every collective; `gloo` also has some that do not.

    The first error of any rank is raised again, naming the rank. Seeds are shared by all threads:
    draw inputs outside and pass them in.
    """
    results: list[Any] = [None] * num_ranks
    errors: dict[int, BaseException] = {}
    world = _install_threaded_pg()
    if not hasattr(world, "comms"):
        # destroy_process_group of torch 2.11 asks for it.
        world.comms = []
    # Group names are resolved per thread, or every rank would find rank 0's groups.
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    store = dist.HashStore()

    def run(rank: int) -> None:
        try:
            dist.init_process_group(backend, rank=rank, world_size=num_ranks, store=store)
            # On a GPU one thread would go back for all ranks, and wait in the first for the others.
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = function(rank, *args)
        except BaseException as error:  # noqa: BLE001
            errors[rank] = error
            ProcessLocalGroup.exception_handle(error)
        finally:
            if world.default_pg is not None:
                dist.destroy_process_group()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        ProcessLocalGroup.reset()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        _uninstall_threaded_pg()
    # The first in time: the others are ranks that its end woke up.
    for rank, error in errors.items():
        raise RuntimeError(f"rank {rank}: {type(error).__name__}: {error}") from error
    return results
