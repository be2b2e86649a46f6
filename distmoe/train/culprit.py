"""Who brought the first number that is not finite into a step.

Of every micro-batch a rank keeps whether a few numbers that it has anyway are finite. They stay on
the device, and are read only if the step is to be skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmoe.comm.heartbeat import ranks_in_words
from distmoe.model.transformer import LossSums, Transformer

NEVER = torch.iinfo(torch.int64).max


class Witness:
    """Of one step on this rank. What is seen in a micro-batch, in the order in which it is made:
    the router's logits of every MoE layer (by their z-loss), the loss, and the gradient that comes
    back to the embedding."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        config = model.config.model
        layers = range(config.n_dense_layers, config.n_layers)
        self._what = [f"router logits of layer {layer}" for layer in layers]
        self._what += ["loss", "gradient"]
        self._finite: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the forwards and backwards."""
        handle = self._model.embedding.register_forward_hook(self._embedded)
        try:
            yield
        finally:
            handle.remove()

    def forward(self, out: LossSums) -> None:
        """What a micro-batch's forward gave."""
        parts = [losses.z.detach() for losses in out.layers] + [out.token_loss.detach()]
        self._finite.append(torch.stack(parts).isfinite())

    def _embedded(self, module: nn.Module, inputs: object, embedded: Tensor) -> None:
        embedded.register_hook(self._gradient)  # type: ignore[no-untyped-call]

    def _gradient(self, gradient: Tensor) -> None:
        self._finite.append(gradient.isfinite().all()[None])

    def accuse(self, group: dist.ProcessGroup | None) -> str:
        """The first that was not finite on any rank, in words; collective. Waits for the device."""
        own = self._first()
        firsts = [own]
        if group is not None:
            gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, own, group=group)
            firsts = gathered
        times = [int(first) for first in firsts]
        if min(times) == NEVER:
            return "a weight's gradient, and nothing before it on any rank"
        ranks = [rank for rank, time in enumerate(times) if time == min(times)]
        micro_batch, what = divmod(min(times), len(self._what))
        return f"{self._what[what]} of {ranks_in_words(ranks)}, micro-batch {micro_batch}"

    def _first(self) -> Tensor:
        """0-d int64: the number of the first thing seen that was not finite."""
        finite = torch.cat(self._finite)
        number = torch.arange(len(finite), device=finite.device)
        return torch.where(finite, NEVER, number).min()
