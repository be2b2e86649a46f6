"""A save that makes every tensor when it is written, and forgets it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex


class LazyTensors(DefaultSavePlanner):
    """For a state whose tensors lie on the meta device. ``make``: the tensor of a flat name such as
    ``model.embedding.weight``, of the shape and dtype that the meta tensor has."""

    def __init__(self, make: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._make = make

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = super().lookup_object(index)
        is_meta = isinstance(found, Tensor) and found.is_meta
        return self._make(index.fqn) if is_meta else found
