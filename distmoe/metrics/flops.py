"""Parameters and FLOPs of a model, from its config alone, and the peak of known devices."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from distmoe.config import Config, ModelConfig, MoEConfig
from distmoe.kernels.moe_mlp.activations import activation_called
from distmoe.model.attention import attention_sizes


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part, over all layers.

    ``head``: 0 where the embedding is the head. ``active_experts``: the share of ``experts`` that
    a token passes, top_k of num_experts.
    """

    embedding: int
    head: int
    attention: int
    norms: int
    dense_mlps: int
    routers: int
    shared_experts: int
    experts: int
    active_experts: int

    @property
    def total(self) -> int:
        """All parameters that are stored."""
        return self.active - self.active_experts + self.experts

    @property
    def active(self) -> int:
        """Parameters that a token passes, embedding and head among them."""
        blocks = self.attention + self.norms + self.dense_mlps + self.routers + self.shared_experts
        return self.embedding + self.head + blocks + self.active_experts


def parameter_counts(model: ModelConfig, moe: MoEConfig) -> ParameterCounts:
    """Counts of a resolved config: with H hidden, attention has what its kind says, a gated MLP
    3 H width, another 2 H width, a router E H, a block two RMSNorms of H, the model a last one."""
    H = model.hidden_size
    n_moe = model.n_layers - model.n_dense_layers
    attention = sum(map(prod, attention_sizes(model).shapes))
    width = activation_called(moe.activation).width(moe.intermediate_size)
    expert = H * (width + moe.intermediate_size)
    embedding = model.vocab_size * H
    return ParameterCounts(
        embedding=embedding,
        head=0 if model.tie_embeddings else embedding,
        attention=model.n_layers * attention,
        norms=(2 * model.n_layers + 1) * H,
        dense_mlps=model.n_dense_layers * 3 * H * model.intermediate_size,
        routers=n_moe * moe.num_experts * H,
        shared_experts=n_moe * 3 * H * moe.shared_intermediate_size,
        experts=n_moe * moe.num_experts * expert,
        active_experts=n_moe * moe.top_k * expert,
    )


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward and backward of one trained token, without recomputation.

    ``model`` counts the causal half of attention, which is what the model needs; ``palm`` counts
    the full square, as the PaLM convention does (arXiv 2204.02311, appendix B).
    """

    model: int
    palm: int


def flops_per_token(config: Config, *, document_tokens: float | None = None) -> FlopsPerToken:
    """6 * active parameters, without the embedding look-up, + attention:
    6 * n_layers * A (D of queries + D of values) * S for the full square of scores and values,
    half of it for the causal part.

    ``document_tokens``: where attention ends with documents, the sum of n^2 over the sum of n, for
    documents of n tokens in a sequence. The causal part is then half of the same with that in the
    place of S; the full square stays the sequence's.
    """
    model = config.model
    counts = parameter_counts(model, config.moe)
    look_up = 0 if model.tie_embeddings else counts.embedding
    matmuls = 6 * (counts.active - look_up)
    sizes = attention_sizes(model)
    per_position = 6 * model.n_layers * (sizes.q + sizes.y)
    square = per_position * config.data.seq_len
    attended = square if document_tokens is None else round(per_position * document_tokens)
    return FlopsPerToken(model=matmuls + attended // 2, palm=matmuls + square)


# Dense bf16 tensor-core FLOP/s without sparsity, from the vendors' data sheets, by the name that
# the driver gives. A name that is no key has no known peak.
BF16_PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the device that CUDA calls ``device_name``; None if it is not known."""
    return BF16_PEAK_FLOPS.get(device_name)
