"""Bytes that one MoE layer keeps for its backward, and the most it holds in between.

`keeps` is the formula; `measure` is what autograd and the allocations of a real layer say.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class LayerShape:
    """T tokens, H, I, E experts and K of one layer on one rank, with ``pairs`` computed pairs and
    G the width of z. ``itemsize``: bytes of an activation."""

    T: int
    H: int
    I: int
    E: int
    K: int
    G: int
    pairs: int
    itemsize: int = 2


def keeps(s: LayerShape) -> dict[str, int]:
    """Bytes kept from forward to backward, by what they are; parameters are not among them.

    x is the layer's input, which the block before it holds anyway. Weight-sized terms (a bf16 copy
    of the expert weights where they are gathered, and their gradients) are 2 E (G + I) H bytes
    each and independent of the tokens: state them apart.
    """
    return {
        "x": s.itemsize * s.T * s.H,
        "z": s.itemsize * s.pairs * s.G,
        "pair index and scores": 4 * (3 * s.pairs + (s.T + 1) + (s.E + 1)),
    }


def transient(s: LayerShape) -> dict[str, int]:
    """Bytes that exist only inside a pass, at its widest point, without weight gradients.

    Forward: a and y of every pair, beside the output. Backward: dz, a_scaled and dx of every pair,
    beside dout and dx of the tokens.
    """
    rows = s.itemsize * s.T * s.H
    per_pair = s.itemsize * s.pairs
    return {
        "forward": per_pair * (s.I + s.H) + rows,
        "backward": per_pair * (s.G + s.I + s.H) + 2 * rows,
    }


class AllocationLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operators made while the mode is on: now, and at the most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def ignore(self, *tensors: Tensor) -> None:
        """Storages that existed before do not count."""
        self._known |= {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
