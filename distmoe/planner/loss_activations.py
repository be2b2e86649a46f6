"""Bytes of the final norm and the cross entropy."""

from __future__ import annotations

from dataclasses import dataclass

from distmoe.config import Config
from distmoe.config.batch import rank_tokens
from distmoe.config.loss_chunks import loss_chunk_tokens

FP32 = 4


@dataclass(frozen=True)
class LossActivations:
    """``kept``: of the final norm, and the gradient of its result, which the loss makes.
    ``widest``: what the loss of a chunk of tokens adds, the head's gradient among it."""

    kept: int
    widest: int


def loss_activations(config: Config, *, itemsize: int) -> LossActivations:
    """`linear_cross_entropy`: a chunk's logits and their exponentials in fp32; then their gradient
    and the head's. With several chunks that is added up in fp32, to which a product in bf16 is
    added."""
    model, T = config.model, rank_tokens(config)
    V, H = model.vocab_size, model.hidden_size
    chunk = min(T, loss_chunk_tokens(config, T))
    norms = 1 if config.run.device != "cpu" else 2
    kept = T * H * (FP32 * norms + 2 * itemsize)
    added_up = FP32 * V * H if chunk < T else 0
    product = 0 if added_up and itemsize == FP32 else itemsize * V * H
    # Operators of bf16 and fp32 cast the bf16 first on a CPU, on a GPU as they read it.
    cast = FP32 if config.run.device == "cpu" and itemsize < FP32 else 0
    logits = (itemsize + FP32 + cast) * chunk * V
    return LossActivations(kept, added_up + max(logits, itemsize * chunk * V + product))
