"""Bytes that one MoE layer keeps for its backward, and the most it holds in between.

`keeps` is the formula; `measure` is what autograd and the allocations of a real layer say.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distmoe.moe.layer import MoE


@dataclass(frozen=True)
class ActivationShape:
    """T tokens, H, I and E experts of one layer on one rank, with ``pairs`` computed pairs and G
    the width of z. ``itemsize``: bytes of an activation."""

    T: int
    H: int
    I: int
    E: int
    G: int
    pairs: int
    itemsize: int = 2


def keeps(s: ActivationShape) -> dict[str, int]:
    """Bytes kept from forward to backward, by what they are; parameters are not among them.

    x is the layer's input, which the block before it holds anyway. Weight-sized terms (a bf16 copy
    of the expert weights where they are gathered, and their gradients) are 2 E (G + I) H bytes
    each and independent of the tokens: state them apart.
    """
    return {
        "x": s.itemsize * s.T * s.H,
        "z": s.itemsize * s.pairs * s.G,
        "pair index and scores": 4 * (3 * s.pairs + (s.T + 1) + (s.E + 1)),
        # Logits for the z-loss, scores, the top-k choice, two numbers a token, and where each pair
        # lies in [T, E].
        "router": s.T * s.E * (4 + 4 + 1) + 8 * s.T + 8 * s.pairs + 4 * s.E,
    }


def transient(s: ActivationShape) -> dict[str, int]:
    """Bytes that a pass adds at its widest point to what is kept, its results among them.

    Forward: a and y of every pair, and the output. Backward: dz and a_scaled of every pair, dx of
    the tokens, and beside them first dx of every pair, then the weight gradients.
    """
    rows = s.itemsize * s.T * s.H
    per_pair = s.itemsize * s.pairs
    gradients = s.itemsize * s.E * (s.G + s.I) * s.H
    return {
        "forward": per_pair * (s.I + s.H) + rows,
        "backward": per_pair * (s.G + s.I) + rows + max(per_pair * s.H, gradients),
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
        if self.now + size > self.peak:
            # The interpreter leaves reference cycles, which keep what a launch was given.
            gc.collect()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Measured:
    """Bytes of one forward and backward of a layer; parameters and the layer's input are apart.

    ``saved``: what autograd holds for the backward, by (dtype, shape). ``kept``: all that lives
    after the forward, but for its result. ``forward``, ``backward``: what a pass added to that at
    the most.
    """

    saved: dict[tuple[str, tuple[int, ...]], int]
    kept: int
    forward: int
    backward: int


def measure(layer: MoE, x_TH: Tensor, dout_TH: Tensor) -> Measured:
    """Runs ``layer`` once. Interpreted kernels allocate what compiled ones do."""
    saved = SavedTensors(layer)
    log = AllocationLog()
    log.ignore(*layer.parameters(), x_TH, dout_TH)
    with log:
        with saved.hooks():
            out_TH, losses = layer(x_TH)
        gc.collect()
        by_kind, result = saved.by_kind(), out_TH.untyped_storage().nbytes()
        kept = log.now - result
        forward, log.peak = log.peak - kept, log.now
        torch.autograd.backward([out_TH, losses.load_balance + losses.z], [dout_TH, None])
    return Measured(by_kind, kept, forward, log.peak - kept - result)


class SavedTensors:
    """What autograd is given to keep during a forward, each storage once, without parameters."""

    def __init__(self, layer: MoE) -> None:
        self._parameters = {p.untyped_storage()._cdata for p in layer.parameters()}
        self._tensors: dict[int, Tensor] = {}

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in self._parameters:
            self._tensors[storage] = tensor
        return tensor

    def by_kind(self) -> dict[tuple[str, tuple[int, ...]], int]:
        """Bytes by (dtype, shape), the largest first; lets the tensors go."""
        kinds: dict[tuple[str, tuple[int, ...]], int] = {}
        for tensor in self._tensors.values():
            kind = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            kinds[kind] = kinds.get(kind, 0) + tensor.untyped_storage().nbytes()
        self._tensors.clear()
        return dict(sorted(kinds.items(), key=lambda item: -item[1]))
