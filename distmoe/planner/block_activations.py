"""Bytes of activations of one block, kept for the backward and held in between, by part.

T tokens, H, b bytes of an activation; attention has its own sizes. Norms and rotary positions are
computed in fp32. Terms below T bytes are left out. The expert layer's are in `activation_memory`
and `exchange_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass

from distmoe.config import Config
from distmoe.config.batch import rank_tokens
from distmoe.kernels.moe_mlp.activations import activation_called
from distmoe.model.attention import attention_sizes
from distmoe.moe.row_formats import TravelFormats
from distmoe.planner.activation_memory import ActivationShape, keeps
from distmoe.planner.exchange_rows import ExchangeRows, exchange_rows
from distmoe.planner.step_moments import Stage

FP32 = 4


@dataclass(frozen=True)
class Part:
    """Half a block. ``kept``: from forward to backward. ``widest``: what its forward or its
    backward adds to that at the most, results and gradients of activations among them, those of
    weights not. Of experts, ``late``: the same while the gradients of their weights are made, and
    ``left``: of what was kept, what is still there after that."""

    kept: int
    widest: int
    late: int = 0
    left: int = 0


@dataclass(frozen=True)
class BlockActivations:
    """Of one block. ``x``: its input. ``kept``: from forward to backward, all or what is not
    recomputed. While a half is in its backward, ``under_mlp`` and ``under_attention`` are what the
    block holds beside that half: what the other one kept, and inputs of recomputed halves."""

    x: int
    kept: int
    under_mlp: int
    under_attention: int
    attention: Part
    mlp: Part

    def at(self, stage: Stage) -> int:
        """While the block is in its backward: what is kept or recomputed, what the stage adds, and
        the gradient of the residual stream."""
        match stage:
            case Stage.MLP | Stage.EXPERTS:
                return self.x + self.under_mlp + self.mlp.kept + self.mlp.widest
            case Stage.EXPERT_WEIGHTS:
                return self.x + self.under_mlp + self.mlp.kept + self.mlp.late
            case Stage.REDUCE_EXPERTS:
                return self.x + self.under_mlp + self.mlp.left
            case Stage.ATTENTION:
                kept = self.under_attention + self.attention.kept
                return self.x + kept + self.attention.widest
            case _:
                return 2 * self.x


@dataclass(frozen=True)
class _Sizes:
    """Of one rank's micro-batch. ``ep``: P; ``cp``: C. ``fused``: kernels of the GPU, which keep
    less. ``there``, ``home``: bytes of a row that travels, and of a partial sum."""

    T: int
    H: int
    b: int
    ep: int
    cp: int
    fused: bool
    there: int
    home: int

    @property
    def packs(self) -> bool:
        """Whether rows travel in another form than that of the experts."""
        return self.there != self.b * self.H


def block_activations(config: Config, *, itemsize: int, skew: float) -> dict[str, BlockActivations]:
    """Of a resolved config, by the kind of block: "dense" and "moe"."""
    model, T = config.model, rank_tokens(config)
    travel = TravelFormats.of(config.moe.dispatch)
    sizes = _Sizes(
        T=T,
        H=model.hidden_size,
        b=itemsize,
        ep=config.parallel.ep,
        cp=config.parallel.cp,
        fused=config.run.device != "cpu",
        there=travel.rows.row_bytes(model.hidden_size, itemsize),
        home=travel.sums.row_bytes(model.hidden_size, itemsize),
    )
    attention = _attention(sizes, config)
    dense = _dense_mlp(sizes, model.intermediate_size)
    experts = _experts(sizes, config, skew=skew)
    return {
        "dense": _block(sizes, attention, dense, config, recomputes_mlp=True),
        "moe": _block(sizes, attention, experts, config, recomputes_mlp=False),
    }


def _block(
    s: _Sizes, attention: Part, mlp: Part, config: Config, *, recomputes_mlp: bool
) -> BlockActivations:
    x = s.b * s.T * s.H
    # In fp32 the input that a recomputed norm keeps is the one that was saved.
    saved = 0 if s.b == FP32 else x
    kept, under_mlp, under_attention = attention.kept + mlp.kept, attention.kept, 0
    mode = config.train.activation_checkpoint
    if mode == "full":
        kept, under_mlp, under_attention = x, saved + attention.kept, saved
    elif mode == "selective":
        # The inputs of both halves.
        kept = x + (x if recomputes_mlp else mlp.kept)
        under_mlp, under_attention = x + (saved if recomputes_mlp else 0), saved
    return BlockActivations(x, kept, under_mlp, under_attention, attention, mlp)


def _norm(s: _Sizes, width: int) -> int:
    """What RMSNorm over rows of ``width`` keeps: its input in fp32 and, unless fused, the normed
    values before the weight. Its result is the next operator's to keep."""
    return FP32 * s.T * width * (1 if s.fused else 2)


def _attention(s: _Sizes, config: Config) -> Part:
    """Norm, its result, what is normed again (queries and keys, or latents, with their results),
    what the attention kernel keeps (q, k, v, its result, which lies head by head, and a sum for
    every row of scores), and the result again, token by token, for the output projection. k and v
    are those of whole sequences, and so are the latents that they are formed from."""
    sizes, rows = attention_sizes(config.model), s.b * s.T
    kept = _norm(s, s.H) + rows * s.H + _norm(s, sizes.normed) + rows * sizes.latent
    if config.model.clip_qkv:
        kept += rows * sizes.held
    held_kv, result = sizes.held_kv, sizes.y
    if sizes.v_dim < sizes.qk_dim and (s.cp > 1 or not s.fused):
        # Values are padded to the size of queries, and so is the kernel's result.
        held_kv, result = 2 * sizes.q, sizes.q
    held = sizes.q + s.cp * held_kv
    kept += rows * (held + result + sizes.y) + FP32 * s.T * sizes.heads
    # Gradients of q, k and v; or, when what the kernel kept is gone, q's in fp32 and its two turns.
    gradients = rows * held
    if s.cp > 1:
        if sizes.after_gather:
            kept += rows * (s.cp - 1) * sizes.gathered
        if not s.fused:
            kept += _masks(s, config.data.seq_len)
        # Those of k and v for both chunks of queries, as long as the sequence, and their sum.
        gradients += rows * 2 * s.cp * held_kv
    turned = 3 * FP32 * s.T * sizes.q - rows * 2 * sizes.q
    return Part(kept, max(gradients, turned))


def _masks(s: _Sizes, seq_len: int) -> int:
    """Of both chunks of queries over the keys up to their ends, of which a CPU makes addends."""
    chunk = seq_len // (2 * s.cp)
    return s.b * chunk * chunk * (2 * s.cp + 1)


def _dense_mlp(s: _Sizes, width: int) -> Part:
    """Norm, its result, gate and up, silu(gate), and the product."""
    rows = s.b * s.T
    kept = _norm(s, s.H) + rows * s.H + 4 * rows * width
    # Gradients of the product and of what it is made of, when the product is gone.
    return Part(kept, 2 * rows * width)


def _experts(s: _Sizes, config: Config, *, skew: float) -> Part:
    moe = config.moe
    found = exchange_rows(config, num_tokens=s.T, skew=skew)
    width = activation_called(moe.activation).width(moe.intermediate_size)
    shape = ActivationShape(
        T=s.T,
        H=s.H,
        I=moe.intermediate_size,
        E=moe.num_experts,
        G=width,
        pairs=found.pairs,
        itemsize=s.b,
    )
    small = sum(size for name, size in keeps(shape).items() if name not in ("x", "z"))
    left = _norm(s, s.H) + s.b * s.T * s.H + small
    # Of one rank the rows are the tokens, unless they are rounded as those that travel.
    rows = found.received or (s.T if s.packs else 0)
    kept = left + s.b * (rows * s.H + found.pairs * width)
    if shared := moe.shared_intermediate_size:
        left += 4 * s.b * s.T * shared
        kept += 4 * s.b * s.T * shared
    return Part(kept, _widest(s, shape, found), late=_late(s, shape, found), left=left)


def _widest(s: _Sizes, shape: ActivationShape, found: ExchangeRows) -> int:
    """Of the experts' forward or dgrad, the larger."""
    row, L, R = s.b * s.H, found.pairs, found.received or s.T
    # a and y of every pair, and y of every row.
    forward = s.b * L * shape.I + row * L + s.home * R
    # dz, a_scaled and dx of every pair, dx of every row; dy of every row that has arrived.
    backward = s.b * L * (shape.G + shape.I) + row * (L + found.received) + s.home * R
    plain = 0 if s.fused else max(_row_sum(s, found), _one_expert(s, shape))
    return max(forward, backward) + plain + _travelling(s, found) + row * s.T


def _late(s: _Sizes, shape: ActivationShape, found: ExchangeRows) -> int:
    """While weight gradients are made: dx of the pairs is gone."""
    row, L, R = s.b * s.H, found.pairs, found.received or s.T
    backward = s.b * L * (shape.G + shape.I) + row * found.received + s.home * R
    return backward + _travelling(s, found) + row * s.T


def _travelling(s: _Sizes, found: ExchangeRows) -> int:
    """Rows on their way and the partial sums that come back for them. ``packed``: beside the rows
    that they are made of, and become."""
    packed = s.T + found.received if s.packs else 0
    rows = found.sent + found.relayed + found.parts + packed
    return s.there * rows + s.home * (found.outgoing + found.parts)


def _row_sum(s: _Sizes, found: ExchangeRows) -> int:
    """Without the fused kernels the pairs of a row are summed in fp32, from a copy of them; of a
    block at a time, which is about the rows of one rank."""
    copies = FP32 if s.b == FP32 else s.b + FP32
    return s.H * (found.pairs * copies + FP32 * (found.received or s.T)) // s.ep


def _one_expert(s: _Sizes, shape: ActivationShape) -> int:
    """Without the fused kernels the activation's derivative is made of nine arrays, in fp32, over
    the pairs of an expert and I, beside a copy of the expert's rows."""
    pairs = shape.pairs * s.ep // shape.E
    return pairs * (9 * FP32 * shape.I + s.b * s.H)
