"""The copy of a state from which an asynchronous save writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class StateCopy:
    """Host memory for one copy, used again by the next: fresh memory costs more than the copy.

    Copies of CUDA tensors lie in pinned memory, as much as this rank's part of the state.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, ...], Tensor] = {}

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """The same nest with its tensors in host memory; DTensors keep their mesh. Valid until the
        next call. Waits until the copy is done."""
        copied: dict[str, Any] = self._copy(state, ())
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, value: Any, key: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {name: self._copy(item, (*key, name)) for name, item in value.items()}
        if isinstance(value, Tensor):
            held = self._place(key, value)
            _local(held).copy_(_local(value), non_blocking=True)
            return held
        return value

    def _place(self, key: tuple[str, ...], like: Tensor) -> Tensor:
        held = self._memory.get(key)
        if held is None or held.shape != like.shape or held.dtype != like.dtype:
            # Not DTensor.from_local, which moves what it gets to the device of the mesh.
            held = torch.empty_like(
                like.detach(),
                device="cpu",
                pin_memory=like.is_cuda,
                memory_format=torch.contiguous_format,
            )
            self._memory[key] = held
        return held


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
