"""Bytes of the final norm and the cross entropy."""

from __future__ import annotations

from dataclasses import dataclass

from distmoe.config import Config

FP32 = 4


@dataclass(frozen=True)
class LossActivations:
    """``kept``: of the final norm. ``widest``: what the loss of a chunk of tokens adds."""

    kept: int
    widest: int


def loss_activations(config: Config, *, itemsize: int) -> LossActivations:
    """The logits of ``loss_chunk_tokens`` tokens exist at one time. Their backward holds the
    log-probabilities, the gradient of these, and that of the logits, all in fp32; with several
    chunks beside the head's gradient of those before, in the compute dtype."""
    model, T = config.model, config.train.micro_batch_size * config.data.seq_len
    chunk = min(T, config.train.loss_chunk_tokens)
    norms = 1 if config.run.device != "cpu" else 2
    kept = T * model.hidden_size * (FP32 * norms + itemsize)
    widest = 3 * FP32 * chunk * model.vocab_size
    if chunk < T:
        widest += itemsize * model.vocab_size * model.hidden_size
    return LossActivations(kept, widest)
