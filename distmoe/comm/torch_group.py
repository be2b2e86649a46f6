"""What users of a torch.distributed group share: its default, its ranks, its backend, and small
collectives; and how a group for rows is made."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from distmoe.comm.transport import Transport

# Its name before torch 2.13.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def check_group(name: str, group: dist.ProcessGroup | None) -> None:
    """ValueError if ``group``, given as ``name``, is no group, or one that this rank is not in."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        outside = group == dist.GroupMember.NON_GROUP_MEMBER
        what = "a group without this rank" if outside else repr(group)
        raise ValueError(f"{name} is {what}; it must be None or a ProcessGroup with this rank")


def several_ranks(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """``group``, by default all ranks if a process group exists; None where it is one rank."""
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    return None if group is None or dist.get_world_size(group) == 1 else group


def row_backend(group: dist.ProcessGroup | None) -> str:
    """The backend that carries the rows of ``group``: that of the GPU, where there is one. A group
    may have another for the host."""
    config = str(dist.get_backend_config(group))
    by_device = dict(part.split(":") for part in config.split(","))
    on_gpu = torch.cuda.is_available() and "cuda" in by_device
    return by_device["cuda" if on_gpu else "cpu"]


def new_row_group(ranks: Sequence[int], *, timeout_s: float | None = None) -> dist.ProcessGroup:
    """A communicator of its own for the rows among ``ranks``, which includes this one; collective
    over them (on NCCL, which splits the default communicator, over all ranks). ``timeout_s``: of a
    wait; a new group does not inherit that of the default one."""
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    group: dist.ProcessGroup = dist.new_group(
        list(ranks),
        timeout=timeout,
        pg_options=_before_gemms(timeout) if row_backend(None) == "nccl" else None,
        use_local_synchronization=True,
    )
    return group


def limit_waits(group: dist.ProcessGroup, timeout_s: float) -> None:
    """End a wait of ``group`` after ``timeout_s``: groups that others make, a mesh or DeepSpeed, do
    not inherit that of the default one either."""
    if any(name in str(dist.get_backend_config(group)) for name in ("gloo", "nccl")):
        _set_pg_timeout(timedelta(seconds=timeout_s), group)


def _before_gemms(timeout: timedelta | None) -> Any:
    """Options of NCCL. Its blocks take the next place on an SM that a block of a GEMM leaves,
    before the GEMM's own blocks that still wait for one. Persistent GEMMs (`moe.kernel = "gluon"`)
    leave none before their end: they keep SMs free."""
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    if timeout is not None:
        # Or torch warns that the group's own is another one.
        options._timeout = timeout
    return options


class TorchGroup(Transport):
    """A transport over ``group``, whose all-gather and all-reduce are torch's own."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_process_group_ranks(group))
        self.group = group

    def _gather(self, x: Tensor) -> Tensor:
        # Of one tensor: NCCL would copy P parts, one by one.
        gathered = x.new_empty(self.size * x.numel())
        all_gather_single(gathered, x.reshape(-1), group=self.group)
        return gathered.view(self.size, *x.shape)

    def _sum(self, x: Tensor) -> Tensor:
        summed = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=self.group)
        return summed


def num_bytes(rows: Tensor) -> int:
    """Bytes that ``rows`` has on the wire."""
    return rows.numel() * rows.element_size()
