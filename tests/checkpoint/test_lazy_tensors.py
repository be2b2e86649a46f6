"""A checkpoint of tensors that are made one by one while it is written."""

import weakref
from pathlib import Path

import torch
from torch import Tensor

from distmoe.checkpoint.lazy_tensors import LazyTensors
from distmoe.checkpoint.manifest import damage
from distmoe.checkpoint.store import CheckpointStore
from distmoe.checkpoint.tensors import read_tensors, saved_tensors


def test_at_most_one_tensor_is_held_while_the_next_is_made(tmp_path: Path) -> None:
    made: list[weakref.ref[torch.UntypedStorage]] = []
    alive: list[int] = []

    def make(name: str) -> Tensor:
        alive.append(sum(reference() is not None for reference in made))
        tensor = torch.full((3, 4), float(name[-1]))
        # The storage is what counts, whoever holds it by another tensor.
        made.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    meta = {f"weight_{i}": torch.empty(3, 4, device="meta") for i in range(8)}
    store = CheckpointStore(tmp_path, group=None, keep_last=1, asynchronous=False)
    store.save(0, {"model": meta, "progress": {"done": 0}}, planner=LazyTensors(make))
    (path,) = store.complete()
    assert len(alive) == 8
    assert max(alive) <= 1
    assert damage(path) == []
    for name, tensor in read_tensors(path, saved_tensors(path, "model")).items():
        assert torch.equal(tensor, torch.full((3, 4), float(name[-1])))
