"""The tensors of a checkpoint, one by one and whole, in one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load


@dataclass(frozen=True)
class SavedTensor:
    """``shape``: the logical one. ``pieces``: parts in which the ranks wrote it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def saved_tensors(path: Path, room: str = "") -> list[SavedTensor]:
    """The tensors of checkpoint ``path``, by name; of one ``room`` (model, optimizer) or of all."""
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    return [
        SavedTensor(name, tuple(entry.size), entry.properties.dtype, len(entry.chunks))
        for name, entry in sorted(saved.items())
        if isinstance(entry, TensorStorageMetadata) and name.startswith(f"{room}." if room else "")
    ]


def read_tensors(path: Path, wanted: list[SavedTensor]) -> dict[str, Tensor]:
    """Whole tensors of checkpoint ``path`` in host memory, by name."""
    tensors = {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in wanted}
    dcp_load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return tensors


def in_parts(tensors: list[SavedTensor], max_bytes: int) -> Iterator[list[SavedTensor]]:
    """Runs of tensors of at most ``max_bytes``; a larger tensor is a run of its own."""
    part: list[SavedTensor] = []
    for tensor in tensors:
        if part and sum(other.bytes for other in part) + tensor.bytes > max_bytes:
            yield part
            part = []
        part.append(tensor)
    yield part
