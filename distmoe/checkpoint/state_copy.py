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
        if isinstance(value, DTensor):
            return DTensor.from_local(
                self._copy(value.to_local(), key),
                value.device_mesh,
                value.placements,
                run_check=False,
                shape=value.shape,
                stride=value.stride(),
            )
        if isinstance(value, Tensor):
            return self._place(key, value).copy_(value.detach(), non_blocking=True)
        return value

    def _place(self, key: tuple[str, ...], like: Tensor) -> Tensor:
        held = self._memory.get(key)
        if held is None or held.shape != like.shape or held.dtype != like.dtype:
            held = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._memory[key] = held
        return held
