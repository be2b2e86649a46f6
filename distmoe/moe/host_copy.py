"""Small integers between host and device, without a stand-still of either.

A size that only the device knows is copied as soon as it is decided and waited for as late as
possible: work that is enqueued in between runs while the host waits, and while it then enqueues
what depends on the size. The only file of the layer that waits for a device.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmoe.moe.int_array import IntArray


class HostCopy:
    """Integer tensors on their way to the host, in one copy into page-locked memory."""

    def __init__(self, *parts: Tensor) -> None:
        self._shapes = [part.shape for part in parts]
        flat = torch.cat([part.reshape(-1).long() for part in parts])
        self._copied: torch.cuda.Event | None = None
        self._host = flat
        if flat.is_cuda:
            self._host = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> list[IntArray]:
        """The parts, int64, in the shapes that they had."""
        if self._copied is not None:
            self._copied.synchronize()
        sizes = [shape.numel() for shape in self._shapes]
        parts = torch.split(self._host, sizes)
        return [part.view(shape).numpy() for part, shape in zip(parts, self._shapes, strict=True)]


def to_device(array: NDArray[np.integer], device: torch.device) -> Tensor:
    """A small array, enqueued."""
    return enqueued(torch.from_numpy(array), device)


def enqueued(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on ``device``, after what is enqueued there; a copy from memory that is not
    page-locked would make the host wait for all of it."""
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def ints(sizes: NDArray[np.integer]) -> list[int]:
    """Plain integers of what is on the host."""
    plain: list[int] = sizes.reshape(-1).tolist()
    return plain
