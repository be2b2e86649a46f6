"""The contract of a kind of attention, and its sizes, from which figures and plans are made."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

from torch import Tensor, nn

from distmoe.comm.context import SequenceGather
from distmoe.config import ModelConfig
from distmoe.model.causal_attention import AttentionMask
from distmoe.registry import ATTENTIONS


@dataclass(frozen=True)
class AttentionSizes:
    """Of one layer. ``matrices``: [out, in] of every projection; ``vectors``: norms and biases.

    ``heads`` queries have ``qk_dim`` values each, ``kv_heads`` keys as many, and values ``v_dim``.
    RoPE turns ``rotary_dim`` of a head's.

    Of a token, over all heads: ``normed`` values pass an RMSNorm, of which ``latent`` are then the
    input of a projection; ``turned`` pass RoPE; ``joined`` are copied to lie side by side after
    that; queries, keys and values hold ``held`` in memory, with all that they are views of.
    ``gathered`` values go to all ranks that share its sequence, each of which then multiplies them
    by ``after_gather`` parameters.
    """

    matrices: tuple[tuple[int, int], ...]
    vectors: tuple[int, ...]
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    rotary_dim: int
    normed: int
    latent: int
    turned: int
    joined: int
    held: int
    gathered: int
    after_gather: int

    @property
    def q(self) -> int:
        """Values of a token's queries."""
        return self.heads * self.qk_dim

    @property
    def y(self) -> int:
        """Values of a token's result, before the output projection."""
        return self.heads * self.v_dim

    @property
    def held_kv(self) -> int:
        """What keys and values hold of ``held``."""
        return self.held - self.q

    @property
    def multiplied(self) -> int:
        """Parameters that are matrices."""
        return sum(map(prod, self.matrices))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of all parameters."""
        return (*self.matrices, *((length,) for length in self.vectors))


class Attention(Protocol):
    """A module, made with a resolved model: [B, S, H] -> [B, S, H]; cos and sin are
    [S, rotary_dim / 2]. S are this rank's positions; ``gather`` gives what it needs of others."""

    def __init__(self, config: ModelConfig, gather: SequenceGather) -> None: ...

    @staticmethod
    def sizes(model: ModelConfig) -> AttentionSizes: ...

    def __call__(self, x_BSH: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask) -> Tensor: ...


def attention_sizes(model: ModelConfig) -> AttentionSizes:
    """Of the kind that a resolved model has."""
    kind: type[Attention] = ATTENTIONS.load(model.attention)
    return kind.sizes(model)


def make_attention(model: ModelConfig, gather: SequenceGather) -> nn.Module:
    """A layer of the kind that a resolved model has."""
    module: nn.Module = ATTENTIONS.load(model.attention)(model, gather)
    return module
