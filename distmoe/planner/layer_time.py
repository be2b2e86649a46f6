"""What the layers of a model compute and move on one rank, the experts' exchange left out.

Products are counted as FLOPs, everything between them as bytes of the device's memory, operator by
operator as our eager modules run: a cast or a product of two tensors reads its operands and writes
its result. s is the bytes of an activation, 2 in bf16; casts to fp32 exist below that only.
"""

from __future__ import annotations

from dataclasses import dataclass

from distmoe.config import Config, MoEConfig
from distmoe.config.batch import rank_tokens
from distmoe.config.loss_chunks import loss_chunk_tokens
from distmoe.model.attention import AttentionSizes, attention_sizes
from distmoe.planner.step_parts import StepPart

# FlashAttention-2 computes the scores again in its backward: five products for the two of the
# forward (arXiv 2307.08691).
ATTENTION_BACKWARD = 2.5
# Bytes of a logit, over the softmax, keys, top-k, z-loss, counts and candidates of rounding.
# Counted in the code, not measured.
ROUTER_BYTES, ROUTER_BYTES_BACKWARD = 60, 24
# Operators that the host launches for a forward, and what one takes eager PyTorch. Assumed.
ATTENTION_OPS, MLP_OPS, NORM_OPS, HEAD_OPS = 50, 10, 10, 20
OP_S = 5e-6
# For forward and backward of an MoE layer beside its experts' kernels, on one rank and on several:
# counted by tests/moe/test_host_work.py.
MOE_OPS_OF_ONE, MOE_OPS_OF_SEVERAL = (104, 38), (166, 47)


@dataclass(frozen=True)
class Rates:
    """FLOP/s and bytes/s of a device."""

    dense_flops: float
    attention_flops: float
    bytes_per_s: float


@dataclass(frozen=True)
class Work:
    """Of one pass over some layers."""

    dense_flops: float = 0.0
    attention_flops: float = 0.0
    bytes: float = 0.0
    ops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.dense_flops + other.dense_flops,
            self.attention_flops + other.attention_flops,
            self.bytes + other.bytes,
            self.ops + other.ops,
        )

    def parts_s(self, rates: Rates) -> dict[StepPart, float]:
        """Seconds by what takes them."""
        parts = {
            StepPart.DENSE_PRODUCTS: self.dense_flops / rates.dense_flops,
            StepPart.ATTENTION: self.attention_flops / rates.attention_flops,
            StepPart.MEMORY_BOUND: self.bytes / rates.bytes_per_s,
        }
        return parts | {StepPart.LAUNCHES: max(0.0, self.ops * OP_S - sum(parts.values()))}


@dataclass(frozen=True)
class Passes:
    """Forward and backward of the same layers."""

    forward: Work
    backward: Work

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def recomputed(self) -> Passes:
        """With the forward once more in the backward."""
        return Passes(self.forward, self.forward + self.backward)


@dataclass(frozen=True)
class ModelPasses:
    """One micro-batch of a rank: ``dense_block`` and ``moe_block``, each with its activation
    checkpointing; ``edges``: embedding, last norm, head and loss."""

    dense_block: Passes
    moe_block: Passes
    edges: Passes


def model_passes(config: Config, itemsize: int) -> ModelPasses:
    """Of a resolved config."""
    model, moe = config.model, config.moe
    tokens = rank_tokens(config)
    attention = _attention(config, tokens, itemsize)
    dense = _mlp(model.hidden_size, model.intermediate_size, tokens, itemsize)
    dense += _norm_and_residual(model.hidden_size, tokens, itemsize)
    routed = _routed(moe, config.parallel.ep, tokens, itemsize)
    recompute = config.train.activation_checkpoint
    if recompute != "none":
        attention, dense = attention.recomputed(), dense.recomputed()
    if recompute == "full":
        routed = routed.recomputed()
    return ModelPasses(
        dense_block=attention + dense,
        moe_block=attention + routed,
        edges=_edges(config, tokens, itemsize),
    )


def _attention(config: Config, tokens: int, s: int) -> Passes:
    """Norm, projections, rotary positions, causal attention, residual. A rank of a cp axis has
    even work: its queries see half of the sequence on average."""
    model, cp = config.model, config.parallel.cp
    sizes = attention_sizes(model)
    flops = 2 * tokens * (sizes.multiplied + (cp - 1) * sizes.after_gather)
    causal = tokens * config.data.seq_len * (sizes.q + sizes.y)
    moved = tokens * (sizes.normed * _norm_bytes(s) + sizes.turned * _rope_bytes(s))
    # The heads of the output are laid side by side, too.
    copied = sizes.joined + sizes.y + (sizes.held if model.clip_qkv else 0)
    moved += tokens * copied * 2 * s
    passes = Passes(
        Work(flops, causal, moved, ATTENTION_OPS),
        Work(2 * flops, ATTENTION_BACKWARD * causal, moved, 2 * ATTENTION_OPS),
    )
    if cp > 1:
        passes += _shared_sequences(sizes, tokens * s, cp)
    return passes + _norm_and_residual(model.hidden_size, tokens, s)


def _shared_sequences(sizes: AttentionSizes, row_bytes: int, cp: int) -> Passes:
    """Copies around the gather: what leaves is packed, what has arrived put in order, for latents
    keys and values are formed of all. Back the gradients of two runs of keys are filled up with
    zeros and added, and packed by rank, and those of all ranks are added."""
    whole_kv, whole = cp * sizes.held_kv, cp * sizes.gathered
    formed = 2 * (whole_kv - sizes.held_kv) if sizes.after_gather else 0
    return Passes(
        Work(bytes=row_bytes * (2 * sizes.gathered + 2 * whole + formed)),
        Work(bytes=row_bytes * (5 * whole_kv + 5 * whole + formed)),
    )


def _mlp(hidden: int, width: int, tokens: int, s: int) -> Passes:
    """SwiGLU of three products: silu reads and writes, the product reads two and writes one."""
    flops = 6 * tokens * hidden * width
    return Passes(
        Work(flops, 0.0, 5 * s * tokens * width, MLP_OPS),
        Work(2 * flops, 0.0, 9 * s * tokens * width, 2 * MLP_OPS),
    )


def _routed(moe: MoEConfig, ep: int, tokens: int, s: int) -> Passes:
    """What an MoE layer does but for its experts: norm, router, shared expert, residual."""
    H, E = moe.hidden_size, moe.num_experts
    flops = 2 * tokens * H * E
    forward_ops, backward_ops = MOE_OPS_OF_ONE if ep == 1 else MOE_OPS_OF_SEVERAL
    moved, moved_back = s * H + ROUTER_BYTES * E, 2 * s * H + ROUTER_BYTES_BACKWARD * E
    passes = Passes(
        Work(flops, 0.0, tokens * moved, forward_ops + NORM_OPS),
        Work(2 * flops, 0.0, tokens * moved_back, backward_ops + 2 * NORM_OPS),
    )
    if moe.shared_intermediate_size:
        passes += _mlp(H, moe.shared_intermediate_size, tokens, s)
    return passes + _norm_and_residual(H, tokens, s)


def _edges(config: Config, tokens: int, s: int) -> Passes:
    """Rows of the embedding; logits and their cross entropy with all gradients, which the forward
    makes and the backward multiplies. The head's is added up in fp32 where there are several
    chunks."""
    H, V = config.model.hidden_size, config.model.vocab_size
    # Logits are written, their largest is found, and they are written anew, less that.
    per_logit = 3 * s + 4
    # exp, its sum, and the division by it, whose result is read by two products.
    per_logit += 8 + 4 + (4 + s) + 2 * s
    chunks = -(-tokens // loss_chunk_tokens(config, tokens))
    added_up = chunks * (8 + (2 * s if s < 4 else 0)) * V * H if chunks > 1 else 0
    head = Passes(
        Work(6 * tokens * H * V, 0.0, tokens * V * per_logit + added_up, chunks * HEAD_OPS),
        # Gradients of head and tokens are read and written.
        Work(bytes=((4 if added_up else s) * V + s * (V + 2 * tokens)) * H, ops=4),
    )
    rows = 2 * s * tokens * H
    embedding = Passes(Work(bytes=rows), Work(bytes=rows + s * V * H))
    return head + embedding + _norm_and_residual(H, tokens, s)


def _norm_and_residual(hidden: int, tokens: int, s: int) -> Passes:
    work = Work(bytes=tokens * hidden * (_norm_bytes(s) + 3 * s))
    return Passes(work, work)


def _norm_bytes(s: int) -> int:
    """Of an element: the norm reads and writes fp32, with a cast before and after it."""
    return 8 if s == 4 else 8 + 2 * (s + 4)


def _rope_bytes(s: int) -> int:
    """Of an element: four products and two sums of halves, the halves joined; and two casts."""
    return 36 if s == 4 else 36 + 2 * (s + 4)
