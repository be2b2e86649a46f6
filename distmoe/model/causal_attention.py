"""Causal attention over whole sequences, or inside of the documents of a packed sequence.

    y_q = sum over k of softmax_k(q . k / sqrt(D)) v_k,   start_q <= k <= q

with start_q the position at which q's document begins, 0 where documents are not told apart. Rotary
positions need not restart: a score depends on the distance of q and k only.

Under context parallelism a rank has the queries of its part of the positions, and all keys.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distmoe.comm.context import WHOLE, ContextPart

# Queries, and keys, of a block of a BlockMask.
BLOCK = 128

AttentionMask = Any
"""None: causal over the whole sequence. A bool tensor [B, 1, S / C, S]: what is seen. A BlockMask:
the same by blocks, for FlexAttention."""


def document_mask(start_BS: Tensor | None, part: ContextPart = WHOLE) -> AttentionMask:
    """What a batch may attend to, for all layers: None over whole sequences, else inside of
    documents. On CUDA as a BlockMask: FlexAttention skips blocks of other documents, and stores no
    mask of S x S. ``start_BS`` [B, S / C]: of the queries, which have the positions of ``part``."""
    if start_BS is None:
        return None
    make = block_mask if start_BS.device.type == "cuda" else dense_mask
    return make(start_BS, part)


def dense_mask(start_BS: Tensor, part: ContextPart = WHOLE) -> Tensor:
    """[B, 1, S / C, S], true where a query (third axis) sees a key."""
    num_own, device = start_BS.shape[1], start_BS.device
    position_S = part.positions(num_own, device)
    key_S = torch.arange(num_own * part.size, device=device)
    # A key's document is the query's if it does not lie before its begin.
    inside_BSS = key_S >= start_BS[:, :, None]
    return (inside_BSS & (key_S <= position_S[:, None]))[:, None]


def block_mask(start_BS: Tensor, part: ContextPart = WHOLE) -> AttentionMask:
    """The same as a BlockMask, from blocks alone: torch's create_block_mask would form all S x S.

    Positions and ``start_BS`` rise along a row, so the first query of a block sees the earliest
    document of its block, and the last query the latest.
    """
    # It brings torch's compiler with it.
    from torch.nn.attention.flex_attention import BlockMask

    num_own, device = start_BS.shape[1], start_BS.device
    num_keys = num_own * part.size
    position_S = part.positions(num_own, device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (start_BS[b, q] <= k) & (k <= position_S[q])

    # The ends of a block of queries, and of one of keys.
    first_N = torch.arange(0, num_own, BLOCK, device=device)
    last_N = (first_N + BLOCK - 1).clamp(max=num_own - 1)
    from_N = torch.arange(0, num_keys, BLOCK, device=device)
    to_N = from_N + BLOCK - 1
    earliest_BN, latest_BN = start_BS[:, first_N], start_BS[:, last_N]
    # Some query of block i may see some key of block j; every query sees every key.
    seen_BNN = (from_N <= position_S[last_N][:, None]) & (to_N >= earliest_BN[:, :, None])
    whole_BNN = (to_N <= position_S[first_N][:, None]) & (from_N >= latest_BN[:, :, None])
    # A block that the end of the row cuts is never whole.
    whole_BNN &= (to_N < num_keys) & (first_N + BLOCK <= num_own)[:, None]
    return BlockMask.from_kv_blocks(
        *_block_lists(seen_BNN & ~whole_BNN),
        *_block_lists(whole_BNN),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(num_own, num_keys),
    )


def _block_lists(mask_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row of blocks how many are there [B, 1, N], and these before the others
    [B, 1, N, N]."""
    order_BNN = mask_BNN.int().argsort(dim=-1, descending=True, stable=True)
    return mask_BNN.sum(-1, dtype=torch.int32)[:, None], order_BNN.int()[:, None]


def attend(
    q_BASD: Tensor,
    k_BASD: Tensor,
    v_BASD: Tensor,
    mask: AttentionMask,
    *,
    part: ContextPart = WHOLE,
    scale: float = 1.0,
) -> Tensor:
    """q [B, A, S / C, D], k [B, A / any factor, S, D], v as k but with another D, if wanted -> y
    [B, A, S / C, D of v]. ``part``: the positions of q. ``scale``: on the scores, beside
    1 / sqrt(D).

    For values of another size torch has fused kernels on CUDA: cuDNN's on Hopper and newer for 192
    and 128, the sizes of DeepSeek, which torch 2.11 takes first if cuDNN is newer than 9.15 (its
    packages for CUDA 13 are) and run.deterministic is off; else the memory-efficient one. On a CPU
    it has none, and would form all scores; there v is padded. So it is for a part of the
    positions, whose kernel is FlashAttention's.
    """
    scale /= q_BASD.shape[-1] ** 0.5
    if mask is None or isinstance(mask, Tensor):
        size = v_BASD.shape[-1]
        in_chunks = mask is None and part.size > 1
        if size < q_BASD.shape[-1] and (in_chunks or not q_BASD.is_cuda):
            v_BASD = F.pad(v_BASD, (0, q_BASD.shape[-1] - size))
        if in_chunks:
            return _attend_in_chunks(q_BASD, k_BASD, v_BASD, part, scale)[..., :size]
        return F.scaled_dot_product_attention(
            q_BASD,
            k_BASD,
            v_BASD,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )[..., :size]
    flex_attention = _flex_attention(compiled=q_BASD.is_cuda and not torch.compiler.is_compiling())
    y_BASD: Tensor = flex_attention(
        q_BASD, k_BASD, v_BASD, block_mask=mask, scale=scale, enable_gqa=True
    )
    return y_BASD


def _attend_in_chunks(
    q_BASD: Tensor, k_BASD: Tensor, v_BASD: Tensor, part: ContextPart, scale: float
) -> Tensor:
    """Each of the two chunks of queries over the keys up to its end."""
    chunk = q_BASD.shape[2] // 2
    parts = []
    for number, q_BAcD in zip(part.chunks, q_BASD.chunk(2, dim=2), strict=True):
        seen = (number + 1) * chunk
        y_BAcD = F.scaled_dot_product_attention(
            q_BAcD,
            k_BASD[:, :, :seen],
            v_BASD[:, :, :seen],
            attn_mask=_up_to_the_last(chunk, seen, q_BASD.device),
            scale=scale,
            enable_gqa=True,
        )
        parts.append(y_BAcD)
    return torch.cat(parts, dim=2)


def _up_to_the_last(queries: int, keys: int, device: torch.device) -> Tensor:
    """A causal mask whose last query sees the last key. On CUDA one that is no mask in memory:
    torch has FlashAttention do it, if the dtype is one of its own."""
    if device.type == "cuda":
        # It brings torch's compiler with it.
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(queries, keys)
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


@cache
def _flex_attention(*, compiled: bool) -> Any:
    """Compiled by itself, unless it is a part of something that is: else it forms all scores. On a
    CPU torch has no backward of it, compiled or not."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention
