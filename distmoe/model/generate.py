"""Text, token by token, for a quick look at a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from distmoe.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    tokens: list[int],
    *,
    count: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """At most ``count`` tokens after ``tokens``, until one of ``stop``, which is not given.

    ``temperature`` 0: always the likeliest. Routing is plain top-k. There is no cache of keys and
    values: every token computes the whole sequence again.
    """
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    sequence = list(tokens)
    for _ in range(count):
        logits_BSV = model(torch.tensor([sequence], device=device))
        token = _pick(logits_BSV[0, -1].float().cpu(), temperature, generator)
        if token in stop:
            return
        sequence.append(token)
        yield token


def _pick(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    prob_V = torch.softmax(logits_V / temperature, 0)
    return int(torch.multinomial(prob_V, 1, generator=generator))
