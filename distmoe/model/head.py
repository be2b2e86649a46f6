"""The output head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from distmoe.model.linear_cross_entropy import chunk_cross_entropy, linear_cross_entropy


class Head(nn.Linear):
    """Logits, or the loss made of them. The loss is made here, so that whoever gathers a module's
    parameters before its forward does it once for all chunks."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        # `compile_dense` puts a compiled one in its place.
        self.chunk_loss = chunk_cross_entropy

    def forward(self, x: Tensor, label_T: Tensor | None = None, *, chunk_tokens: int = 0) -> Tensor:
        """Logits [..., V] of x [..., H]; or, with labels, `linear_cross_entropy` of x_TH."""
        if label_T is None:
            return F.linear(x, self.weight)
        return linear_cross_entropy(
            x, self.weight, label_T, chunk_tokens=chunk_tokens, chunk_loss=self.chunk_loss
        )
