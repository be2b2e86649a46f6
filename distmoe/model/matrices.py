"""Which weights of a model are matrices, for optimizers that look at whole matrices.

A weight [rows, columns] of a block is one, a weight [e, rows, columns] is one for every expert.
Where several are computed as one product, they lie below one another in one weight, and count by
themselves: gate and up. Embedding, head and router are none: their rows belong to single tokens
and experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from distmoe.model.transformer import Transformer
from distmoe.moe.layer import MoE


def matrix_rows(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Name of a weight -> rows of each of the matrices in it, from the first row on.

    A module that stacks matrices says so by ``stacked_rows``: name of a parameter below it -> rows.
    """
    stacked = {
        f"{path}.{name}": rows
        for path, module in _modules(model)
        for name, rows in getattr(module, "stacked_rows", {}).items()
    }
    found = {}
    for path, module in _modules(model):
        # The parameter that an MoE layer has itself is its router.
        if not isinstance(module, MoE):
            for name, parameter in module.named_parameters(path, recurse=False):
                if parameter.ndim > 1:
                    found[name] = stacked.get(name, (int(parameter.shape[-2]),))
    return found


def _modules(model: Transformer) -> Iterator[tuple[str, Any]]:
    blocks: nn.ModuleList = model.blocks
    yield from blocks.named_modules(prefix="blocks")
